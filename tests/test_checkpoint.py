"""Adapter files: round trips, and every way in which a file may be wrong."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._dynamo.testing
from safetensors.torch import load_file

import fastadapt
from fastadapt import patching
from fastadapt.nn import PerTask
from fastadapt.patching import AdapterFileError, Handle, load, patch
from tests.hosts.tiny import FAMILIES, METHODS, SMALL, assert_same, batch, logits, randomize, snapshot, tiny

both = pytest.mark.parametrize("method", METHODS)
hosts = pytest.mark.parametrize("family", FAMILIES)
CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"


def saved(folder: Path, family: str = "bart", method: str = "vlpet", **options: object) -> tuple[Handle, torch.Tensor]:
    model = tiny(family)
    handle = patch(model, method, tasks=["vqa", "gqa"], name="mine", **{**SMALL[method], **options})  # type: ignore[arg-type]
    randomize(handle)
    handle.save(folder)
    return handle, logits(model)


@hosts
@both
def test_round_trip(family: str, method: str, tmp_path: Path) -> None:
    handle, out = saved(tmp_path / "new" / "folder", family, method)
    folder = tmp_path / "new" / "folder"
    assert sorted(os.listdir(folder)) == [CONFIG, TENSORS]
    config, tensors = json.loads((folder / CONFIG).read_text()), load_file(folder / TENSORS)
    assert config["format"] == "fastadapt" and config["format_version"] == 1 and config["method"] == method and config["tasks"] == ["vqa", "gqa"]
    assert set(config["sites"]) == handle.sites.keys() and config["trained_base"] == list(handle.report.trained_base)
    assert sum(t.numel() for t in tensors.values()) == handle.report.trainable
    assert all(t.is_contiguous() for t in tensors.values()) and not any("layers." in k or "block." in k for k in tensors)

    # Into a model that is patched alike.
    model = tiny(family)
    other = patch(model, method, **SMALL[method])
    assert not torch.equal(logits(model), out)
    other.load(folder)
    assert torch.equal(logits(model), out)

    # Into a fresh base.
    model = tiny(family)
    base, before = logits(model), snapshot(model)
    other = patching.load(model, folder)
    assert torch.equal(logits(model), out) and other.tasks == ("vqa", "gqa") and other.name == "mine"
    assert other.report.trainable == handle.report.trainable and str(other.report) == str(handle.report)
    other.unpatch(restore_base=True)
    assert torch.equal(logits(model), base)
    assert_same(before, snapshot(model))


def test_saving_again_replaces(tmp_path: Path) -> None:
    handle, _ = saved(tmp_path)
    randomize(handle, seed=9)
    handle.save(tmp_path)
    model = tiny("bart")
    patching.load(model, tmp_path)
    assert torch.equal(logits(model), logits(handle.model)) and sorted(os.listdir(tmp_path)) == [CONFIG, TENSORS]


def test_beside_a_model(tmp_path: Path) -> None:
    """Where PEFT is installed, transformers takes the files for PEFT's."""
    handle, _ = saved(tmp_path / "adapters")
    handle.model.save_pretrained(tmp_path / "model")
    with pytest.warns(UserWarning, match=r"model: holds a model's config.json"):
        handle.save(tmp_path / "model")


def test_identity_start_and_other_dtype(tmp_path: Path) -> None:
    """A file written over an fp32 base loads into a half-precision one, with fp32 adapters; the scale that ``init="identity"`` implies is kept."""
    model = tiny("bart")
    handle = patch(model, "vlpet", init="identity", **SMALL["vlpet"])
    randomize(handle)
    handle.save(tmp_path)
    half = tiny("bart").to(torch.bfloat16)
    loaded = patching.load(half, tmp_path, name="again")
    assert loaded.name == "again" and loaded.init == "identity" and loaded.resolved["bart"].scale == 2.0
    for (_, a), (_, b) in zip(handle.sites.items(), loaded.sites.items(), strict=True):
        assert all(torch.equal(p, q) and q.dtype == torch.float32 for p, q in zip(a.parameters(), b.parameters(), strict=True))
    assert (logits(half).float() - logits(model)).norm() / logits(model).norm() < 0.05


def test_a_file_loads_without_fused_ends(tmp_path: Path) -> None:
    saved(tmp_path)
    handle = load(tiny("bart"), tmp_path, fuse_residual=False)
    assert not handle.fuse_residual and not any(site.around for site in handle.report.sites)


def test_moved_modules(tmp_path: Path) -> None:
    """Sites, not paths: what a whole model saved, its inner model under another name loads."""
    handle, _ = saved(tmp_path)
    holder = torch.nn.ModuleDict({"language_model": tiny("bart").model})
    patching.load(holder, tmp_path)
    inner = holder["language_model"]
    for ours, theirs in ((inner.encoder, handle.model.model.encoder), (inner.decoder, handle.model.model.decoder)):
        assert all(torch.equal(a, b) for a, b in zip(ours.layers.parameters(), theirs.layers.parameters(), strict=True))


def test_deterministic(tmp_path: Path) -> None:
    handle, _ = saved(tmp_path / "a")
    handle.save(tmp_path / "b")
    for name in (CONFIG, TENSORS):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    saved(tmp_path)
    return tmp_path


def refused(folder: Path, match: str, method: str = "vlpet", **options: object) -> None:
    """Neither loading into a patched model nor patching a fresh one changes anything."""
    model = tiny("bart")
    handle = patch(model, method, **{**SMALL[method], **options})  # type: ignore[arg-type]
    before = snapshot(model)
    with pytest.raises(AdapterFileError, match=match):
        handle.load(folder)
    assert_same(before, snapshot(model))


def refused_fresh(folder: Path, match: str, model: torch.nn.Module | None = None, error: type[Exception] = AdapterFileError) -> None:
    model = model or tiny("bart")
    before = snapshot(model)
    with pytest.raises(error, match=match):
        patching.load(model, folder)
    assert_same(before, snapshot(model))


def edit(folder: Path, **changes: object) -> None:
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps({**config, **changes}))


def rewrite(folder: Path, change) -> None:  # type: ignore[no-untyped-def]
    """A consistent pair with other tensors."""
    config, tensors = fastadapt.checkpoint.read(folder)  # type: ignore[attr-defined]
    for key in ("format", "format_version", "tensors_sha256"):
        del config[key]
    change(tensors)
    fastadapt.checkpoint.write(folder, config, tensors)  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", [CONFIG, TENSORS])
def test_missing_file(folder: Path, name: str) -> None:
    (folder / name).unlink()
    refused(folder, f"must hold {CONFIG} and {TENSORS}")
    refused_fresh(folder, f"must hold {CONFIG} and {TENSORS}")


@pytest.mark.parametrize("size", [0, 4, 100, -1])
def test_truncated_tensors(folder: Path, size: int) -> None:
    data = (folder / TENSORS).read_bytes()
    (folder / TENSORS).write_bytes(data[:size])
    refused(folder, "truncated, changed")
    refused_fresh(folder, "truncated, changed")


def test_one_flipped_bit(folder: Path) -> None:
    data = bytearray((folder / TENSORS).read_bytes())
    data[-3] ^= 1
    (folder / TENSORS).write_bytes(data)
    refused(folder, "sha256 differs")


def test_no_safetensors(folder: Path) -> None:
    import hashlib

    torch.save({"a": torch.zeros(1)}, folder / TENSORS)
    edit(folder, tensors_sha256=hashlib.sha256((folder / TENSORS).read_bytes()).hexdigest())
    refused(folder, "is no safetensors file")


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"format": "other"}', b"\xff\xfe"])
def test_bad_config(folder: Path, text: str | bytes) -> None:
    (folder / CONFIG).write_bytes(text if isinstance(text, bytes) else text.encode())
    refused(folder, "is not JSON|is no adapter of fastadapt")
    refused_fresh(folder, "is not JSON|is no adapter of fastadapt")


def test_foreign_adapter(folder: Path) -> None:
    (folder / CONFIG).write_text(json.dumps({"peft_type": "LORA", "r": 8}))
    refused(folder, "is no adapter of fastadapt .* one of PEFT .*LORA")


@pytest.mark.parametrize("version", [2, 0, "1", None, True])
def test_unknown_version(folder: Path, version: object) -> None:
    edit(folder, format_version=version)
    refused(folder, f"format_version {version!r} is unknown; this fastadapt reads 1")


def test_a_file_of_an_earlier_version(folder: Path) -> None:
    """Options that came later are missing in it: it was written with their defaults."""
    config = json.loads((folder / CONFIG).read_text())
    config["options"]["bart"] = {name: value for name, value in config["options"]["bart"].items() if name not in ("biases", "encoder_prompt", "trained_modules")}
    edit(folder, options=config["options"])
    model = tiny("bart")
    patching.load(model, folder)
    other = tiny("bart")
    patch(other, "vlpet", **SMALL["vlpet"]).load(folder)
    assert torch.equal(logits(model), logits(other))
    refused(folder, "biases is False in the file and True here", biases=True)


def test_other_method_and_options(folder: Path) -> None:
    refused(folder, "holds an adapter of 'vlpet'; the model is patched with 'vl_adapter'", "vl_adapter")
    refused(folder, "saved with other options: .*granularity is 'large' in the file and 'small' here", granularity="small", gate_rank=None)
    refused(folder, "scale is 1.0 in the file and 0.5 here", scale=0.5)
    refused(folder, "rank is 8 in the file and 16 here", rank=16)
    handle = patch(tiny("bart"), "vlpet", save_gate=False, **SMALL["vlpet"])
    handle.load(folder)  # how backward gets the gate is no property of the adapter
    edit(folder, method="vlpat")
    refused_fresh(folder, "'vlpat' is unknown", error=ValueError)
    edit(folder, method="vlpet", options={"bart": {"rnk": 1}})
    refused_fresh(folder, "unknown option 'rnk'")
    edit(folder, options=None)
    refused_fresh(folder, "'options' must hold the options of one host family")
    refused(folder, "host families None in the file")


def test_other_model(folder: Path) -> None:
    refused_fresh(folder, r"lacks \d+ tensors of the model: encoder.2.feed_forward/down_sampler.bias|lacks \d+ tensors of the model: base/", tiny("bart", layers=3))
    refused_fresh(folder, r"has \d+ tensors that the model does not have: ", tiny("bart", layers=1))
    refused_fresh(folder, "host families|saved with other options", tiny("t5"))
    refused_fresh(folder, "has no layers of a supported host", torch.nn.Linear(3, 3), error=ValueError)


def test_other_tensors(folder: Path) -> None:
    key = "encoder.0.feed_forward/up_sampler.weight"
    _, tensors = fastadapt.checkpoint.read(folder)  # type: ignore[attr-defined]
    rewrite(folder, lambda t: t.pop(key))
    refused(folder, f"lacks 1 tensors of the model: {key}")
    rewrite(folder, lambda t: t.update({key: tensors[key], "extra": torch.zeros(2)}))
    refused(folder, "has 1 tensors that the model does not have: extra")
    rewrite(folder, lambda t: (t.pop("extra"), t.update({key: torch.zeros(32, 3)})))
    refused(folder, rf"{key} is torch.float32 \(32, 3\); the model has torch.float32 \(32, 8\)")
    rewrite(folder, lambda t: t.update({key: torch.zeros(32, 8, dtype=torch.int32)}))
    refused(folder, f"{key} is torch.int32")
    rewrite(folder, lambda t: t.update({key: tensors[key]}))
    patching.load(tiny("bart"), folder)


def test_failed_save_keeps_the_old_files(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = {name: (folder / name).read_bytes() for name in (CONFIG, TENSORS)}
    handle = patch(tiny("bart"), "vl_adapter")

    def full(*_: object) -> None:
        raise OSError("no space left on device")

    for broken in ("fsync", "replace"):
        with monkeypatch.context() as patched:
            patched.setattr(os, broken, full)
            with pytest.raises(OSError, match="no space"):
                handle.save(folder)
        assert {name: (folder / name).read_bytes() for name in sorted(os.listdir(folder))} == before
    with pytest.raises(OSError):
        handle.save(folder / CONFIG)


def test_files_obey_the_umask(tmp_path: Path) -> None:
    old = os.umask(0o027)
    try:
        saved(tmp_path)
    finally:
        os.umask(old)
    assert {(tmp_path / name).stat().st_mode & 0o777 for name in (CONFIG, TENSORS)} == {0o640}


# Adapters of several tasks from files of one.

LORA: dict[str, Any] = {"rank": 4, "biases": False, "dropout": 0.0}
APART: dict[str, dict[str, Any]] = {
    "vl_adapter": {"reduction_factor": 4, "layer_norms": "none"},
    "lora": LORA,
    "compacter": {"reduction_factor": 4, "division": 4, "layer_norms": "none"},
}


@pytest.mark.parametrize("method", APART)
@pytest.mark.parametrize("family", FAMILIES)
def test_adapters_trained_apart_serve_one_model(family: str, method: str, tmp_path: Path) -> None:
    """One file a task, of patches for one task each; a mixed batch then gives what those models gave, and each task's adapters go back into such a file."""
    inputs, want = batch(), {}
    for seed, task in enumerate(("vqa", "gqa")):
        model = tiny(family)
        handle = patch(model, method, **APART[method])
        randomize(handle, seed)
        want[task] = logits(model, inputs)
        handle.save(tmp_path / task)
    model = tiny(family)
    handle = patch(model, method, tasks=("vqa", "gqa"), sharing="multiple", **APART[method])
    for task in want:
        handle.load(tmp_path / task, task=task)
        handle.set_task(task)
        assert torch.equal(logits(model, inputs), want[task])
    with handle.route(["gqa", "vqa"]):
        torch.testing.assert_close(logits(model, inputs), torch.stack([want["gqa"][0], want["vqa"][1]]), rtol=1e-4, atol=1e-5)
    for task in want:
        handle.save(tmp_path / "again", task=task)
        assert (tmp_path / "again" / "adapter_model.safetensors").read_bytes() == (tmp_path / task / "adapter_model.safetensors").read_bytes()
        again = tiny(family)
        load(again, tmp_path / "again")
        assert torch.equal(logits(again, inputs), want[task])


def test_new_values_need_no_new_graph(tmp_path: Path) -> None:
    """Loading other adapters into a compiled model: the graph stays."""
    model = tiny("bart", layers=1)
    handle = patch(model, "lora", **LORA)
    graphs, counts = torch._dynamo.testing.CompileCounter(), []
    torch._dynamo.reset()
    compiled = torch.compile(model, backend=graphs)
    for seed in range(3):
        other = patch(tiny("bart", layers=1), "lora", **LORA)
        randomize(other, seed)
        other.save(tmp_path)
        handle.load(tmp_path)
        torch.testing.assert_close(logits(compiled), logits(other.model))
        counts.append(graphs.frame_count)
    assert counts == [counts[0]] * 3


def test_files_that_are_no_task_s(tmp_path: Path) -> None:
    single = patch(tiny("bart"), "vl_adapter", reduction_factor=4)
    randomize(single)
    single.save(tmp_path)
    with pytest.raises(ValueError, match=r"task: must be one of \(the model was patched without tasks\), not 'vqa'"):
        single.load(tmp_path, task="vqa")
    with pytest.raises(ValueError, match="task: the adapters of vl_adapter with these options serve all tasks"):
        patch(tiny("bart"), "vl_adapter", tasks=["vqa"], reduction_factor=4).save(tmp_path / "x", task="vqa")
    several = patch(tiny("bart"), "vl_adapter", tasks=["vqa", "gqa"], sharing="multiple", reduction_factor=4)
    before = snapshot(several.model)
    with pytest.raises(AdapterFileError, match=r"holds other values of \d+ tensors that tasks share here, .*: base/.*; train adapters apart with layer_norms='none'"):
        several.load(tmp_path, task="vqa")
    with pytest.raises(AdapterFileError, match="saved with other options"):
        several.load(tmp_path)
    half = patch(tiny("bart"), "vl_adapter", tasks=["vqa", "gqa"], sharing="up", layer_norms="none", reduction_factor=4)
    patch(tiny("bart"), "vl_adapter", layer_norms="none", reduction_factor=4).save(tmp_path)
    with pytest.raises(AdapterFileError, match=r"tensors that tasks share here, .*up_sampler[^;]*$"):
        half.load(tmp_path, task="vqa")
    assert_same(before, snapshot(several.model))


@hosts
def test_a_task_of_adapters_that_are_parts_of_modules(family: str, tmp_path: Path) -> None:
    """VL-PET's value adapter beside its residual: the adapter is one per task, the residual all tasks'."""
    options: dict[str, Any] = {"rank": 4, "heads": 4, "gate_rank": 4, "decoder": ["value_parallel"], "value_rank": 4, "value_residual": True}
    model = tiny(family)
    handle = patch(model, "vlpet", tasks=("vqa", "gqa"), sharing="multiple", **options)
    assert any(isinstance(part, PerTask) for site in handle.sites.values() if not isinstance(site, PerTask) for part in site.modules())
    randomize(handle)
    for task in ("vqa", "gqa"):
        handle.set_task(task)
        handle.save(tmp_path, task=task)
        again = tiny(family)
        load(again, tmp_path)
        assert torch.equal(logits(again), logits(model))
        handle.load(tmp_path, task=task)


@pytest.mark.parametrize(
    ("method", "options", "why"),
    [
        (
            "vlpet",
            {**SMALL["vlpet"], "decoder": ["value_parallel", "cross_attention"], "decoder_ranks": 3, "cross_gate_rank": 6, "sharing": "multiple"},
            r"adapters per task behind a gate of cross-attention \(cross_gate_rank\) are no adapters of one task",
        ),
        ("hyperformer", {"reduction_factor": 4, "encoder_prompt": 2, "prompt_mid": 4, "prompt_sharing": "multiple"}, "one network generates the adapters of all tasks"),
    ],
)
def test_no_file_of_one_task_where_its_modules_are_others(method: str, options: dict[str, Any], why: str, tmp_path: Path) -> None:
    handle = patch(tiny("bart"), method, tasks=("vqa", "gqa"), **options)
    with pytest.raises(ValueError, match=f"task: {why}"):
        handle.save(tmp_path / "vqa", task="vqa")
    assert not (tmp_path / "vqa").exists()
