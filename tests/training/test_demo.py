"""The demo end to end in miniature: the shipped base, the loop, what is measured, what is written."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from fastadapt import cli, patching
from fastadapt.training.demo import pretrain
from fastadapt.training.demo import run as demo
from fastadapt.training.demo.base import WEIGHTS, fresh, load_base, save_base
from fastadapt.training.demo.fit import answers, exact, fit
from fastadapt.training.demo.run import RECIPES, activation_bytes, prepare, reload_identical, run, tune
from fastadapt.training.demo.tasks import TASKS, Batches, make, make_objective
from tests.hosts.tiny import batch, tiny


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    monkeypatch.setattr(demo, "BATCH", 8)
    yield
    torch.set_num_threads(threads)


def test_base_weights() -> None:
    assert WEIGHTS.stat().st_size <= 4_000_000
    tensors = load_file(WEIGHTS)
    assert {t.dtype for t in tensors.values()} == {torch.float16} and all(torch.isfinite(t).all() for t in tensors.values())
    model = load_base()
    own = model.state_dict()
    assert tensors.keys() <= own.keys() and not model.training
    assert {name for name in own if name not in tensors} == {"lm_head.weight", "model.encoder.embed_tokens.weight", "model.decoder.embed_tokens.weight"}
    assert all(p is model.get_input_embeddings().weight for p in (model.lm_head.weight, model.model.encoder.embed_tokens.weight, model.model.decoder.embed_tokens.weight))


@pytest.mark.parametrize("objective, least", [("region", 88.0), ("caption", 75.0)])
def test_base_knows_its_objectives_on_held_out_pictures(objective: str, least: float) -> None:
    examples = make_objective(objective, 200, "val", 11)
    assert exact(answers(load_base(), examples), examples.answers) >= least


def test_base_cannot_do_the_tasks_untuned() -> None:
    """Neither questions nor statements of the tasks were pretraining data, so the untuned base answers none of them well."""
    for task in ("vqa", "gqa", "nlvr"):
        examples = make(task, 100, "val", 11)
        assert exact(answers(load_base(), examples), examples.answers) < 50.0


def test_save_base_round_trip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = fresh(3)
    save_base(model, tmp_path / "base.safetensors")
    monkeypatch.setattr("fastadapt.training.demo.base.WEIGHTS", tmp_path / "base.safetensors")
    again = load_base().state_dict()
    assert all(torch.equal(again[name], tensor.half().float()) for name, tensor in model.state_dict().items())
    torn = load_file(tmp_path / "base.safetensors")
    torn.pop("model.decoder.layers.0.fc1.weight")
    save_file(torn, tmp_path / "base.safetensors")
    with pytest.raises(RuntimeError, match=r"decoder\.layers\.0\.fc1\.weight"):
        load_base()


def test_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(tmp_path, steps=4, tests=12, pairs=2, progress=False)
    result = json.loads((tmp_path / "demo.json").read_text())
    assert result.keys() == {"methods", "baselines", "reload_identical"}
    assert result["methods"].keys() == {"full", "vl_adapter", "vlpet"} and result["baselines"].keys() == {"majority", "question_only"}
    for part in (*result["methods"].values(), *result["baselines"].values()):
        assert list(part["scores"]) == list(TASKS) and all(0 <= s <= 100 for s in part["scores"].values())
        assert part["mean_score"] == pytest.approx(sum(part["scores"].values()) / 4)
    for name, part in result["methods"].items():
        assert part.keys() == {"mean_score", "scores", "trainable_percent", "step_seconds", "activation_bytes"}
        for key in ("step_seconds", "activation_bytes"):
            assert part[key].keys() == {"fused", "reference"} and all(v > 0 for v in part[key].values())
        assert (part["trainable_percent"] == 100.0) == (name == "full") and part["trainable_percent"] > 1
    assert result["reload_identical"] is True
    assert (tmp_path / "demo.png").read_bytes().startswith(b"\x89PNG") and (tmp_path / "vlpet" / "adapter_model.safetensors").stat().st_size < 1_000_000
    said = capsys.readouterr().out
    assert all(word in said for word in (*RECIPES, *TASKS, "question only", "identical"))


def test_reload_sees_a_difference(tmp_path: Path) -> None:
    model, handle = prepare(RECIPES["vlpet"], 0)
    tests = {task: make(task, 6, "val", 0) for task in TASKS}
    said = {task: answers(model, tests[task]) for task in TASKS}
    handle.save(tmp_path)  # type: ignore[union-attr]
    assert reload_identical(tmp_path, tests, said)
    said["caption"][3] = "nothing"
    assert not reload_identical(tmp_path, tests, said)


def test_deterministic_for_a_seed() -> None:
    train = {task: make(task, 8, "train", 0) for task in TASKS}
    states = []
    for seed in (0, 0, 1):
        _, handle = tune("vlpet", RECIPES["vlpet"], train, 4, seed, progress=False)
        states.append([p.detach().clone() for p in handle.trainable_parameters()])  # type: ignore[union-attr]
    assert all(torch.equal(a, b) for a, b in zip(states[0], states[1], strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(states[0], states[2], strict=True))


def test_frozen_base_stays_as_it_was() -> None:
    train = {task: make(task, 8, "train", 0) for task in TASKS}
    model, handle = tune("vlpet", RECIPES["vlpet"], train, 4, 0, progress=False)
    assert isinstance(handle, patching.Handle)
    base, trained = load_base().state_dict(), {name for name, p in model.named_parameters() if p.requires_grad}
    now = model.state_dict()
    moved = {name for name, tensor in base.items() if not torch.equal(tensor, now[name])}
    assert moved and moved <= trained and all("norm" in name or "visual_embedding" in name for name in moved)


def test_fit_learns() -> None:
    examples = make("caption", 16, "train", 0)
    model = load_base()
    losses = fit(model, list(model.parameters()), (("caption", batch) for _ in range(8) for batch in Batches(examples, 16, 0)), 8, 1e-3, progress=False)
    assert len(losses) == 8 and losses[-1] < losses[0]


def test_fit_trains_in_training_mode() -> None:
    model, seen = tiny("bart").eval(), []
    model.register_forward_pre_hook(lambda module, _: seen.append(module.training))
    fit(model, list(model.parameters()), [("vqa", batch())], 1, 1e-3, progress=False)
    assert seen == [True] and not model.training


def test_activation_bytes() -> None:
    class Toy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 6)

        def forward(self, x: torch.Tensor) -> object:
            hidden = self.linear(x)
            # x for the weight's gradient; hidden for tanh's input is not kept, its output is, once, though mul keeps it twice; the linear's weight is a parameter.
            out = hidden.tanh()
            return type("Output", (), {"loss": (out * out).sum()})

    assert activation_bytes(Toy(), {"x": torch.randn(10, 4)}) == 4 * (10 * 4 + 10 * 6)


def test_jitter_keeps_pictures() -> None:
    examples = make_objective("caption", 50, "train", 0)
    moved = pretrain.jitter(examples.feats, 0)
    assert torch.equal(moved, pretrain.jitter(examples.feats, 0)) and moved.shape == examples.feats.shape
    ratio = moved.norm(dim=-1) / examples.feats.norm(dim=-1).clamp(min=1e-9)
    filled = examples.feats.flatten(2).any(-1)
    assert ((moved != 0).any(-1) == filled).all() and ratio[filled].min() > 0.5 and ratio[filled].max() < 1.21
    assert sum(pretrain.SHARES.values()) == pytest.approx(1)


@pytest.mark.parametrize("steps", ["3", "0", "-4", "6"])
def test_steps_must_fit_the_tasks(steps: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["demo", "--steps", steps, "--out", str(tmp_path / "demo")])
    assert "multiple of 4" in capsys.readouterr().err and not (tmp_path / "demo").exists()
    with pytest.raises(ValueError, match="steps: must be a positive multiple of 4"):
        run(tmp_path / "demo", steps=int(steps))
    assert not (tmp_path / "demo").exists()
