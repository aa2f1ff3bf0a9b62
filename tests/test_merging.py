"""`Handle.merge` and `Handle.merged`: LoRA folded into the base's weights."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastadapt.patching import Handle, NotMergeableError, patch
from tests.hosts.tiny import FAMILIES, assert_same, logits, randomize, snapshot, tiny
from tests.tolerance import assert_close_to_f64, assert_matches_recorded

hosts = pytest.mark.parametrize("family", FAMILIES)


def patched(family: str, dtype: torch.dtype = torch.float64, **options: Any) -> tuple[nn.Module, Handle]:
    model = tiny(family).to(dtype)
    handle = patch(model, "lora", **{"rank": 4, "dropout": 0.3, **options})
    randomize(handle)
    return model, handle


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: t.clone() for name, t in model.state_dict().items() if "adapter" not in name}


@hosts
def test_merged_for_good(family: str) -> None:
    """The model is a stock one again, with weights that give what the adapters gave, trained biases included."""
    model, handle = patched(family)
    adapted, before = logits(model), weights(model)
    assert handle.merge() is model
    assert_matches_recorded("logits", logits(model), adapted)
    assert type(model) is type(tiny(family)) and {type(m) for m in model.modules()} == {type(m) for m in tiny(family).modules()}
    after = model.state_dict()
    assert after.keys() == before.keys()
    changed = {name for name, t in before.items() if not torch.equal(t, after[name])}
    assert len(changed) == len(handle._sites) and all(name.endswith((".q_proj.weight", ".v_proj.weight", ".q.weight", ".v.weight")) for name in changed)
    with pytest.raises(RuntimeError, match="no longer patched"):
        handle.merge()
    patch(model, "vl_adapter", reduction_factor=4)


@hosts
def test_merged_for_a_while(family: str) -> None:
    model, handle = patched(family)
    adapted, before = logits(model), snapshot(model)
    with handle.merged():
        assert_matches_recorded("logits", logits(model), adapted)
        assert not any(type(site.owner).__module__.startswith("fastadapt") for site in handle._sites)
    assert_same(before, snapshot(model))
    assert torch.equal(logits(model), adapted)
    with handle.disabled():
        assert torch.equal(logits(model), logits(tiny(family).double()))


@pytest.mark.parametrize("training", [True, False])
def test_a_model_that_was_merged_for_a_while_keeps_its_mode(training: bool) -> None:
    model, handle = patched("bart")
    model.train(training)
    with handle.merged():
        assert all(module.training == training for module in model.modules())
    assert all(module.training == training for module in model.modules())


def test_no_copy_while_merged() -> None:
    """It would have merged weights and adapters, with nothing to take the former out again."""
    model, handle = patched("bart")
    before, adapted = snapshot(model), logits(model)
    with handle.merged():
        for copied in (copy.deepcopy, pickle.dumps):
            with pytest.raises(RuntimeError, match=r"model: cannot be copied or pickled inside `with handle.merged\(\)`"):
                copied(model)
        with pytest.raises(RuntimeError, match=r"save: not inside `with handle.merged\(\)`"):
            handle.save("/nonexistent")
    assert_same(before, snapshot(model))
    assert torch.equal(logits(copy.deepcopy(model)), adapted)


def test_the_active_task_s_adapters() -> None:
    model, handle = patched("bart", sharing="multiple", tasks=("vqa", "gqa"))
    with pytest.raises(NotMergeableError, match=r"choose the task .* tasks: vqa, gqa"):
        handle.merge()
    handle.set_task("gqa")
    adapted = logits(model)
    with handle.route(["gqa"]), pytest.raises(RuntimeError, match=r"merge: not inside `with handle.route"):
        handle.merge()
    handle.merge()
    assert_matches_recorded("logits", logits(model), adapted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rounded_once(dtype: torch.dtype) -> None:
    """A merged weight is the nearest to the exact sum that its dtype has; the model is as near to fp64 as the adapted one, whose weights were not rounded again."""
    model, handle = patched("bart", dtype)
    layer = model.model.encoder.layers[0].self_attn.q_proj
    exact = layer.weight.double() + handle.sites["encoder.0.self_attention.query"].merged_delta().double()
    reference = tiny("bart").to(dtype).double()
    out = logits(model)
    handle.merge()
    if dtype != torch.float32:
        assert torch.equal(layer.weight, exact.to(dtype))
    reference.load_state_dict({name: t.double() for name, t in model.state_dict().items()})
    assert_close_to_f64("logits", logits(model), logits(reference), out, gradient=False)


def refuses(handle: Handle, match: str) -> None:
    before = snapshot(handle.model)
    with pytest.raises(NotMergeableError, match=match):
        handle.merge()
    assert_same(before, snapshot(handle.model))


def test_what_is_not_linear() -> None:
    refuses(patch(tiny("bart"), "vl_adapter", reduction_factor=4), r"merge: vl_adapter: Bottleneck is not linear in what it reads, so no weight can hold it \(10 of them\)")


def test_weights_that_cannot_hold_it() -> None:
    model, handle = patched("bart", torch.float32)
    first, second = (layer.self_attn for layer in model.model.encoder.layers)
    first.q_proj.weight = second.q_proj.weight
    refuses(handle, r"a weight is held by other modules too \(2 of them\)")
    first.q_proj.weight = nn.Parameter(torch.zeros(32, 32, dtype=torch.int8), requires_grad=False)
    refuses(handle, r"the weight of Linear is Tensor of torch.int8, not a plain floating tensor \(1 of them\)")


def test_biases_that_the_base_lacks() -> None:
    refuses(patch(tiny("bart"), "lora", rank=4, add_biases=True), "lm_head.bias has a part that the base lacks")


def test_a_sum_beyond_its_dtype() -> None:
    """Found by trying the projection: everything is put back."""
    model, handle = patched("bart", torch.float16)
    with torch.no_grad():
        model.model.decoder.layers[1].encoder_attn.v_proj.parallel_adapter.lora_B.weight.fill_(6e4)
    refuses(handle, r"merge: decoder.1.cross_attention.value: projection: the merged weight of this Linear would not be finite")


@pytest.mark.parametrize("wrong", [Tensor.t, lambda delta: 1.01 * delta], ids=["transposed", "slightly"])
def test_a_wrong_delta_is_noticed(wrong: Callable[[Tensor], Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    _, handle = patched("t5", torch.float32)
    module: Any = handle._sites[3].module
    right = module.merged_delta()
    monkeypatch.setattr(module, "merged_delta", lambda: wrong(right))
    refuses(handle, "gives other numbers")


def test_a_projection_that_gives_zeros() -> None:
    """Nothing to compare with: zero beside an adapter that has not begun is merged all the same."""
    model = tiny("t5")
    model.encoder.block[0].layer[0].SelfAttention.q.weight.data.zero_()
    handle = patch(model, "lora", rank=4)
    out = logits(model)
    handle.merge()
    assert torch.equal(logits(model), out)
