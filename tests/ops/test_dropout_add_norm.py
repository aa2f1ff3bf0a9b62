"""`fastadapt.functional.dropout_add_norm` on every backend: norms with and without dropout, residual and parameters, v in x's dtype and in float32, what is returned and kept."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from fastadapt import backend, functional
from fastadapt.ops.philox import keep
from tests.ops import checks
from tests.ops.checks import every_backend, every_kernel, every_pair, one_backend_or_cuda
from tests.ops.specs import BF16, DTYPES, FP32, MIXED, Norm, random_specs, specs
from tests.tolerance import Compared, assert_rule

RANDOM = random_specs(Norm, 300)


def over(dtypes: tuple[torch.dtype, torch.dtype], **options: Any) -> Norm:
    return Norm(dtype=dtypes[0], param_dtype=dtypes[1], **options)


OPTIONS = [
    *(Norm(norm=n, residual=r, biases=b, dropout=p) for n in ("layer", "rms") for r, b, p in (("same", "both", 0.0), ("same", "weight", 0.1), (None, "none", 0.5))),
    *(Norm(norm=n, residual=None) for n in ("layer", "rms")),
    *(Norm(norm=n, biases=b, dropout=p, returns=v, eps=0.1) for n, b, p, v in (("layer", "both", 0.1, "both"), ("rms", "weight", 0.0, "both"), ("layer", "none", 0.3, "sum"))),
    *(Norm(norm=None, residual=r, biases="none", dropout=p) for r, p in (("same", 0.0), ("same", 0.1), (None, 0.5))),
]
WIDE = [replace(s, dtype=torch.bfloat16, param_dtype=torch.float32, residual="wide") for s in OPTIONS if s.residual]
EVERYTHING = Norm(lead=(7, 23), dropout=0.3, returns="both")
SHAPES = [
    over(d, lead=(t,), width=w, norm=n, dropout=p)
    for d in (FP32, MIXED)
    for t in (1, 15, 16, 17, 63, 65, 300)
    for w, n, p in ((1, "rms", 0.0), (7, "layer", 0.1), (33, "rms", 0.1), (64, "layer", 0.0), (130, "rms", 0.5))
]
ALL_SHAPES = [
    over(d, lead=(t,), width=w, norm=n, dropout=p, residual=r, returns="both")
    for d in DTYPES
    for t in (1, 63, 65, 700)
    for w in (1, 8, 31, 32, 33, 100, 768, 1030)
    for n, p in (("layer", 0.0), ("layer", 0.1), ("rms", 0.1))
    for r in ("same", "wide")
    if r == "same" or d[1] == torch.float32
]
SIZES = ((768, "layer", "same"), (1024, "rms", "wide"), (4096, "rms", "same"))
REAL = [over(d, lead=(2, 65), width=w, norm=n, dropout=0.1, residual=r) for d in (FP32, MIXED) for w, n, r in SIZES]


@specs([s for s in OPTIONS if s.returns != "sum"])
def test_gradcheck(spec: Norm) -> None:
    checks.assert_gradcheck(replace(spec, lead=(3, 2), width=5))


@specs([*OPTIONS, *RANDOM[:60]])
def test_reference_is_exact(spec: Norm) -> None:
    checks.assert_exact_reference(replace(spec, dtype=torch.float64, param_dtype=None))


@every_backend
@specs([*OPTIONS, *(replace(s, dtype=BF16[0], param_dtype=BF16[1]) for s in OPTIONS), *(replace(s, dtype=MIXED[0], param_dtype=MIXED[1]) for s in OPTIONS), *WIDE])
def test_options(spec: Norm, name: str, device: str) -> None:
    checks.assert_within_rule(spec, name, device)


@every_kernel
@specs(RANDOM)
def test_random(spec: Norm, name: str, device: str) -> None:
    checks.assert_within_rule(spec, name, device)


@specs(RANDOM[:60])
def test_random_on_reference(spec: Norm) -> None:
    checks.assert_within_rule(spec, "reference", "cpu")


@every_kernel
@specs(SHAPES)
def test_shapes(spec: Norm, name: str, device: str) -> None:
    checks.assert_within_rule(spec, name, device)


@pytest.mark.full
@every_kernel
@specs(ALL_SHAPES)
def test_all_shapes(spec: Norm, name: str, device: str) -> None:
    checks.assert_within_rule(spec, name, device)


@every_backend
@specs(REAL)
def test_real_sizes(spec: Norm, name: str, device: str) -> None:
    checks.assert_within_rule(spec, name, device)


@every_backend
@specs([over(d, lead=lead, norm=n, dropout=0.5, returns="both") for d in DTYPES for lead in ((0,), (0, 5), (5, 0)) for n in ("layer", "rms")])
def test_no_rows(spec: Norm, name: str, device: str) -> None:
    """Zero rows: an empty output, and gradients of zero."""
    tensors, dy = spec.draw(0, device), spec.cotangent(0, device)
    got = checks.fused(spec, name, tensors, dy)
    assert got.pop("y").shape == dy.shape
    assert all(g.shape == tensors[n[2:]].shape and not g.any() for n, g in got.items())


CALLS = [EVERYTHING, replace(EVERYTHING, dtype=MIXED[0], param_dtype=MIXED[1], norm="rms"), *(Norm(lead=(70,), width=33, residual=r) for r in ("same", None)), WIDE[1]]


def rounded(spec: Norm, name: str) -> bool:
    """Triton's compiler spreads a row over threads as the widest loads and stores want it, and adds it up in that order. Where x and v differ in size, alignment, strides and the
    gradients asked for decide whose width that is: other arguments may round otherwise there, equal ones do not."""
    return name == "triton" and spec.out_dtype != spec.dtype


@every_backend
@specs(CALLS)
class TestCall:
    """What holds for each call, whatever its numbers."""

    def test_gradients_asked_alone(self, spec: Norm, name: str, device: str) -> None:
        checks.assert_single_gradients(spec, name, device, rounded=spec.shapes() if rounded(spec, name) else ())

    def test_without_gradients(self, spec: Norm, name: str, device: str) -> None:
        checks.assert_no_grad_path(replace(spec, returns="y"), name, device)

    def test_arguments_are_untouched(self, spec: Norm, name: str, device: str) -> None:
        checks.assert_untouched(spec, name, device)

    def test_any_layout(self, spec: Norm, name: str, device: str) -> None:
        checks.assert_any_layout(spec, name, device, rounded=rounded(spec, name))


@every_kernel
@specs([over(d, lead=(t,), width=w, dropout=0.1, norm=n) for d in (FP32, MIXED, DTYPES[4]) for t, w, n in ((700, 96, "layer"), (700, 33, "rms"), (70, 768, "layer"))])
def test_deterministic(spec: Norm, name: str, device: str) -> None:
    checks.assert_deterministic(spec, name, device)


@every_pair
@specs([over(d, lead=(70,), norm=n, residual=r, dropout=p) for d in (FP32, MIXED) for n, r, p in (("layer", "same", 0.4), ("rms", None, 0.0), ("layer", "wide", 0.0))])
def test_any_backward_after_any_forward(spec: Norm, forward: str, backward: str, device: str) -> None:
    checks.assert_within_rule(spec, forward, device, backward=backward)


@every_backend
def test_rows_beyond_2_31_elements(name: str, device: str) -> None:
    """Rows 2^30 elements apart: the offset of the third does not fit in 32 bits. The 4 GiB are reserved, not touched."""
    spec = over(DTYPES[4], lead=(3,), width=40, dropout=0.3)
    tensors, dy = spec.draw(0, device), spec.cotangent(0, device)
    expected = checks.fused(spec, name, tensors, dy)
    apart = []
    torch.use_deterministic_algorithms(False)  # or the whole buffer would be filled with NaN
    for t in (tensors["x"], tensors["residual"], dy):
        rows = torch.empty(2 * 2**30 + 8 + spec.width, dtype=spec.dtype, device=device).as_strided((3, spec.width), (2**30 + 4, 1))
        apart.append(rows.copy_(t))
    checks.assert_same_bits(expected, checks.fused(spec, name, {**tensors, "x": apart[0], "residual": apart[1]}, apart[2]))


@every_kernel
@specs([over(MIXED, lead=(70,), width=48, residual=r, norm=n) for r in ("same", "wide") for n in ("layer", "rms")])
def test_parameters_are_not_rounded(spec: Norm, name: str, device: str) -> None:
    """As in torch's own norms: with a weight that bfloat16 does not hold, y = w where xhat is 1, and only y is rounded."""
    x = torch.zeros(spec.lead[0], spec.width, dtype=torch.bfloat16, device=device)
    x[:, ::2], x[:, 1::2] = 1, -1
    weight, bias = (torch.full((spec.width,), v, device=device) for v in (1.003, 0.252))
    residual = torch.zeros_like(x, dtype=spec.out_dtype)
    with checks.runs_on(spec.op, name, counts=(1, 0)):
        y = functional.dropout_add_norm(x, residual, weight, bias, norm=spec.norm, eps=0.0)
    exact = torch.where(x > 0, weight + bias, bias - weight)
    torch.testing.assert_close(y, exact.to(y.dtype), rtol=1e-6 if y.dtype == torch.float32 else 0.0, atol=0.0)
    assert not torch.equal(y, torch.where(x > 0, weight.bfloat16() + bias.bfloat16(), bias.bfloat16() - weight.bfloat16()).to(y.dtype))


@every_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_forward_and_backward_drop_what_the_definition_says(dtype: torch.dtype, name: str, device: str) -> None:
    for rows, width, p in ((65, 40, 0.5), (300, 72, 0.1), (3, 33, 0.9)):
        seed = torch.tensor([-7], device=device)
        x = torch.ones(rows, width, device=device, dtype=dtype, requires_grad=True)
        with checks.runs_on("dropout_add_norm", name):
            y = functional.dropout_add_norm(x, norm=None, dropout=p, seed=seed)
            (gradient,) = torch.autograd.grad(y.sum(), x)
        kept = keep(seed, rows, width, p)
        assert torch.equal(y, torch.where(kept, 1 / (1 - p), 0.0).to(dtype)) and torch.equal(gradient, y)


@every_backend
def test_what_is_dropped_is_never_multiplied(name: str, device: str) -> None:
    """An infinity or NaN that is dropped leaves no trace, in the output or in a gradient."""
    spec = replace(EVERYTHING, dropout=0.5)
    tensors, dy = spec.draw(0, device), spec.cotangent(0, device)
    kept = keep(torch.tensor([spec.seed], device=device), 7 * 23, spec.width, 0.5).view(7, 23, -1)
    for filler in (float("nan"), float("inf")):
        got = checks.fused(spec, name, {**tensors, "x": torch.where(kept, tensors["x"], filler)}, dy)
        checks.assert_same_bits(got, checks.fused(spec, name, tensors, dy))


@every_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_statistics_are_of_the_rounded_sum(dtype: torch.dtype, name: str, device: str) -> None:
    """y with return_sum is the norm of the v beside it, to the last bit; and y and v are the same alone and together."""
    spec = Norm(lead=(70,), width=48, dtype=dtype, param_dtype=torch.float32, dropout=0.2)
    t, seed = spec.draw(0, device), torch.tensor([3], device=device)
    with checks.runs_on(spec.op, name, counts=(12, 0)):
        for norm in ("layer", "rms"):
            for residual in (t["residual"], None):
                y, v = functional.dropout_add_norm(t["x"], residual, t["weight"], norm=norm, dropout=0.2, seed=seed, return_sum=True)
                assert torch.equal(functional.dropout_add_norm(v, weight=t["weight"], norm=norm), y)
                assert torch.equal(functional.dropout_add_norm(t["x"], residual, norm=None, dropout=0.2, seed=seed), v)


@every_backend
@pytest.mark.parametrize("norm", ["layer", "rms", None])
def test_what_would_be_x_is_x(norm: str | None, name: str, device: str) -> None:
    """Without residual and dropout v is x: returned, and kept for backward, without a copy; gradients of both flow to it."""
    x = torch.randn(5, 48, device=device, requires_grad=True)
    with checks.runs_on("dropout_add_norm", name, counts=(norm is not None,) * 2):
        y, v = functional.dropout_add_norm(x, norm=norm, return_sum=True)
        assert v is x and (norm or y is x)
        (gradient,) = torch.autograd.grad((y * y.detach() + v).sum(), x)
    with backend.use("reference"):
        expected = torch.autograd.grad((functional.dropout_add_norm(x, norm=norm) * y.detach()).sum(), x)[0] + 1
    torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-5)
    assert functional.dropout_add_norm(x, norm=None) is x


@every_backend
@pytest.mark.parametrize(("dtype", "residual"), [(torch.float32, "same"), (torch.bfloat16, "same"), (torch.bfloat16, "wide")])
def test_the_same_gradient_is_written_once(dtype: torch.dtype, residual: str, name: str, device: str) -> None:
    """x and the residual have one gradient where nothing is dropped and both are of one dtype: the kernel writes one."""
    spec = Norm(lead=(70,), dtype=dtype, param_dtype=torch.float32, residual=residual)
    tensors, dy = spec.draw(0, device), spec.cotangent(0, device)
    with checks.spied() as calls:
        got = checks.fused(spec, name, tensors, dy)
    (outputs,) = (out for direction, _, out in calls if direction == "backward")
    assert [t.numel() > 0 for t in outputs] == [residual == "wide", True, True, True]
    assert torch.equal(got["d x"], got["d residual"].to(dtype)) and got["d residual"].dtype == spec.out_dtype


@every_backend
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_the_sum_alone_is_differentiated(dropout: float, name: str, device: str) -> None:
    """Where only v is used behind a norm, its weight and bias get no gradient, and the residual's is the one that came."""
    spec = Norm(lead=(70,), dropout=dropout)
    leaves = {n: t.requires_grad_() for n, t in spec.draw(0, device).items()}
    seed, dv = torch.tensor([3], device=device), spec.cotangent(0, device)
    with checks.runs_on(spec.op, name, counts=(1, int(dropout > 0))):
        _, v = functional.dropout_add_norm(**leaves, dropout=dropout, seed=seed if dropout else None, return_sum=True)
        grads = torch.autograd.grad(v, list(leaves.values()), dv, allow_unused=True)
    kept = keep(seed, 70, spec.width, dropout) / (1 - dropout) if dropout else 1.0
    assert torch.equal(grads[1], dv) and grads[2] is grads[3] is None
    torch.testing.assert_close(grads[0], dv * kept)


@every_kernel
@specs([Norm(lead=(4000,), width=96, norm=n) for n in ("layer", "rms")])
def test_rows_all_alike(spec: Norm, name: str, device: str) -> None:
    checks.assert_within_rule(spec, name, device, change=checks.alike)


@every_backend
def test_constant_rows_are_finite(name: str, device: str) -> None:
    """A row without variance, or of zeros, has a deviation of sqrt(eps)."""
    x = torch.stack([torch.zeros(48), torch.full((48,), 3.0)]).to(device).requires_grad_()
    for norm in ("layer", "rms"):
        with checks.runs_on("dropout_add_norm", name):
            y = functional.dropout_add_norm(x, norm=norm, eps=1e-6)
            (gradient,) = torch.autograd.grad(y[:, 0].sum(), x)
        assert y.isfinite().all() and gradient.isfinite().all() and not y[0].any() and (norm == "rms" or y.abs().max() < 1e-3)


@every_kernel
@pytest.mark.parametrize("scale", [1e-15, 1e15])
def test_a_mean_far_from_zero_and_numbers_far_from_one(scale: float, name: str, device: str) -> None:
    """The variance is that of what the mean leaves over: sums of squares alone would have no digit left. Numbers whose squares fp32 can hold change nothing but the scale."""

    def run(seed: int) -> dict[str, Compared]:
        x = (1000 + torch.randn(70, 48, generator=torch.Generator().manual_seed(seed))).to(device)
        small = scale * (x - 1000)
        with checks.runs_on("dropout_add_norm", name, counts=(2, 0)):
            y, far = functional.dropout_add_norm(x), functional.dropout_add_norm(small, eps=0.0)
        torchs = lambda x, eps=1e-5: F.layer_norm(x, (48,), eps=eps)
        return {"y": Compared(y, torchs(x.double()), torchs(x), False), "far": Compared(far, torchs(small.double(), 0.0), torchs(small, 0.0), False)}

    assert_rule(run, torch.float32)


def assert_long_sums_round_nothing_away(name: str, width: int) -> None:
    """A mean in fp32 is off by more than the deviations of such rows, unless what the deviations add up to is put back into it: constant rows are exactly zero then, as torch's."""
    for constant in (0.7, 1000.3, 1e6 + 0.3):
        x = torch.full((3, width), constant, requires_grad=True)
        with checks.runs_on("dropout_add_norm", name):
            y = functional.dropout_add_norm(x)
            (gradient,) = torch.autograd.grad(y[:, 0].sum(), x)
        assert not y.any() and torch.allclose(gradient[:, 0], torch.tensor((1 - 1 / width) * 1e5**0.5))

    def run(seed: int) -> dict[str, Compared]:
        x = 1000 + torch.randn(12, width, generator=torch.Generator().manual_seed(seed))
        y = functional.dropout_add_norm(x)
        return {"y": Compared(y, F.layer_norm(x.double(), (width,)), F.layer_norm(x, (width,)), False)}

    with backend.use(name):
        assert_rule(run, torch.float32)


@pytest.mark.skipif("cpu" not in checks.kernel_names, reason="the CPU kernels are not built")
@pytest.mark.parametrize("width", [600, 5000, 16384])
def test_long_sums_round_nothing_away(width: int) -> None:
    assert_long_sums_round_nothing_away("cpu", width)


# What enters and leaves.


@one_backend_or_cuda
def test_torchs_generator_gives_the_seed(name: str, device: str) -> None:
    """`torch.manual_seed` reproduces a call, the next call draws another mask, and neither without dropout nor with a seed given is a number drawn."""
    x, state = torch.ones(64, 48, device=device), torch.get_rng_state if device == "cpu" else torch.cuda.get_rng_state
    with checks.runs_on("dropout_add_norm", name, counts=(5, 0)), torch.no_grad():
        torch.manual_seed(5)
        first, second = (functional.dropout_add_norm(x, dropout=0.3) for _ in range(2))
        torch.manual_seed(5)
        assert torch.equal(functional.dropout_add_norm(x, dropout=0.3), first) and not torch.equal(first, second)
        before = state()
        functional.dropout_add_norm(x), functional.dropout_add_norm(x, dropout=0.3, seed=torch.tensor([1], device=device))
        assert torch.equal(state(), before)


@one_backend_or_cuda
@pytest.mark.parametrize("reentrant", [False, True], ids=["non-reentrant", "reentrant"])
def test_a_checkpointed_call_draws_its_mask_again(name: str, device: str, reentrant: bool) -> None:
    x = torch.ones(64, 48, device=device, requires_grad=True)
    torch.manual_seed(1)
    with checks.runs_on("dropout_add_norm", name, counts=(2, 1)):
        y = checkpoint(lambda x: functional.dropout_add_norm(x, norm=None, dropout=0.3), x, use_reentrant=reentrant)
        torch.rand(3, device=device)
        y.sum().backward()
    assert torch.equal(x.grad, y) and 0 < (y == 0).sum() < y.numel()  # type: ignore[arg-type]


@one_backend_or_cuda
@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_compiled_with_both_outputs(name: str, device: str, compiler: str) -> None:
    """Without a graph break: y and v, the gradients of both, and masks from torch's generator, another each time."""
    torch._dynamo.reset()

    def call(x: Tensor, residual: Tensor) -> Tensor:
        y, v = functional.dropout_add_norm(x, residual, dropout=0.3, return_sum=True)
        return y + 2 * v

    compiled, seen = torch.compile(call, fullgraph=True, backend=compiler), []
    leaves = [torch.randn(64, 48, device=device, requires_grad=True) for _ in range(2)]
    with checks.runs_on("dropout_add_norm", name, counts=(3, 3)):
        for seed in (1, None, 1):
            if seed is not None:
                torch.manual_seed(seed)
            seen.append([t.detach() for y in [compiled(*leaves)] for t in (y, *torch.autograd.grad(y.sum(), leaves))])
    assert all(map(torch.equal, seen[0], seen[2])) and not torch.equal(seen[0][0], seen[1][0])
    _, dx, dresidual = seen[0]
    assert 0.6 < (dx != 0).double().mean() < 0.8
    torch.testing.assert_close(dx, torch.where(dx != 0, dresidual / 0.7, 0.0))


@one_backend_or_cuda
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_autocast_leaves_dtypes(name: str, device: str, compiled: bool) -> None:
    """As torch's own sum and norm do, beside which a half-precision residual becomes float32."""
    spec = Norm(lead=(70,))
    tensors, dy = spec.draw(0, device), spec.cotangent(0, device)
    call = lambda t: spec.call(functional, t)
    with torch.autocast(device, dtype=torch.bfloat16):
        run = torch.compile(call, fullgraph=True, backend="aot_eager") if compiled else call
        with checks.runs_on(spec.op, name):
            got = checks.evaluate(run, tensors, dy)
        checks.assert_same_bits(got, checks.fused(spec, name, tensors, dy))
        half = {**tensors, "residual": tensors["residual"].bfloat16()}
        with checks.runs_on(spec.op, name):
            got = checks.evaluate(run, half, dy)
    assert got["y"].dtype == torch.float32 and got["d residual"].dtype == torch.bfloat16
    expected = checks.fused(spec, name, {**tensors, "residual": half["residual"].float()}, dy)
    checks.assert_same_bits(got, {**expected, "d residual": expected["d residual"].bfloat16()})
    with pytest.raises(TypeError, match=r"residual: dtype torch\.bfloat16"):
        call(half)


@one_backend_or_cuda
@pytest.mark.parametrize("norm", ["layer", "rms"])
def test_bias_without_a_weight(norm: str, name: str, device: str) -> None:
    spec = Norm(lead=(70,), norm=norm)
    tensors, dy = spec.draw(0, device), spec.cotangent(0, device)
    expected = checks.fused(spec, name, {**tensors, "weight": torch.ones_like(tensors["weight"])}, dy)
    del tensors["weight"], expected["d weight"]
    checks.assert_same_bits(checks.fused(spec, name, tensors, dy), expected)


@every_kernel
def test_it_is_torchs_layer_norm_and_t5s(name: str, device: str) -> None:
    """Against the hosts' own operations, with torch's dropout in place of ours where nothing is dropped."""
    spec = Norm(lead=(3, 29), width=96, dtype=torch.bfloat16, param_dtype=torch.float32)
    t = spec.draw(0, device)
    v = F.dropout(t["x"], 0.0) + t["residual"]
    with checks.runs_on(spec.op, name, counts=(2, 0)):
        layer = functional.dropout_add_norm(t["x"], t["residual"], t["weight"], t["bias"])
        rms = functional.dropout_add_norm(t["x"], t["residual"], t["weight"], norm="rms", eps=1e-6)
    exact = v.double()
    pairs = (
        (layer, F.layer_norm(v.float(), (96,), t["weight"], t["bias"]).bfloat16(), F.layer_norm(exact, (96,), t["weight"].double(), t["bias"].double())),
        (rms, (t["weight"] * (v.float() * (v.float().square().mean(-1, keepdim=True) + 1e-6).rsqrt())).bfloat16(), t["weight"] * F.rms_norm(exact, (96,), eps=1e-6)),
    )
    for got, same, want in pairs:
        assert (got != same).double().mean() < 1e-3 and checks.relative_error(got, want) <= 1.01 * checks.relative_error(same, want)
