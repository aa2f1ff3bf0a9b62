"""``fastadapt demo``: three ways to tune one base on four vision-and-language tasks, with scores, step times and activation memory."""

from __future__ import annotations

import copy
import json
import statistics
import textwrap
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fastadapt import backend, patching
from fastadapt.hosts.vlbart import VLBart
from fastadapt.training.demo.base import load_base
from fastadapt.training.demo.fit import answers, exact, fit, majority, question_only
from fastadapt.training.demo.tasks import TASKS, Batches, Examples, make
from fastadapt.training.mixing import MultiTaskLoader

BATCH = 64
STEPS = 400
TESTS = 400
PAIRS = 24


@dataclass(frozen=True)
class Recipe:
    """A method of `fastadapt.patch` with its options, or None for full fine-tuning, and a learning rate; chosen on the val split."""

    method: str | None
    lr: float
    options: dict[str, Any]


RECIPES = {
    "full": Recipe(None, 1e-3, {}),
    "vl_adapter": Recipe("vl_adapter", 3e-3, {"rank": 16}),
    "vlpet": Recipe("vlpet", 6e-3, {"rank": 32, "heads": 4, "gate_rank": 16, "value_rank": 16, "init": "identity"}),
}


@dataclass
class Outcome:
    """What the demo measures of one method."""

    scores: dict[str, float]
    said: dict[str, list[str]]
    trainable_percent: float
    step_seconds: dict[str, float]
    adapter_share: dict[str, float]
    activation_bytes: dict[str, int]

    @property
    def mean_score(self) -> float:
        return statistics.fmean(self.scores.values())


def prepare(recipe: Recipe, seed: int) -> tuple[VLBart, patching.Handle | None]:
    """A fresh base, patched as the recipe says."""
    torch.manual_seed(seed)
    model = load_base()
    return model, None if recipe.method is None else patching.patch(model, recipe.method, tasks=list(TASKS), **recipe.options)


def tune(name: str, recipe: Recipe, train: dict[str, Examples], steps: int, seed: int, *, progress: bool = True) -> tuple[VLBart, patching.Handle | None]:
    """Tunes a fresh base on the mixed tasks; every method sees the same batches in the same order."""
    model, handle = prepare(recipe, seed)
    batches = MultiTaskLoader({task: Batches(examples, BATCH, seed) for task, examples in train.items()})
    parameters = [p for p in model.parameters() if p.requires_grad]
    fit(model, parameters, batches, steps, recipe.lr, name=name, enter=None if handle is None else handle.set_task, progress=progress)
    return model, handle


def activation_bytes(model: nn.Module, batch: dict[str, Any]) -> int:
    """Bytes of the distinct storages that autograd keeps for one backward, parameters and buffers left out."""
    owned = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in owned:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(**batch).loss.backward()
    model.zero_grad(set_to_none=True)
    return sum(kept.values())


def _stepper(model: VLBart) -> Callable[[dict[str, Any]], float]:
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, fused=True)

    def step(batch: dict[str, Any]) -> float:
        start = time.perf_counter()
        model(**batch).loss.backward()
        nn.utils.clip_grad_norm_(parameters, 5.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return time.perf_counter() - start

    return step


def measure(model: VLBart, batches: list[dict[str, Any]], pairs: int) -> tuple[dict[str, float], dict[str, float], dict[str, int]]:
    """Seconds of a training step, the adapters' share of it, and activation bytes, each with fused ops and with ``reference``.

    Times are medians of ``pairs`` interleaved steps on the same batches, after one warm-up each, on a copy of the model. The adapters' share is what a step takes beyond a step of
    an unpatched base in which the same tensors of the base are trained.
    """
    model = copy.deepcopy(model).train()
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    base = load_base().train()
    for name, p in base.named_parameters():
        p.requires_grad_(name in trained)
    steps = {"fused": (_stepper(model), "auto"), "base": (_stepper(base), "auto")}
    steps["reference"] = (steps["fused"][0], "reference")
    times: dict[str, list[float]] = {way: [] for way in steps}
    for i in range(-1, pairs):
        for way in list(steps)[:: 1 if i % 2 else -1]:
            step, name = steps[way]
            with backend.use(name):
                seconds = step(batches[i % len(batches)])
            if i >= 0:
                times[way].append(seconds)
    medians = {way: statistics.median(taken) for way, taken in times.items()}
    alone = medians.pop("base")
    kept = {}
    for way in ("fused", "reference"):
        with backend.use(steps[way][1]):
            kept[way] = activation_bytes(model, batches[0])
    return {way: medians[way] for way in kept}, {way: max(0.0, 1 - alone / medians[way]) for way in kept}, kept


def reload_identical(directory: Path, tests: dict[str, Examples], said: dict[str, list[str]]) -> bool:
    """Whether a fresh base with the saved adapter gives the same answers to every test question."""
    model = load_base()
    patching.load(model, directory)
    return all(answers(model, tests[task]) == said[task] for task in TASKS)


def run(out: Path, *, seed: int = 0, steps: int = STEPS, tests: int = TESTS, pairs: int = PAIRS, split: str = "test", progress: bool = True) -> dict[str, Any]:
    """Tunes and measures every method and writes ``demo.json``, ``demo.png`` and the VL-PET adapter into ``out``.

    Args:
        steps: training steps of each method, a fourth of them for each task.
        tests: test questions per task.
        pairs: interleaved steps timed with fused ops and with ``reference``.
        split: "test", or "val" for choosing recipes.

    Returns:
        What ``demo.json`` holds.

    Raises:
        ValueError: ``steps`` is no positive multiple of four.
    """
    if steps < len(TASKS) or steps % len(TASKS):
        raise ValueError(f"steps: must be a positive multiple of {len(TASKS)}, not {steps}")
    out.mkdir(parents=True, exist_ok=True)
    train = {task: make(task, steps // len(TASKS) * BATCH, "train", seed) for task in TASKS}
    held_out = {task: make(task, tests, split, seed) for task in TASKS}
    baselines = {name: {task: score(train[task], held_out[task]) for task in TASKS} for name, score in (("majority", majority), ("question_only", question_only))}
    timed = [train[task].batch(slice(BATCH)) for task in TASKS]

    outcomes: dict[str, Outcome] = {}
    for name, recipe in RECIPES.items():
        model, handle = tune(name, recipe, train, steps, seed, progress=progress)
        said = {task: answers(model, held_out[task]) for task in TASKS}
        trainable, total = (sum(p.numel() for p in model.parameters()),) * 2 if handle is None else handle.parameter_counts()
        outcomes[name] = Outcome({task: exact(said[task], held_out[task].answers) for task in TASKS}, said, 100 * trainable / total, *measure(model, timed, pairs))
        if name == "vlpet" and handle is not None:
            handle.save(out / "vlpet")
    identical = reload_identical(out / "vlpet", held_out, outcomes["vlpet"].said)

    result = {
        "methods": {
            name: {
                "mean_score": o.mean_score,
                "scores": o.scores,
                "trainable_percent": o.trainable_percent,
                "step_seconds": o.step_seconds,
                "activation_bytes": o.activation_bytes,
            }
            for name, o in outcomes.items()
        },
        "baselines": {name: {"mean_score": statistics.fmean(scores.values()), "scores": scores} for name, scores in baselines.items()},
        "reload_identical": identical,
    }
    (out / "demo.json").write_text(json.dumps(result, indent=2) + "\n")
    draw(out / "demo.png", result, held_out, outcomes["vlpet"].said)
    print(table(result, {name: o.adapter_share for name, o in outcomes.items()}))
    print(f"fused ops: {fused_backend()}")
    print(f"VL-PET saved to {out / 'vlpet'}, loaded into a fresh base: answers {'identical' if identical else 'DIFFERENT'}")
    print(f"wrote {out / 'demo.json'} and {out / 'demo.png'}")
    return result


def fused_backend() -> str:
    """Which backend ran the adapters' ops so far, by the counts of `fastadapt.backend.ran`."""
    ran = sorted({name for (_, _, name), count in backend.ran().items() if count and name != "reference"})
    return ", ".join(ran) if ran else "none could run here, so both columns are reference (see fastadapt.backend.explain)"


def table(result: dict[str, Any], shares: dict[str, dict[str, float]]) -> str:
    """The figures as text."""
    heads = ["", "trained %", *TASKS, "mean", "step fused", "reference", "adapters' share", "activations fused", "reference"]
    rows = []
    for name, m in result["methods"].items():
        share = " / ".join(f"{100 * shares[name][way]:.0f}%" for way in ("fused", "reference")) if name in shares and m["trainable_percent"] < 100 else "-"
        rows.append(
            [name, f"{m['trainable_percent']:.2f}", *(f"{m['scores'][t]:.1f}" for t in TASKS), f"{m['mean_score']:.1f}"]
            + [f"{1e3 * m['step_seconds'][way]:.1f} ms" for way in ("fused", "reference")]
            + [share]
            + [f"{m['activation_bytes'][way] / 2**20:.2f} MiB" for way in ("fused", "reference")]
        )
    for name, b in result["baselines"].items():
        rows.append([name.replace("_", " "), "", *(f"{b['scores'][t]:.1f}" for t in TASKS), f"{b['mean_score']:.1f}", "", "", "", "", ""])
    widths = [max(len(row[i]) for row in [heads, *rows]) for i in range(len(heads))]
    return "\n".join("  ".join(cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))) for row in [heads, *rows])


def draw(path: Path, result: dict[str, Any], tests: dict[str, Examples], said: dict[str, list[str]]) -> None:
    """Scores of every method and baseline, and test pictures with VL-PET's answers."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    groups = {name.replace("_", " "): part for part_name in ("methods", "baselines") for name, part in result[part_name].items()}
    figure = plt.figure(figsize=(14, 9))
    axes: Any = figure.add_axes((0.05, 0.64, 0.93, 0.32))
    for i, (name, part) in enumerate(groups.items()):
        scores = [*part["scores"].values(), part["mean_score"]]
        label = f"{name} ({part['trainable_percent']:.1f} % trained)" if "trainable_percent" in part else name
        bars = axes.bar([x + 0.16 * (i - 2) for x in range(len(scores))], scores, 0.15, label=label, color=f"C{i}" if "trainable_percent" in part else ("0.6", "0.8")[i % 2])
        axes.bar_label(bars, fmt="%.0f", fontsize=8)
    axes.set(xticks=range(len(TASKS) + 1), xticklabels=[*TASKS, "mean"], ylabel="exact match, %", ylim=(0, 120), title="Held-out digits and scenes")
    axes.legend(ncols=5, fontsize=8, loc="upper center")
    for k, task in enumerate(TASKS):
        # One image for a row of examples: two dozen axes take longer to draw than the demo to load.
        columns = min(6, len(tests[task]))
        canvas = np.ones((16, 48 * columns))
        axes = figure.add_axes((0.02, 0.48 - 0.155 * k, 0.96, 0.085))
        axes.axis("off")
        for i in range(columns):
            for j, scenes in enumerate(tests[task].scenes):
                canvas[:, 48 * i + 18 * j : 48 * i + 18 * j + 16] = scenes[i : i + 1].pixels()[0]
            right = said[task][i] == tests[task].answers[i]
            text = f"{tests[task].questions[i]}\n{said[task][i]}" + ("" if right else f"  ({tests[task].answers[i]})")
            text = "\n".join(textwrap.fill(line, 36) for line in text.split("\n"))
            axes.text(48 * i, -2, text, fontsize=7, color="black" if right else "tab:red", va="bottom")
        axes.imshow(canvas, cmap="gray", vmin=0, vmax=1, aspect="auto" if columns < 6 else "equal")
    figure.savefig(path, dpi=110)
    plt.close(figure)
