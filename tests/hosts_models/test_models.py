"""What holds for every supported model: patch, train, save and load, generate, checkpoint, compile, take out; with every method that is not one host's own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastadapt import patching
from fastadapt.nn import LoRA, PerTask
from fastadapt.patching import Handle, patch
from tests.hosts.tiny import assert_same, randomize, snapshot
from tests.hosts_models.models import IMAGE, KINDS, ids, output, tiny

pytestmark = pytest.mark.filterwarnings("ignore:.*None of the inputs have requires_grad", "ignore:`gradient_checkpointing_enable`:FutureWarning")
kinds = pytest.mark.parametrize("kind", KINDS)
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "vl_adapter": ("vl_adapter", {"reduction_factor": 4}),
    "vlpet": ("vlpet", {"rank": 8, "heads": 4, "gate_rank": 6}),
    "lora": ("lora", {"rank": 4}),
    "compacter": ("compacter", {"reduction_factor": 4, "phm_rank": 1}),
    "low_rank": ("low_rank_adapter", {"reduction_factor": 4}),
    "multiple": ("vl_adapter", {"reduction_factor": 4, "sharing": "multiple"}),
}
methods = pytest.mark.parametrize("method", METHODS)
# What VL-PET cannot do everywhere: an adapter beside the rectangular value projection of Mllama's cross-attention, gates in Idefics2's resampler, which no host is registered for.
OPTIONS: dict[str, dict[str, Any]] = {"mllama": {"decoder": ()}, "idefics2": {"towers": ["text", "vision"]}}


def put(model: nn.Module, kind: str, method: str, **options: Any) -> Handle:
    name, own = METHODS[method]
    more = OPTIONS.get(kind, {}) if method == "vlpet" else {}
    handle = patch(model, name, tasks=["vqa", "gqa"], **{**own, **more, **options})
    handle.set_task("vqa")
    return handle


def frozen(kind: str, **config: Any) -> nn.Module:
    """The stock model with nothing to train: torch chooses other attention kernels for a trained one, whose last digits differ."""
    return tiny(kind, **config).requires_grad_(False)


def gradients(run: Any, handle: Handle, kind: str, text: bool = False) -> list[Tensor]:
    """Of all that is trained; without the images, if ``text``."""
    inputs = {name: t for name, t in KINDS[kind].batch().items() if not (text and name in IMAGE_INPUTS)}
    if text:
        inputs["input_ids"] = ids(inputs["input_ids"].shape[1])
    run(**inputs, **({"use_cache": False} if KINDS[kind].generates else {})).loss.backward()
    grads = [p.grad for p in handle.trainable_parameters()]
    for p in handle.trainable_parameters():
        p.grad = None
    assert all(g is not None for g in grads)
    return grads


@kinds
@methods
def test_trains_saves_and_comes_out(kind: str, method: str, tmp_path: Path) -> None:
    model, inputs = frozen(kind), KINDS[kind].batch()
    out = output(model, inputs)  # first: some stock models install what records their hidden states in their first forward
    before = snapshot(model)
    handle = put(model, kind, method, init="identity")
    assert torch.equal(output(model, inputs), out), "started at the base's output"
    if method == "vl_adapter":
        names = tuple(dict.fromkeys(name.partition(".")[0].partition("@")[0] for name in handle.sites))
        assert (len(handle.sites), names) == (KINDS[kind].sites, KINDS[kind].stacks)
    randomize(handle, std=0.05)
    optimizer = torch.optim.SGD(handle.trainable_parameters(), lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        loss = model(**inputs).loss
        loss.backward()
        optimizer.step()
    for name, site in handle.sites.items():
        live = site.adapters["vqa"] if isinstance(site, PerTask) else site  # type: ignore[index]
        assert all(p.grad is not None and p.grad.any() for p in live.parameters()), name
    assert all(t.parameter.grad is not None for t in handle._trained), "nothing is trained in vain"
    handle.save(tmp_path)
    fresh = frozen(kind)
    loaded = patching.load(fresh, tmp_path)
    loaded.set_task("vqa")
    trained = output(model, inputs)
    assert torch.equal(output(fresh, inputs), trained) and not torch.equal(trained, out)
    with handle.disabled():
        assert torch.equal(output(model, inputs), out)
    handle.unpatch(restore_base=True)
    assert_same(before, snapshot(model))


@pytest.mark.parametrize("kind", [name for name, kind in KINDS.items() if kind.generates])
def test_generates_with_a_cache(kind: str) -> None:
    # A head of its own and no repeats: a random model says one token for ever.
    model = tiny(kind, tie_word_embeddings=False)
    handle = put(model, kind, "vlpet")
    randomize(handle, std=0.1)
    inputs = {name: t for name, t in KINDS[kind].batch().items() if name not in ("labels", "mm_token_type_ids")}
    options: dict[str, Any] = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "num_beams": 2, "suppress_tokens": [IMAGE, 94, 95, 96]}
    made = [model.generate(**inputs, **options, use_cache=cache) for cache in (True, False)]  # type: ignore[operator]
    assert torch.equal(*made)
    with handle.disabled():
        assert made[0].shape == model.generate(**inputs, **options).shape  # type: ignore[operator]


@pytest.mark.parametrize("kind", KINDS)
def test_gradient_checkpointing(kind: str) -> None:
    model = tiny(kind).train()
    handle = put(model, kind, "vlpet")
    randomize(handle, std=0.05)
    plain = gradients(model, handle, kind)
    getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)({"use_reentrant": False})
    calls: list[int] = []
    # Florence-2's and Mllama's vision towers do not checkpoint; the last stack does everywhere.
    list(handle.sites.values())[-1].register_forward_pre_hook(lambda *_: calls.append(1))
    again = gradients(model, handle, kind)
    assert len(calls) == 2, "the layer was not recomputed"
    for a, b in zip(plain, again, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


# Stock models that are no one graph with images, since they read numbers off tensors or unpack nested image lists; their texts are.
NO_GRAPH = ("llava_next", "qwen2_vl", "qwen2_5_vl", "qwen3_vl")
IMAGE_INPUTS = ("pixel_values", "image_sizes", "image_grid_thw", "mm_token_type_ids")


@pytest.mark.parametrize("kind", [pytest.param(kind, marks=[] if kind == "llama" else pytest.mark.full) for kind in KINDS])
def test_compiled(kind: str) -> None:
    """One graph, and the same numbers."""
    text = kind in NO_GRAPH
    model = tiny(kind)
    handle = put(model, kind, "vlpet", **({"towers": ["text"]} if text else {}))
    randomize(handle, std=0.05)
    plain = gradients(model, handle, kind, text)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager", dynamic=False)
    for a, b in zip(plain, gradients(compiled, handle, kind, text), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.full
@pytest.mark.parametrize("kind", NO_GRAPH)
def test_the_stock_model_is_no_one_graph(kind: str) -> None:
    model = frozen(kind)
    output(model, KINDS[kind].batch())
    torch._dynamo.reset()
    with pytest.raises(Exception, match=r"(?i)unsupported|data.dependent|guard|symbol"):
        torch.compile(model, fullgraph=True, backend="eager", dynamic=False)(**KINDS[kind].batch())


VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "prompts": ("prompt", {"encoder_prompt": 3, "decoder_prompt": 2, "prompt_mid": None}),
    "hyperformer": ("hyperformer", {"task_dim": 12, "hidden_dim": 10, "reduction_factor": 4}),
    "vl-pet, ungated": ("vlpet", {"granularity": "none", "decoder": ["key_value", "multihead"], "rank": 8, "heads": 4, "value_rank": 5}),
    "vl-pet, vectors": ("vlpet", {"granularity": "middleY", "decoder": ["value_ia3", "feed_forward_ia3"], "rank": 8}),
}


@pytest.mark.parametrize("kind", ["mbart", "mt5"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_what_bart_and_t5_have(kind: str, variant: str, tmp_path: Path) -> None:
    """Places and stages of encoder-decoder models that other hosts lack."""
    method, options = VARIANTS[variant]
    model, inputs = tiny(kind), KINDS[kind].batch()
    handle = patch(model, method, tasks=["vqa"], **options)
    handle.set_task("vqa")
    randomize(handle, std=0.1)
    model(**inputs).loss.backward()
    assert all(p.grad is not None and p.grad.any() for p in handle.trainable_parameters())
    del inputs["labels"]
    generated = [model.generate(**inputs, max_new_tokens=6, num_beams=2, do_sample=False, use_cache=cache) for cache in (True, False)]  # type: ignore[operator]
    assert torch.equal(*generated)
    handle.save(tmp_path)
    fresh = tiny(kind)
    patching.load(fresh, tmp_path).set_task("vqa")
    assert torch.equal(output(fresh, KINDS[kind].batch()), output(model, KINDS[kind].batch()))
    handle.unpatch(restore_base=True)


@pytest.mark.parametrize("kind", ["llama", "gemma2", "mt5", "clip"])
def test_new_biases(kind: str) -> None:
    model, inputs = frozen(kind), KINDS[kind].batch()
    before, out = snapshot(model), output(model, inputs)
    handle = patch(model, "bitfit_t5", visual_embedding=False)
    assert torch.equal(output(model, inputs), out)
    model(**inputs).loss.backward()
    assert all(t.parameter.grad is not None for t in handle._trained) and any("norm" in t.id for t in handle._trained) == (kind != "clip")
    handle.unpatch(restore_base=True)
    assert_same(before, snapshot(model))


@kinds
def test_training_drops_what_the_stock_model_drops(kind: str) -> None:
    """With one seed, the same elements and paths."""
    model, inputs = frozen(kind), KINDS[kind].batch()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.3
        for name in ("dropout", "activation_dropout"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.3)
        for name in ("drop_path1", "drop_path2"):
            if hasattr(module, name):
                setattr(module, name, nn.Dropout(0.3))
    model.train()
    torch.manual_seed(3)
    want = output(model, inputs)
    put(model, kind, "vl_adapter", init="identity", fuse_residual=False)
    torch.manual_seed(3)
    assert torch.equal(output(model, inputs), want)


def test_fp16_clamp_of_mbarts_encoder_is_the_stocks() -> None:
    """An overflow is clamped to fp16's largest number less 1000."""
    x = (1e3 + 1e3 * torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(3))).half()
    stock, ours = (tiny("mbart").model.encoder.layers[0].half() for _ in range(2))
    patch(ours, "vl_adapter", init="identity", reduction_factor=4)
    for layer in (stock, ours):
        layer.fc2.bias.data.copy_(torch.tensor([-65000.0, 65000.0]).repeat(16))
    with torch.no_grad():
        want, got = stock(x, None), ours(x, None)
    assert torch.equal(got, want) and (want.abs() == torch.finfo(torch.float16).max - 1000).any()


def test_rows_that_see_no_image() -> None:
    model, inputs = frozen("mllama"), KINDS["mllama"].batch()
    seeing = output(model, inputs)
    inputs["cross_attention_mask"][:, :3] = 0
    want = output(model, inputs)
    assert not torch.equal(want, seeing)
    put(model, "mllama", "vl_adapter", init="identity")
    assert torch.equal(output(model, inputs), want)


@kinds
def test_projections_get_their_own_widths(kind: str) -> None:
    handle = put(tiny(kind), kind, "lora")
    for report in handle.report.sites:
        site: Any = handle.sites[report.id]
        assert isinstance(site, LoRA)
        owner: Any = handle.model.get_submodule(report.path.rpartition(".")[0])
        assert (site.lora_A.in_features, site.lora_B.out_features) == (owner.in_features, owner.out_features)
