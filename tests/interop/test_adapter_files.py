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
from transformers import BartConfig, BartForCausalLM

import fastadapt
from fastadapt.interop import PublishedFileError, from_adapterhub, from_peft, load_published, published_state_dict, to_adapterhub, to_peft
from fastadapt.patching import AdapterFileError, Handle
from tests.hosts import tiny
from tests.hosts_models import models
from tests.interop.same import HUB_KINDS, assert_agree, hub_kind

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
    dropout = options.get("lora_dropout", 0.0)
    assert {site.dropout for site in handle.sites.values()} == {dropout}
    handle.save(tmp_path / "ours")
    again = tiny.tiny(family)
    loaded = fastadapt.load(again, tmp_path / "ours")
    assert torch.equal(tiny.logits(again), tiny.logits(model))
    to_peft(loaded, tmp_path / "back")
    assert json.loads((tmp_path / "back/adapter_config.json").read_text())["lora_dropout"] == dropout
    first, second = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("theirs", "back"))
    assert first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)
    base = tiny.tiny(family)
    assert_agree(tiny.logits(PeftModel.from_pretrained(base, str(tmp_path / "back")).eval()), want)


def test_a_file_for_peft_names_its_base(tmp_path: Path) -> None:
    model: Any = tiny.tiny("bart")
    model.config.name_or_path = "facebook/bart-base"
    to_peft(fastadapt.patch(model, "lora", rank=4, visual_embedding=False), tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["base_model_name_or_path"] == "facebook/bart-base"


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
        *(({"init_lora_weights": init}, f"init_lora_weights is '{init}', which may have changed the base's weights") for init in ("pissa", "pissa_niter_2", "olora", "loftq")),
        ({"r": None}, "r must be a number, not None"),
        ({"lora_alpha": "8"}, "lora_alpha must be a number, not '8'"),
        ({"bias": "lora_only"}, "bias is 'lora_only'; fastadapt trains all biases or none"),
        ({"r": 5}, r"lora_A.weight is \(4, 32\); the model has \(5, 32\)"),
        ({"bias": "all"}, "bias is 'all', but 44 of the model's biases are not in it: .*; fastadapt trains all biases or none"),
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


def test_a_tied_bias_of_which_one_place_is_gone(tmp_path: Path) -> None:
    model = models.tiny("blip")
    handle = fastadapt.patch(model, "lora", rank=2, biases=True)
    head = model.text_decoder.cls.predictions
    head.decoder = nn.Linear(head.decoder.in_features, head.decoder.out_features, bias=False)
    to_peft(handle, tmp_path)
    assert torch.equal(load_file(tmp_path / "adapter_model.safetensors")["base_model.model.text_decoder.cls.predictions.bias"], head.bias)


def causal(kind: str) -> Any:
    if kind != "bart_alone":
        return models.tiny(kind)
    torch.manual_seed(0)
    return BartForCausalLM(BartConfig(vocab_size=99, d_model=32, decoder_layers=2, decoder_attention_heads=4, decoder_ffn_dim=64, max_position_embeddings=64)).eval()


def logits(kind: str, model: nn.Module) -> Tensor:
    return models.output(model, models.text_batch() if kind == "bart_alone" else models.KINDS[kind].batch())


@pytest.mark.parametrize("bias", ["none", "all"])
@pytest.mark.parametrize(("kind", "targets"), [("blip", ["query", "value"]), ("siglip", ["q_proj"]), ("llava", ["q_proj", "v_proj"]), ("bart_alone", ["q_proj", "fc2"])])
def test_pefts_files_of_tied_biases_and_of_parts_that_never_run(kind: str, targets: list[str], bias: Any, tmp_path: Path) -> None:
    """BLIP's output bias has two names in a file; LLaVA's last vision layer changes nothing, nor does the cross-attention of a BART decoder by itself, which goes round."""
    torch.manual_seed(3)
    theirs = get_peft_model(causal(kind), LoraConfig(target_modules=targets, r=4, bias=bias, init_lora_weights=False)).eval()
    with torch.no_grad():
        for name, p in theirs.named_parameters():
            if bias == "all" and name.endswith(".bias"):
                p.add_(0.1)
    theirs.save_pretrained(tmp_path / "theirs")
    want, model = logits(kind, theirs), causal(kind)
    handle = from_peft(model, tmp_path / "theirs")
    assert_agree(logits(kind, model), want)
    to_peft(handle, tmp_path / "back")
    first, second = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("theirs", "back"))
    assert all(torch.equal(first[key], t) for key, t in second.items()) and (kind == "llava") == (len(second) < len(first))
    assert_agree(logits(kind, PeftModel.from_pretrained(causal(kind), str(tmp_path / "back")).eval()), want)


def test_a_tied_bias_under_one_name_and_with_two_values(tmp_path: Path) -> None:
    get_peft_model(causal("blip"), LoraConfig(target_modules=["query"], r=4, bias="all")).save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    key = "base_model.model.text_decoder.cls.predictions.decoder.bias"
    for only in (key, key.replace("decoder.bias", "bias")):
        save_file({name: t for name, t in tensors.items() if not name.startswith(key.removesuffix("decoder.bias")) or "transform" in name or name == only}, file)
        from_peft(causal("blip"), tmp_path).unpatch(restore_base=True)
    save_file({**tensors, key: tensors[key] + 1}, file)
    model = causal("blip")
    before = tiny.snapshot(model)
    with pytest.raises(AdapterFileError, match=r"predictions\.bias and .*predictions\.decoder\.bias differ, but are one tensor of the model"):
        from_peft(model, tmp_path)
    tiny.assert_same(before, tiny.snapshot(model))


def test_a_file_with_the_biases_of_one_tower(tmp_path: Path) -> None:
    """The error names the biases and the remedy, which works."""
    model = causal("llava")
    handle = fastadapt.patch(model, "lora", rank=4, towers=["vision"], biases=True, layer_norms="none")
    tiny.randomize(handle, std=0.05)
    to_peft(handle, tmp_path)
    other = causal("llava")
    before = tiny.snapshot(other)
    message = r"bias is 'all', but 2 of the model's biases are not in it: \S+linear_1.bias, \S+linear_2.bias; fastadapt trains all biases or none.*PeftModel.from_pretrained"
    with pytest.raises(AdapterFileError, match=message):
        from_peft(other, tmp_path)
    tiny.assert_same(before, tiny.snapshot(other))
    PeftModel.from_pretrained(causal("llava"), str(tmp_path)).save_pretrained(tmp_path / "whole")
    from_peft(other, tmp_path / "whole")
    assert_agree(logits("llava", other), logits("llava", model))


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


# What the library itself writes into adapter_config.json, where it is not the same for all.
SAYS: dict[str, dict[str, Any]] = {
    "double_seq_bn": {"original_ln_before": False, "mh_adapter": True, "non_linearity": "silu"},
    "seq_bn": {"original_ln_before": True, "mh_adapter": False, "scaling": 1.0, "is_parallel": False, "non_linearity": "relu"},
    "par_bn": {"is_parallel": True, "original_ln_before": False, "mh_adapter": False, "scaling": 4.0, "reduction_factor": 2},
    "compacter": {"original_ln_before": False, "mh_adapter": True, "phm_layer": True, "phm_dim": 4, "phm_rank": 1, "factorized_phm_W": True, "reduction_factor": 4},
    "compacter++": {"original_ln_before": True, "mh_adapter": False, "phm_layer": True, "phm_dim": 4, "factorized_phm_rule": False},
    "compacter_full_w": {"factorized_phm_W": False, "factorized_phm_rule": True, "shared_phm_rule": False},
    "compacter_shared_w": {"original_ln_before": False, "phm_layer": True},
}


@pytest.mark.parametrize("family", ["bart", "t5"])
@pytest.mark.parametrize("kind", HUB_KINDS)
def test_adapterhubs_kinds_and_back(kind: str, family: str, tmp_path: Path) -> None:
    method, options = hub_kind(kind, family)
    model = tiny.tiny(family)
    before = tiny.logits(model)
    handle = fastadapt.patch(model, method, **options)
    tiny.randomize(handle)
    assert not torch.allclose(tiny.logits(model), before, atol=1e-3)
    to_adapterhub(handle, tmp_path, name="mine")
    config = json.loads((tmp_path / "adapter_config.json").read_text())["config"]
    assert {key: config[key] for key in SAYS[kind]} == SAYS[kind]
    keys = torch.load(tmp_path / "pytorch_adapter.bin", weights_only=True).keys()
    shared = {"phm_rule"} if options.get("shared_rule") else set()
    shared |= {f"W_{way}_{side}" for way in ("down", "up") for side in ("left", "right")} if options.get("shared_weight") else set()
    assert {key for key in keys if "shared" in key} == {f"model.shared_parameters.mine.{leaf}" for leaf in shared}
    assert (config["shared_phm_rule"], config["shared_W_phm"]) == ("phm_rule" in shared, len(shared) > 1)
    other = tiny.tiny(family)
    read = from_adapterhub(other, tmp_path)
    assert torch.equal(tiny.logits(other), tiny.logits(model))
    assert read.config.method == method and read.parameter_counts() == handle.parameter_counts()
    read.save(tmp_path / "ours")
    fresh = tiny.tiny(family)
    fastadapt.load(fresh, tmp_path / "ours")
    assert torch.equal(tiny.logits(fresh), tiny.logits(model))
    to_adapterhub(read, tmp_path / "again", name="mine")
    assert (tmp_path / "again/adapter_config.json").read_text() == (tmp_path / "adapter_config.json").read_text()


@pytest.mark.parametrize("options", [{"layers": [1]}, {"decoder": False}, {"sites": {"encoder.feed_forward": r".*encoder\.layers\.0\.fc2"}}], ids=["layers", "encoder", "one"])
def test_adapters_of_some_layers_are_in_no_file_of_adapterhub(options: dict[str, Any], tmp_path: Path) -> None:
    handle = fastadapt.patch(tiny.tiny("bart"), "vl_adapter", rank=4, layer_norms="none", visual_embedding=False, **options)
    with pytest.raises(ValueError, match=r"adapters at every layer of encoder and decoder; this patch has none at (en|de)coder\."):
        to_adapterhub(handle, tmp_path)
    assert not list(tmp_path.iterdir())


def test_what_adapters_of_a_t5_share_is_in_no_file_of_adapterhub(tmp_path: Path) -> None:
    _, options = hub_kind("compacter", "t5")
    handle = fastadapt.patch(tiny.tiny("t5"), "compacter", **options, shared_rule=True)
    with pytest.raises(ValueError, match="handle: AdapterHub leaves the tensors that a T5's Compacter adapters share out of its files; patch with shared_rule=False"):
        to_adapterhub(handle, tmp_path)
    assert not list(tmp_path.iterdir())
    to_adapterhub(fastadapt.patch(tiny.tiny("t5"), "compacter", **options), tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(path.read_text().replace('"shared_phm_rule": false', '"shared_phm_rule": true'))
    file = tmp_path / "pytorch_adapter.bin"
    torch.save({key: t for key, t in torch.load(file, weights_only=True).items() if "phm_rule" not in key}, file)
    model = tiny.tiny("t5")
    before = tiny.snapshot(model)
    with pytest.raises(AdapterFileError, match=r"shared_parameters\.default\.phm_rule are not there: AdapterHub leaves the tensors that a T5's"):
        from_adapterhub(model, tmp_path)
    tiny.assert_same(before, tiny.snapshot(model))


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
        ({"original_ln_after": False}, "original_ln_after is False; only adapters with original_ln_after=True"),
        ({"original_ln_before": True, "residual_before_ln": "post_add"}, "residual_before_ln is 'post_add'; only adapters with residual_before_ln=True"),
        ({"reduction_factor": {"1": 8, "default": 16}}, "reduction_factor is {'1': 8, 'default': 16}, one per layer; only adapters of one rank"),
        ({"scaling": "learned"}, "scaling is 'learned'; only adapters with a number as scale"),
        ({"phm_bias": False}, "phm_bias is False"),
        ({"phm_layer": True, "phm_dim": 1}, "tensors are in the file or in the model only"),
        ({"non_linearity": "tanh"}, "non_linearity 'tanh' has no place in fastadapt"),
        ({"cross_adapter": False}, "tensors are in the file or in the model only"),
        ({"output_adapter": None}, "output_adapter must be true or false, not None"),
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
        ("lora", {"biases": False}, "LoRA.* is no bottleneck of AdapterHub's"),
        ("lora", {"biases": True}, "LoRA.* is no bottleneck of AdapterHub's"),
        ("vl_adapter", {"biases": True}, r"trains .*bias of the base, which AdapterHub's file has no place for; patch with biases=False$"),
        ("vl_adapter", {"layer_norm_before": True}, "Bottleneck.* is no bottleneck of AdapterHub's"),
        ("vl_adapter", {"layer_norms": "all"}, "of the base, which AdapterHub's file has no place for; patch with layer_norms='none'$"),
        ("vl_adapter", {"activation": "identity"}, "AdapterHub has no activation 'identity'"),
        ("low_rank_adapter", {}, "Bottleneck.* is no bottleneck of AdapterHub's"),
        ("vlpet", {"granularity": "none", "adapter_scale": (0.5, 2.0), "decoder": ["multihead"], "heads": 1}, "its adapters differ in more than their tensors"),
    ],
)
def test_what_adapterhub_has_no_place_for(method: str, options: dict[str, Any], message: str, tmp_path: Path) -> None:
    handle = fastadapt.patch(tiny.tiny("bart"), method, **{**COMMON, **options})
    with pytest.raises(ValueError, match=message):
        to_adapterhub(handle, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("read", [from_peft, from_adapterhub])
def test_what_is_no_model(read: Any, tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=r"model: must be an nn.Module, not NoneType"):
        read(None, tmp_path)


@pytest.mark.parametrize("write", [to_peft, to_adapterhub, load_published, lambda handle, _: published_state_dict(handle)])
def test_what_is_no_handle(write: Any, tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=r"handle: must be the fastadapt.Handle that fastadapt.patch returns, not BartForConditionalGeneration"):
        write(tiny.tiny("bart"), tmp_path / "out")
    assert not (tmp_path / "out").exists()
