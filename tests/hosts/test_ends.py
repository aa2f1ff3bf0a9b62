"""The ends of patched sub-layers as one operation each: the host's own numbers and gradients, dropout's mask again in backward, and where the host's own operations run."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import MBartConfig, MBartForConditionalGeneration, MT5Config, MT5ForConditionalGeneration, OPTConfig, OPTForCausalLM

from fastadapt import backend
from fastadapt.hosts import ends
from fastadapt.hosts.ends import ENDS, begin, end
from fastadapt.ops import philox
from fastadapt.ops.lora.function import draw_seed
from fastadapt.patching import Handle, patch
from tests.hosts.tiny import SMALL, batch, logits, randomize, tiny
from tests.tolerance import FLOOR

_ON_CPU = ends._gains_without_dropout
pytestmark = pytest.mark.filterwarnings("ignore:.*None of the inputs have requires_grad")
SIDES = {f"{side}_{name}": value for side in ("encoder", "decoder") for name, value in (("layers", 2), ("attention_heads", 4), ("ffn_dim", 64))}
# Calls of the op, with and without dropout, in a forward of the whole model, 2 + 2 layers with VL-Adapter's sites: without dropout a sum alone is no call.
CALLS = {"bart": 10, "mbart": 10, "t5": 10, "mt5": 10, "opt": 4, "opt, post-norm": 4}
NORMED = {"bart": 10, "mbart": 0, "t5": 10, "mt5": 10, "opt": 0, "opt, post-norm": 4}
families = pytest.mark.parametrize("family", CALLS)


def model_of(family: str, dropout: float = 0.0) -> nn.Module:
    if family in ("bart", "t5"):
        return tiny(family, dropout=dropout)
    torch.manual_seed(0)
    rates = {"dropout": dropout, "attention_dropout": 0.0, "activation_dropout": 0.0}
    if family == "mbart":
        return MBartForConditionalGeneration(MBartConfig(vocab_size=99, d_model=32, max_position_embeddings=64, forced_eos_token_id=None, **SIDES, **rates)).eval()
    if family == "mt5":
        return MT5ForConditionalGeneration(
            MT5Config(vocab_size=99, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, decoder_start_token_id=0, pad_token_id=0, dropout_rate=dropout)
        ).eval()
    config = OPTConfig(vocab_size=99, hidden_size=32, word_embed_proj_dim=32, ffn_dim=64, num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=64, **rates)
    config.do_layer_norm_before = family == "opt"
    return OPTForCausalLM(config).eval()


def inputs(family: str) -> dict[str, Tensor]:
    given = batch()
    return {**given, "labels": given["input_ids"]} if family.startswith("opt") else given


def patched(family: str, dtype: torch.dtype, dropout: float = 0.0, **options: Any) -> tuple[nn.Module, Handle]:
    model = model_of(family, dropout).to(dtype)
    handle = patch(model, "vl_adapter", **SMALL["vl_adapter"], **options)
    randomize(handle)
    return model.train(), handle


def calls() -> int:
    return sum(n for (op, direction, _), n in backend.ran().items() if (op, direction) == ("dropout_add_norm", "forward"))


def step(model: nn.Module, handle: Handle, family: str) -> tuple[Tensor, list[Tensor], int]:
    backend.ran(reset=True)
    loss = model(**inputs(family), use_cache=False).loss
    count = calls()
    loss.backward()
    grads = [p.grad for p in handle.trainable_parameters()]
    for p in handle.trainable_parameters():
        p.grad = None
    return loss.detach(), grads, count  # type: ignore[return-value]


@pytest.fixture
def always(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fused without dropout too, as on a GPU."""
    monkeypatch.setattr(ends, "_gains_without_dropout", lambda _: True)


@pytest.mark.usefixtures("always")
@families
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_on_and_off_give_the_same_numbers(family: str, dtype: torch.dtype) -> None:
    """Loss and all gradients, as near to float64's as the host's own operations are."""
    exact = step(*patched(family, torch.float64, fuse_residual=False), family)
    on, off = (step(*patched(family, dtype, fuse_residual=fused), family) for fused in (True, False))
    assert off[2] == 0 and on[2] == (NORMED[family] if not ("t5" in family and dtype == torch.float64) else 0)
    for got, host, true in zip((on[0], *on[1]), (off[0], *off[1]), (exact[0], *exact[1]), strict=True):
        error, theirs = ((t.double() - true).norm() / true.norm() for t in (got, host))
        assert error <= (3 * theirs + FLOOR[dtype] if dtype in FLOOR else 1e-12)


@families
def test_with_dropout_every_end_is_one_call(family: str) -> None:
    model, handle = patched(family, torch.float32, dropout=0.1)
    first = step(model, handle, family)
    assert first[2] == CALLS[family] + (10 if "t5" in family else 0)
    torch.manual_seed(3)
    again = step(model, handle, family)
    torch.manual_seed(3)
    repeated = step(model, handle, family)
    assert torch.equal(again[0], repeated[0]) and all(map(torch.equal, again[1], repeated[1])) and not torch.equal(first[0], again[0])


class Layer(nn.Module):
    def __init__(self, fused: bool = True) -> None:
        super().__init__()
        if fused:
            self.__dict__[ENDS] = "all"


@pytest.fixture
def tensors() -> Iterator[tuple[Tensor, Tensor]]:
    torch.manual_seed(0)
    yield torch.randn(3, 7, 24, requires_grad=True), torch.randn(3, 7, 24, requires_grad=True)


@pytest.mark.parametrize("norm", [None, nn.LayerNorm(24)], ids=["sum", "layer norm"])
@pytest.mark.parametrize("dropout", [0.3, nn.Dropout(0.3)], ids=["number", "module"])
def test_dropout_is_the_hosts_with_another_mask(norm: nn.LayerNorm | None, dropout: Any, tensors: tuple[Tensor, Tensor]) -> None:
    output, residual = tensors
    torch.manual_seed(11)
    y = end(Layer(), output, residual, dropout, norm)
    torch.manual_seed(11)
    mask = philox.keep(draw_seed(output), 21, 24, 0.3).view(3, 7, 24)
    total = residual + output * mask / 0.7
    expected = total if norm is None else norm(total)
    torch.testing.assert_close(y, expected)
    dy = torch.randn_like(y)
    got, want = torch.autograd.grad(y, tensors, dy), torch.autograd.grad(expected, tensors, dy)
    torch.testing.assert_close(got, want)
    assert torch.equal(got[0] == 0, ~mask)


@pytest.mark.usefixtures("always")
def test_where_the_hosts_own_operations_run(tensors: tuple[Tensor, Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    """Without dropout on a CPU, outside training, unfused, under hooks, with a norm of another class, and where torch would promote: the op is not called, and hooks are."""
    output, residual = tensors
    layer, norm, seen = Layer(), nn.LayerNorm(24), []
    hooked, dropping = nn.LayerNorm(24), nn.Dropout(0.5)
    hooked.register_forward_hook(lambda *_: seen.append("norm"))
    dropping.register_forward_pre_hook(lambda *_: seen.append("dropout"))

    class Other(nn.LayerNorm):
        pass

    backend.ran(reset=True)
    with monkeypatch.context() as patch_:
        patch_.setattr(ends, "_gains_without_dropout", _ON_CPU)
        assert torch.equal(end(layer, output, residual, 0.0, norm), norm(residual + output))
    assert torch.equal(end(Layer().eval(), output, residual, 0.3, norm), norm(residual + output))
    assert torch.equal(end(Layer(False), output, residual, 0.0, norm), norm(residual + output))
    assert torch.equal(end(layer, output, residual, 0.0), residual + output)
    assert torch.equal(end(layer, output, residual, 0.0, hooked), hooked(residual + output))
    assert torch.equal(end(layer, output, residual, 0.0, Other(24)), norm(residual + output))
    end(layer, output, residual, dropping)
    assert end(layer, output, residual.bfloat16(), 0.3).dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        assert end(layer, output.bfloat16(), residual.bfloat16(), 0.0, norm).dtype == norm(residual.bfloat16()).dtype
    assert calls() == 0 and seen == ["norm", "norm", "dropout"]
    assert end(layer, output.bfloat16(), residual, 0.0, norm).dtype == torch.float32 and calls() == 1


def test_an_rms_norm_keeps_the_hosts_dtypes() -> None:
    """T5's own gives float32 where its weight is and the stream is not."""
    from transformers.models.t5.modeling_t5 import T5LayerNorm

    norm, x = T5LayerNorm(24), torch.randn(5, 24)
    nn.init.normal_(norm.weight)
    for dtype in (torch.float32, torch.bfloat16):
        assert begin(Layer(), x.to(dtype), norm).dtype == norm(x.to(dtype)).dtype
    torch.testing.assert_close(begin(Layer(), x, norm), norm(x))
    norm.bfloat16()
    error, theirs = ((got.double() - norm.double()(x.bfloat16().double())).norm() for got in (begin(Layer(), x.bfloat16(), norm.bfloat16()), norm.bfloat16()(x.bfloat16())))
    assert error <= 2 * theirs


@pytest.mark.parametrize("family", ["bart", "t5"])
def test_recomputed_layers_drop_the_same_elements(family: str) -> None:
    """Gradient checkpointing with dropout: the numbers of a plain step."""
    model, handle = patched(family, torch.float32, dropout=0.2)
    steps = []
    for checkpointed in (False, True):
        if checkpointed:
            model.gradient_checkpointing_enable()
        torch.manual_seed(5)
        steps.append(step(model, handle, family))
    assert torch.equal(steps[0][0], steps[1][0]) and all(map(torch.equal, steps[0][1], steps[1][1]))


def test_one_graph_in_training() -> None:
    model, handle = patched("bart", torch.float32, dropout=0.0)
    expected = step(model, handle, "bart")
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    got = step(compiled, handle, "bart")  # type: ignore[arg-type]
    torch.testing.assert_close(got[:2], expected[:2])


def test_report_and_unpatching() -> None:
    model = model_of("bart")
    out = logits(model)
    handle = patch(model, "vlpet", **SMALL["vlpet"])
    report = handle.report
    assert {site.id for site in report.sites if site.around} == {f"encoder.{i}.{name}" for i in range(2) for name in ("self_attention", "feed_forward")}
    assert "fused around it: dropout, residual, layer norm" in str(report)
    handle.unpatch()
    assert not any(ENDS in module.__dict__ for module in model.modules())
    assert torch.equal(logits(model), out)
    assert "fused around it" not in str(patch(model, "vlpet", fuse_residual=False, **SMALL["vlpet"]).report)


def test_dropout_alone_is_left_to_torch() -> None:
    """Without a layer to say so nothing changes."""
    x = torch.ones(4, 4)
    torch.manual_seed(0)
    y = end(Layer(False), x, torch.zeros(4, 4), 0.5)
    torch.manual_seed(0)
    assert torch.equal(y, F.dropout(x, 0.5))
