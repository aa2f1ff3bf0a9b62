"""State dicts of the original repositories: in, bit for bit out, and refused where they do not fit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from fastadapt.hosts.vlbart import VLBart, VLBartConfig
from fastadapt.interop import PublishedFileError, load_published, published_state_dict, read_state_dict
from fastadapt.patching import Handle, patch
from tests import golden
from tests.hosts.published import patched_model
from tests.hosts.published_blip import tiny_blip
from tests.hosts.published_vlpet import converted, load, options_of
from tests.hosts.published_vlpet import patched_block as patched_vlpet
from tests.hosts.test_golden import MODELS
from tests.hosts.test_golden_vlpet import CASES
from tests.hosts.tiny import assert_same, randomize, snapshot, tiny
from tests.methods.test_compacter_repo import MODELS as COMPACTER
from tests.methods.test_compacter_repo import recorded_model


@pytest.mark.parametrize("case_id", MODELS)
def test_recorded_layouts_round_trip(case_id: str) -> None:
    """Every recorded whole model: its state dict goes in (tests/hosts/test_golden.py compares what the model then gives) and comes out under the same keys, bit for bit."""
    case = golden.load_case(case_id)
    _, handle = patched_model(case, torch.float32)
    written = published_state_dict(handle)
    assert written.keys() == case.params.keys()
    assert all(torch.equal(written[key], tensor) for key, tensor in case.params.items())


@pytest.mark.parametrize("case_id", COMPACTER)
def test_layout_of_the_compacter_repository(case_id: str) -> None:
    case, (preset, options) = golden.load_case(case_id), COMPACTER[case_id]
    model, handle = recorded_model(case, torch.float32, preset, tasks=case.options.get("tasks"), **options)
    written = published_state_dict(handle, layout="compacter")
    assert written.keys() == case.params.keys()
    assert all(torch.equal(written[key], tensor) for key, tensor in case.params.items())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    load_published(handle, case.params, layout="compacter")
    assert all(torch.equal(tensor, case.params[key]) for key, tensor in published_state_dict(handle, layout="compacter").items())


def test_no_intrinsic_dimension() -> None:
    with pytest.raises(ValueError, match="intrinsic_dimension: the original's files do not hold the random projections"):
        published_state_dict(patch(tiny("t5"), "said", dimension=200, seed=0), layout="compacter")


KEYS: dict[str, tuple[str, dict[str, Any], dict[str, tuple[int, ...]]]] = {
    "multiple": (
        "vl_adapter",
        {"sharing": "multiple", "reduction_factor": 8, "layer_norm_before": True},
        {
            "model.encoder.layers.0.attn_adapter.adapters.gqa.down_sampler.weight": (4, 32),
            "model.decoder.layers.1.enc_attn_adapter.adapters.vqa.up_sampler.bias": (32,),
            "model.decoder.layers.1.self_attn_adapter.pre_layer_norm.weight": (32,),
        },
    ),
    "compacter": (
        "compacter",
        {"division": 4, "phm_rank": 1, "shared_rule": True, "reduction_factor": 4},
        {
            "phm_rule": (4, 4, 4),
            "model.encoder.layers.0.ff_adapter.adapters.vqa.down_sampler.W_left": (4, 8, 1),
            "model.encoder.layers.0.ff_adapter.adapters.gqa.up_sampler.W_right": (4, 1, 8),
            "model.decoder.layers.0.ff_adapter.adapters.vqa.up_sampler.phm_rule": (4, 4, 4),
            "model.decoder.layers.0.ff_adapter.adapters.vqa.up_sampler.b": (32,),
        },
    ),
    "low-rank": ("low_rank_adapter", {"reduction_factor": 4}, {"model.encoder.layers.0.ff_adapter.adapters.vqa.down_sampler.W_left": (32, 1)}),
    "lora": ("lora", {"rank": 4}, {"model.encoder.layers.0.self_attn.q_proj.lora_As.vqa": (4, 32), "model.decoder.layers.1.encoder_attn.v_proj.lora_Bs.gqa": (32, 4)}),
    "hyperformer": (
        "hyperformer",
        {"task_dim": 12, "hidden_dim": 10, "reduction_factor": 8},
        {
            "model.shared_task_embed.task_to_embeddings.vqa": (12,),
            "model.decoder.task_embed.task_to_embeddings.gqa": (12,),
            "model.encoder.adapter_layers_hyper_net.task_hypernet.task_embeding_generator.0.weight": (10, 24),
            "model.encoder.adapter_layers_hyper_net.feed_forward_up_sampler_hyper_net.weight_generator.0.weight": (128, 8),
            "model.decoder.adapter_layers_hyper_net.cross_attention_down_sampler_hyper_net.bias_generator.0.bias": (4,),
            "model.decoder.adapter_layers_hyper_net.LayerNorm.weight": (8,),
        },
    ),
    "prompts": (
        "prompt",
        {"encoder_prompt": 3, "decoder_prompt": 2, "prompt_mid": 5},
        {"model.encoder.prompt_modules.prompts.vqa.prefix_embedding.0.weight": (3, 32), "model.prompt_modules.prompts.gqa.prefix_embedding.3.weight": (32, 5)},
    ),
    **{
        f"vlpet {kind}": (
            "vlpet",
            {"granularity": kind, "rank": 8, "heads": 4, "value_rank": 5, **more},
            {
                "model.encoder.layers.0.attn_adapter_multihead_down.3.weight": (2, 32),
                "model.encoder.layers.1.ff_adapter_multihead_up.weight": (32, 8),
                "model.decoder.layers.0.encoder_attn.attn_value_parallel_adapter.adapters.vqa.down_sampler.weight": (5, 32),
                **keys,
            },
        )
        for kind, more, keys in (
            ("large", {"gate_rank": 6}, {"model.encoder.layers.0.encoder_attn_adapter_gating_large_x_down.weight": (6, 32)}),
            ("large_full", {}, {"model.encoder.layers.0.encoder_ff_adapter_gating_large_x.weight": (32, 32)}),
            ("small", {}, {"model.encoder.layers.0.encoder_attn_adapter_gating_small_xy_cat.weight": (1, 64)}),
            ("middleX", {}, {"model.encoder.layers.0.encoder_ff_adapter_gating_middle_xy_add.bias": (1,)}),
            ("middleY", {}, {"model.encoder.layers.0.encoder_attn_adapter_gating_middle_ia3_add": (32,)}),
        )
    },
    "vlpet pairs": (
        "vlpet",
        {"granularity": "middleY", "rank": 8, "heads": 4, "value_rank": 5, "pair": True},
        {"model.encoder.layers.0.attn_adapter_multihead_up.2.weight": (8, 2)},
    ),
}


def patched(name: str, seed: int = 0) -> Handle:
    method, options, _ = KEYS[name]
    model = tiny("bart", seed=seed)
    handle = patch(model, method, tasks=["vqa", "gqa"], **options)
    randomize(handle, seed=seed + 3)
    return handle


@pytest.mark.parametrize("name", KEYS)
def test_keys_shapes_and_round_trip(name: str) -> None:
    """The keys of methods.md, section 7.2, written by one model and read into another."""
    first, second = patched(name), patched(name, seed=1)
    written = published_state_dict(first)
    for key, shape in KEYS[name][2].items():
        assert tuple(written[key].shape) == shape, key
    assert not any("parallel_adapter." in key or "feed_forward_adapter" in key or "self_attention_adapter" in key for key in written if "value_parallel" not in key)
    load_published(second, written)
    mine, other = first.model.state_dict(), second.model.state_dict()
    assert mine.keys() == other.keys() and all(torch.equal(mine[key], other[key]) for key in mine)
    again = published_state_dict(second)
    assert again.keys() == written.keys() and all(torch.equal(again[key], written[key]) for key in written)


@pytest.mark.parametrize("name", KEYS)
def test_adapters_alone(name: str) -> None:
    """Without the base's frozen tensors, as a small file holds it."""
    first, second = patched(name), patched(name, seed=0)
    randomize(second, seed=9)
    written = published_state_dict(first, base=False)
    assert len(written) < len(published_state_dict(first))
    load_published(second, written)
    mine, other = first.model.state_dict(), second.model.state_dict()
    assert all(torch.equal(mine[key], other[key]) for key in mine)


ADAPTER = "model.encoder.layers.0.attn_adapter.adapters.{}.down_sampler.weight"
BAD: list[tuple[Callable[[dict[str, Tensor]], Any], str]] = [
    (lambda d: [d.pop(ADAPTER.format(t)) for t in ("vqa", "gqa")], r"1 tensors of the patched model are not there: model.encoder.layers.0.attn_adapter"),
    (lambda d: d[ADAPTER.format("gqa")].add_(1.0), "are one tensor in the original, but differ here"),
    (lambda d: d.update({ADAPTER.format(t): torch.zeros(3, 32) for t in ("vqa", "gqa")}), r"is \(3, 32\); the patched model has \(8, 32\)"),
    *(
        (lambda d, change=change: d.update({list(d)[-1]: change(d[list(d)[-1]])}), "must be a dense tensor of real numbers, not ")
        for change in (lambda t: t.to("meta"), lambda t: t.to_sparse(), lambda t: t.to(torch.complex64), lambda t: t.numpy(), lambda t: 5)
    ),
    (lambda d: d.update(stray=torch.zeros(1)), "1 tensors have no place in the patched model: stray"),
    (lambda d: d.pop("model.decoder.layers.0.fc1.weight"), "1 tensors of the base are not there, though others are: model.decoder.layers.0.fc1.weight"),
]


@pytest.mark.parametrize(("edit", "message"), BAD)
def test_refused(edit: Callable[[dict[str, Tensor]], Any], message: str) -> None:
    model = tiny("bart")
    handle = patch(model, "vl_adapter", tasks=["vqa", "gqa"], reduction_factor=4)
    tensors = {key: tensor + 0.5 for key, tensor in published_state_dict(handle).items()}
    edit(tensors)
    before = snapshot(model)
    with pytest.raises(PublishedFileError, match=message):
        load_published(handle, tensors)
    assert_same(before, snapshot(model))


def test_one_alias_is_enough() -> None:
    handle = patched("compacter")
    written = published_state_dict(handle)
    few = {key: tensor for key, tensor in written.items() if ".gqa." not in key and not key.endswith("phm_rule")} | {"phm_rule": written["phm_rule"]}
    other = patched("compacter", seed=1)
    load_published(other, few)
    assert all(torch.equal(a, b) for a, b in zip(handle.model.state_dict().values(), other.model.state_dict().values(), strict=True))


def test_the_token_table_under_its_visual_name() -> None:
    sizes = {f"{side}_{name}": value for side in ("encoder", "decoder") for name, value in (("layers", 1), ("attention_heads", 4), ("ffn_dim", 32))}
    model = VLBart(VLBartConfig(vocab_size=50, d_model=16, **sizes, feat_dim=8, max_position_embeddings=16))
    written = published_state_dict(patch(model, "vl_adapter", tasks=["vqa"], reduction_factor=4))
    assert torch.equal(written["model.encoder.visual_embedding.obj_order_embedding.weight"], model.model.shared.weight)


def test_what_the_originals_do_not_have() -> None:
    with pytest.raises(ValueError, match=r"tasks: the original has keys per task; patch the model with tasks=\[...\]"):
        published_state_dict(patch(tiny("bart"), "vl_adapter"))
    with pytest.raises(ValueError, match="layout: must be one of vl, compacter, not 'peft'"):
        published_state_dict(patched("lora"), layout="peft")
    for call in (published_state_dict, lambda handle, **options: load_published(handle, {}, **options)):
        with pytest.raises(ValueError, match="momentum: must be False; checkpoints of lora have no momentum copies, only UniAdapter's have"):
            call(patched("lora"), momentum=True)
    with pytest.raises(ValueError, match=r"encoder.0.self_attention: a StreamBottleneck is in none of the original repositories"):
        published_state_dict(patch(tiny("bart"), "vl_adapter", tasks=["vqa"], reads="sum"))


class Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return (print, ("run",))


def test_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tensors = {"a.weight": torch.randn(2, 3)}
    torch.save(tensors, tmp_path / "plain.pth")
    torch.save({"model": {f"module.{k}": t for k, t in tensors.items()}, "epoch": 3}, tmp_path / "nested.pth")
    save_file(tensors, tmp_path / "file.safetensors")
    for name in ("plain.pth", "nested.pth", "file.safetensors"):
        assert torch.equal(read_state_dict(tmp_path / name)["a.weight"], tensors["a.weight"])
    torch.save({"a": Evil()}, tmp_path / "evil.pth")
    torch.save(nn.Linear(2, 2), tmp_path / "module.pth")
    for name in ("evil.pth", "module.pth"):
        with pytest.raises(PublishedFileError, match="holds more than tensors, and is not unpickled since that could run code"):
            read_state_dict(tmp_path / name)
    torch.save([1, 2], tmp_path / "list.pth")
    with pytest.raises(PublishedFileError, match="holds no state dict"):
        read_state_dict(tmp_path / "list.pth")
    (tmp_path / "junk.pth").write_bytes(b"junk")
    for name in ("junk.pth", "absent.pth"):
        with pytest.raises(PublishedFileError, match=name):
            read_state_dict(tmp_path / name)
    assert "run" not in capsys.readouterr().out


def uni_adapter(kind: str, seed: int) -> Handle:
    model = tiny_blip(kind, seed=seed)
    handle = patch(model, "uniadapter", rank=8, key_value_rank=4)
    randomize(handle, seed=seed + 5)
    return handle


@pytest.mark.parametrize("kind", ["retrieval", "vqa"])
def test_uni_adapter(kind: str) -> None:
    """methods.md, section 4.11: lists, blocks and layers are aliases; base, momentum copies and the unused list of the decoder are passed over."""
    first, second = uni_adapter(kind, 0), uni_adapter(kind, 1)
    written = published_state_dict(first, base=False)
    for name in ("down_proj.weight", "up_proj.bias", "multi_up_proj.weight", "visual_up_proj.bias", "adapter_layer_norm_before.weight", "adapter_layer_norm_cross_modal.bias"):
        aliases = ["adapters.1", "visual_encoder.adapters.1", "visual_encoder.blocks.1.adapter", "text_encoder.encoder.layer.1.adapter"]
        aliases += ["text_decoder.bert.encoder.layer.1.adapter"] if kind == "vqa" else []
        assert all(written[f"{alias}.{name}"] is written[f"adapters.1.{name}"] for alias in aliases)
    assert written["text_encoder.encoder.video_key_adapter.down_proj.weight"].shape[0] == 4
    assert ("vision_proj.weight" in written) == (kind == "retrieval") and ("text_decoder.bert.encoder.video_value_adapter.up_proj.bias" in written) == (kind == "vqa")
    more = {"visual_encoder.blocks.0.attn.qkv.weight": torch.zeros(2), "adapters_dec.0.down_proj.weight": torch.zeros(2), "image_queue": torch.zeros(2)}
    momentum = published_state_dict(uni_adapter(kind, 2), base=False, momentum=True)
    assert "visual_encoder_m.blocks.1.adapter.down_proj.weight" in momentum and not momentum.keys() & written.keys()
    load_published(second, {**written, **momentum, **more})
    assert all(torch.equal(t, written[key]) for key, t in published_state_dict(second, base=False).items())
    load_published(second, {**written, **momentum, **more}, momentum=True)
    assert all(torch.equal(t, momentum[key]) for key, t in published_state_dict(second, base=False, momentum=True).items())
    with pytest.raises(PublishedFileError, match=r"tensors of the patched model are not there: "):
        load_published(first, {key: t for key, t in written.items() if "video_key" not in key})
    with pytest.raises(ValueError, match="base: must be False"):
        published_state_dict(first)


@pytest.mark.parametrize("case_id", CASES)
def test_variants_of_vlpet(case_id: str) -> None:
    """Every recorded site, value path and layer: what the original calls its tensors, heads apart, is what is written, and reading puts it where the recorded outputs come from."""
    case = golden.load_case(case_id)
    options = options_of(case)
    if "multihead_up_no" in case_id or "multihead_down_up" in case_id:
        pytest.skip("heads of the up-projection: the published runs and this format have heads below only; tests/hosts/test_golden_vlpet.py reads these tensors")
    tasks = sorted({key.split(".adapters.")[1].split(".")[0] for key in case.params if ".adapters." in key}) or ["vqa"]
    alias = {task: {key.replace(f".{task}.", "."): t for key, t in case.params.items() if f".adapters.{task}." in key} for task in tasks}
    if any(not torch.equal(tensor, alias[tasks[0]][key]) for one in alias.values() for key, tensor in one.items()):
        options["sharing"] = "multiple"
    blocks = []
    for _ in range(2):
        block, handle = patched_vlpet(case, torch.float32)
        handle.unpatch()
        blocks.append((block, patch(block, "vlpet", layer_norms="none", tasks=tasks, **options)))
    (block, handle), (_, fresh) = blocks
    if "sharing" in options:
        prefix = "encoder_attn." if case_id.startswith("vlpet_bart_value_") else ""
        load_published(handle, {prefix + key: t for key, t in case.params.items() if prefix + key not in block.state_dict()})
    else:
        load(handle, block, converted(case.params, handle, tasks[0]), None if "_site_" in case_id else "encoder_attn." if case_id.startswith("vlpet_bart_value_") else "")
    written = published_state_dict(handle, base=False)
    inner = "encoder_attn." if case_id.startswith("vlpet_bart_value_") else ""
    recorded = {f"{inner}{key}": tensor for key, tensor in case.params.items()}
    if "_site_" in case_id:
        site = "feed_forward" if "_ff_" in case_id else "self_attention"
        prefix = {"feed_forward": "layer.1.", "self_attention": "layer.0."}[site] if "_t5_" in case_id else ""
        recorded = {f"{prefix}{key}": tensor for key, tensor in case.params.items()}
        other = "attn" if site == "feed_forward" else "ff"
        written_here = {key: t for key, t in written.items() if f"{other}_adapter" not in key and f"encoder_{other}_" not in key}
        assert written_here.keys() == recorded.keys()
    else:
        state = block.state_dict()
        assert written.keys() == {key for key in recorded if key not in state}
    assert all(torch.equal(tensor, recorded[key]) for key, tensor in written.items() if key in recorded)
    load_published(fresh, written)
    for name, module in handle.sites.items():
        ours = fresh.sites[name].state_dict()
        assert all(torch.equal(tensor, ours[key]) for key, tensor in module.state_dict().items())
