"""Adapter files of PEFT and AdapterHub, to and from fastadapt's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import fastadapt
from fastadapt.interop import PublishedFileError, from_adapterhub, from_peft, to_adapterhub, to_peft
from fastadapt.patching import AdapterFileError, Handle
from tests.hosts import tiny
from tests.interop.same import assert_agree

TARGETS = {"bart": ["q_proj", "v_proj", "fc1", "out_proj"], "t5": ["q", "v", "wi", "wo"]}


def saved_by_peft(folder: Path, family: str, **options: Any) -> Tensor:
    """Files of a trained-looking LoRA, and the logits that it gives."""
    torch.manual_seed(3)
    model = get_peft_model(tiny.tiny(family), LoraConfig(**{"target_modules": TARGETS[family], "r": 4, "lora_alpha": 6, "init_lora_weights": False, **options})).eval()
    if options.get("bias") == "all":
        with torch.no_grad():
            for name, p in model.named_parameters():
                if "bias" in name:
                    p.add_(0.1)
    model.save_pretrained(folder)
    return tiny.logits(model)


@pytest.mark.parametrize("family", ["bart", "t5"])
@pytest.mark.parametrize("options", [{}, {"use_rslora": True, "lora_dropout": 0.1}, {"bias": "all"}], ids=["plain", "rslora", "biases"])
def test_from_peft_and_back(family: str, options: dict[str, Any], tmp_path: Path) -> None:
    want = saved_by_peft(tmp_path / "theirs", family, **options)
    model = tiny.tiny(family)
    handle = from_peft(model, tmp_path / "theirs")
    assert_agree(tiny.logits(model), want)
    handle.save(tmp_path / "ours")
    again = tiny.tiny(family)
    loaded = fastadapt.load(again, tmp_path / "ours")
    assert torch.equal(tiny.logits(again), tiny.logits(model))
    to_peft(loaded, tmp_path / "back")
    first, second = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("theirs", "back"))
    assert first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)
    base = tiny.tiny(family)
    assert_agree(tiny.logits(PeftModel.from_pretrained(base, str(tmp_path / "back")).eval()), want)


def test_a_tasks_lora_to_peft(tmp_path: Path) -> None:
    model = tiny.tiny("bart")
    handle = fastadapt.patch(model, "lora", tasks=["vqa", "gqa"], sharing="multiple", rank=3, visual_embedding=False)
    tiny.randomize(handle)
    with pytest.raises(ValueError, match="task: must be one of vqa, gqa, whose adapters differ, not None"):
        to_peft(handle, tmp_path)
    to_peft(handle, tmp_path, task="gqa")
    handle.set_task("gqa")
    assert_agree(tiny.logits(PeftModel.from_pretrained(tiny.tiny("bart"), str(tmp_path)).eval()), tiny.logits(model))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"peft_type": "IA3"}, "must be of peft_type 'LORA', not 'IA3'"),
        ({"use_dora": True}, "use_dora is True, which fastadapt's LoRA does not have"),
        ({"rank_pattern": {"q": 3}}, "rank_pattern is"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save is"),
        ({"bias": "lora_only"}, "bias is 'lora_only'; fastadapt trains all biases or none"),
        ({"r": 5}, r"lora_A.weight is \(4, 32\); the model has \(5, 32\)"),
        ({"bias": "all"}, "tensors are in the file or in the model only"),
    ],
)
def test_peft_files_that_do_not_fit_leave_the_model_as_it_was(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    saved_by_peft(tmp_path, "bart")
    config = tmp_path / "adapter_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), **change}))
    refused(tmp_path, message)


def refused(folder: Path, message: str, read: Any = from_peft, error: type[Exception] = AdapterFileError) -> None:
    model = tiny.tiny("bart")
    before = tiny.snapshot(model)
    with pytest.raises(error, match=message):
        read(model, folder)
    tiny.assert_same(before, tiny.snapshot(model))


def test_peft_files_that_are_broken(tmp_path: Path) -> None:
    refused(tmp_path, "must hold adapter_config.json and adapter_model.safetensors")
    saved_by_peft(tmp_path, "bart")
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    save_file({key: t for key, t in tensors.items() if "fc1.lora_B" not in key}, file)
    refused(tmp_path, "4 tensors are in the file or in the model only")
    save_file({key.replace("fc1", "fc9"): t for key, t in tensors.items()}, file)
    refused(tmp_path, "4 of its modules are not in this BartForConditionalGeneration: model.decoder.layers.0.fc9")
    save_file({"x": torch.zeros(1)}, file)
    refused(tmp_path, "holds no lora_A")


@pytest.mark.parametrize(
    ("method", "options", "message"), [("vl_adapter", {}, "Bottleneck adapters are none that PEFT has"), ("lora", {"layer_norms": "all"}, "layer_norm.weight of the base")]
)
def test_what_peft_has_no_place_for(method: str, options: dict[str, Any], message: str, tmp_path: Path) -> None:
    handle = fastadapt.patch(tiny.tiny("bart"), method, **options)
    tiny.randomize(handle)
    with pytest.raises(ValueError, match=message):
        to_peft(handle, tmp_path / "out")
    assert not (tmp_path / "out").exists()


# AdapterHub. Its own reading and writing is in test_adapterhub.py's environment.

COMMON = {"layer_norms": "none", "visual_embedding": False, "rank": 5}


def bottlenecks(family: str, **options: Any) -> tuple[nn.Module, Handle]:
    model = tiny.tiny(family)
    handle = fastadapt.patch(model, "vl_adapter", **{**COMMON, **options})
    tiny.randomize(handle)
    return model, handle


@pytest.mark.parametrize("family", ["bart", "t5"])
@pytest.mark.parametrize("options", [{}, {"cross_attention": False, "activation": "silu"}, {"self_attention": False}])
def test_to_adapterhub_and_back(family: str, options: dict[str, Any], tmp_path: Path) -> None:
    model, handle = bottlenecks(family, **options)
    to_adapterhub(handle, tmp_path, name="mine")
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert int(32 // config["config"]["reduction_factor"]) == 5 and config["name"] == "mine"
    keys = list(torch.load(tmp_path / "pytorch_adapter.bin", weights_only=True))
    assert len(keys) == 4 * len(handle.sites) and all("adapters.mine.adapter_" in key for key in keys)
    other = tiny.tiny(family)
    from_adapterhub(other, tmp_path).save(tmp_path / "ours")
    assert torch.equal(tiny.logits(other), tiny.logits(model))
    fresh = tiny.tiny(family)
    fastadapt.load(fresh, tmp_path / "ours")
    assert torch.equal(tiny.logits(fresh), tiny.logits(model))


def test_a_tasks_bottlenecks_to_adapterhub(tmp_path: Path) -> None:
    model, handle = bottlenecks("bart", sharing="multiple", tasks=["vqa", "gqa"])
    with pytest.raises(ValueError, match="task: must be one of vqa, gqa"):
        to_adapterhub(handle, tmp_path)
    to_adapterhub(handle, tmp_path, task="gqa")
    other = tiny.tiny("bart")
    from_adapterhub(other, tmp_path)
    handle.set_task("gqa")
    assert torch.equal(tiny.logits(other), tiny.logits(model))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"original_ln_before": True}, "original_ln_before is True; only adapters with original_ln_before=False"),
        ({"phm_layer": True}, "phm_layer is True"),
        ({"non_linearity": "tanh"}, "non_linearity 'tanh' has no place in fastadapt"),
        ({"cross_adapter": False}, "tensors are in the file or in the model only"),
    ],
)
def test_adapterhub_files_that_do_not_fit(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    _, handle = bottlenecks("bart")
    to_adapterhub(handle, tmp_path)
    path = tmp_path / "adapter_config.json"
    saved = json.loads(path.read_text())
    path.write_text(json.dumps({**saved, "config": {**saved["config"], **change}}))
    refused(tmp_path, message, from_adapterhub)
    path.write_text(json.dumps({**saved, "model_type": "bert"}))
    refused(tmp_path, "model_type 'bert' has no place in fastadapt; must be one of bart, t5", from_adapterhub)


def test_adapterhub_files_that_are_broken(tmp_path: Path) -> None:
    refused(tmp_path, "is no adapter config of AdapterHub", from_adapterhub)
    _, handle = bottlenecks("bart")
    to_adapterhub(handle, tmp_path)
    file = tmp_path / "pytorch_adapter.bin"
    tensors = torch.load(file, weights_only=True)
    torch.save({**tensors, next(iter(tensors)): torch.zeros(2, 2)}, file)
    refused(tmp_path, "adapter_down.0.weight is|tensors are in the file", from_adapterhub)
    torch.save({"x": torch.zeros(1)}, file)
    refused(tmp_path, "holds no bottleneck adapter", from_adapterhub)
    file.unlink()
    refused(tmp_path, "cannot be read as a state dict", from_adapterhub, PublishedFileError)


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        ("lora", {"biases": False}, "LoRA.* is no adapter of AdapterHub's Houlsby kind"),
        ("vl_adapter", {"layer_norm_before": True}, "Bottleneck.* is no adapter of AdapterHub's Houlsby kind"),
        ("vl_adapter", {"layer_norms": "all"}, "of the base, which AdapterHub's file has no place for"),
        ("vl_adapter", {"activation": "identity"}, "AdapterHub has no activation 'identity'"),
    ],
)
def test_what_adapterhub_has_no_place_for(method: str, options: dict[str, Any], message: str, tmp_path: Path) -> None:
    handle = fastadapt.patch(tiny.tiny("bart"), method, **{**COMMON, **options})
    with pytest.raises(ValueError, match=message):
        to_adapterhub(handle, tmp_path / "out")
    assert not (tmp_path / "out").exists()
