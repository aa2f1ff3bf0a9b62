"""VL-Adapter's z-regulariser."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from fastadapt.patching import patch
from fastadapt.training import track_z
from tests.hosts.tiny import batch, randomize, tiny
from tests.tolerance import assert_matches_recorded


def test_mean_of_mean_squares() -> None:
    model = tiny("bart").double()
    handle = patch(model, "vl_adapter", reduction_factor=4)
    randomize(handle)
    adapter = handle.sites["encoder.1.feed_forward"]
    seen = {}
    hook = adapter.register_forward_pre_hook(lambda module, inputs: seen.update(h=inputs[0]))
    with track_z(handle) as z:
        loss = model(**batch()).loss
    hook.remove()
    want = F.gelu(F.linear(seen["h"], adapter.down_sampler.weight, adapter.down_sampler.bias), approximate="tanh").square().mean()  # type: ignore[union-attr]
    assert len(z.by_site) == 10 and torch.equal(z.by_site["encoder.1.feed_forward"], want)
    penalty = z.penalty(0.5)
    assert_matches_recorded("penalty", penalty, 0.5 * sum(z.by_site.values()) / 10)  # type: ignore[arg-type, operator]
    (plain,) = torch.autograd.grad(loss, adapter.down_sampler.weight, retain_graph=True)  # type: ignore[union-attr]
    (both,) = torch.autograd.grad(loss + penalty, adapter.down_sampler.weight)  # type: ignore[union-attr]
    assert not torch.equal(plain, both)
    assert not any(m._forward_pre_hooks for m in model.modules())


def test_the_selected_task_and_generated_adapters() -> None:
    model = tiny("t5")
    handle = patch(model, "vl_adapter", sharing="multiple", reduction_factor=4, tasks=["vqa", "gqa"])
    with handle.task("gqa"), track_z(handle) as z:
        model(**batch())
    assert len(z.by_site) == 10
    handle.unpatch()
    handle = patch(model, "hyperformer", reduction_factor=4, task_dim=8, hidden_dim=8, tasks=["vqa"], layer_norm_before=True)
    handle.set_task("vqa")
    with track_z(handle, lambda site: site.endswith("feed_forward")) as z:
        model(**batch())
    assert set(z.by_site) == {f"{side}.{i}.feed_forward" for side in ("encoder", "decoder") for i in (0, 1)}


def test_of_what_the_stream_gives() -> None:
    model = tiny("bart").double()
    handle = patch(model, "vl_adapter", reads="sum", reduction_factor=4)
    randomize(handle)
    adapter, layer = handle.sites["decoder.1.cross_attention"], model.model.decoder.layers[1]
    seen: dict[str, torch.Tensor] = {}
    hook = adapter.register_forward_pre_hook(lambda module, inputs: seen.update(sum=inputs[0] + inputs[1]))
    with track_z(handle) as z:
        model(**batch())
    hook.remove()
    inside = layer.encoder_attn_layer_norm(seen["sum"])
    want = F.gelu(F.linear(inside, adapter.down_sampler.weight, adapter.down_sampler.bias), approximate="tanh").square().mean()  # type: ignore[union-attr]
    assert torch.equal(z.by_site["decoder.1.cross_attention"], want)


def test_behind_a_layer_norm() -> None:
    model = tiny("bart").double()
    handle = patch(model, "vl_adapter", layer_norm_before=True, layer_norms="none", reduction_factor=4)
    randomize(handle)
    adapter: Any = handle.sites["encoder.0.feed_forward"]
    seen: dict[str, torch.Tensor] = {}
    adapter.register_forward_pre_hook(lambda module, inputs: seen.update(h=inputs[0]))
    with track_z(handle) as z:
        model(**batch())
    want = F.gelu(adapter.down_sampler(adapter.pre_layer_norm(seen["h"])), approximate="tanh").square().mean()
    assert_matches_recorded("z", z.by_site["encoder.0.feed_forward"], want)


@pytest.mark.parametrize("reentrant", [True, False])
def test_under_checkpointing(reentrant: bool) -> None:
    model = tiny("bart").double().train()
    handle = patch(model, "vl_adapter", reduction_factor=4)
    randomize(handle)

    def gradients() -> list[torch.Tensor]:
        model.zero_grad()
        with track_z(handle) as z:
            model(**batch())
            z.penalty(1.0).backward()
        return [p.grad.clone() for p in handle.trainable_parameters() if p.grad is not None]

    want = gradients()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    if reentrant:
        with pytest.raises(RuntimeError, match="z has no gradient: the adapters ran under no_grad, as in reentrant checkpointing"):
            gradients()
        with torch.no_grad(), track_z(handle) as z:
            model(**batch())
            assert z.penalty() > 0
    else:
        for got, expected in zip(gradients(), want, strict=True):
            assert_matches_recorded("gradient", got, expected)


def test_errors() -> None:
    model = tiny("bart")
    handle = patch(model, "vlpet", rank=8, value_rank=4)
    with pytest.raises(ValueError, match="no bottleneck adapter"), track_z(handle):
        pass
    handle.unpatch()
    with track_z(patch(model, "vl_adapter", reduction_factor=4)) as z, pytest.raises(RuntimeError, match="no adapter has run"):
        z.penalty()


@pytest.mark.parametrize(("method", "options"), [("vl_adapter", {"sharing": "multiple"}), ("hyperformer", {"task_dim": 8, "hidden_dim": 8})])
def test_batches_that_mix_tasks_are_refused(method: str, options: dict[str, Any]) -> None:
    model = tiny("bart")
    handle = patch(model, method, reduction_factor=4, tasks=["vqa", "gqa"], **options)
    with track_z(handle), handle.route(["vqa", "gqa"]), pytest.raises(RuntimeError, match="track_z: does not see what adapters do in a batch that mixes tasks"):
        model(**batch())
    with handle.route(["vqa", "gqa"]):
        model(**batch())
