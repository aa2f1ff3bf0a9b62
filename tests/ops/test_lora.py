"""`fastadapt.functional.lora` on every backend: widths that differ, dropout by a seed, and what a mask must be."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from fastadapt import functional
from fastadapt.ops.philox import keep, philox
from tests import eager
from tests.ops import checks
from tests.ops.checks import every_backend, every_kernel, every_pair, one_backend_or_cuda
from tests.ops.specs import DTYPES, FP32, MIXED, Lora, random_specs, specs
from tests.tolerance import assert_close_to_f64

RANDOM = random_specs(Lora, 200)


def over(dtypes: tuple[torch.dtype, torch.dtype], **options: Any) -> Lora:
    return Lora(dtype=dtypes[0], param_dtype=dtypes[1], **options)


OPTIONS = [Lora(biases=b, scale=s, dropout=p) for b in ("none", "up") for s in (1.0, 0.25, 0.0) for p in (0.0, 0.1, 0.5)]
EVERYTHING = Lora(lead=(7, 23), biases="up", scale=0.7, dropout=0.3)
WIDTHS = ((40, 64), (64, 40), (72, 72), (1, 33), (33, 1))
SHAPES = [
    over(d, lead=(t,), width=w, out=o, rank=r, dropout=p)
    for d in (FP32, MIXED)
    for t, p in ((1, 0.0), (1, 0.5), (63, 0.0), (65, 0.1), (300, 0.1))
    for w, o in WIDTHS
    for r in (1, 16, 33)
] + [over(d, lead=(3,), width=77, out=40, rank=64, biases="up", scale=0.7) for d in DTYPES]
COLUMNS = [
    over(d, lead=(t,), width=w, out=o, rank=r, dropout=p, biases="up", scale=0.7)
    for d in DTYPES
    for t, r in ((40, 16), (150, 36))
    for w, o in ((64, 160), (264, 40))
    for p in (0.0, 0.3)
]
ALL_SHAPES = [
    over(d, lead=(t,), width=w, out=o, rank=r, dropout=p)
    for d in DTYPES
    for t in (0, 1, 63, 65, 700)
    for w, o in (*WIDTHS, (768, 768), (130, 257))
    for r in (1, 4, 7, 16, 33, 64, 130)
    for p in (0.0, 0.1)
]
REAL = [
    over(d, lead=(2, 65), width=w, out=o, rank=r, dropout=p, scale=2.0) for d in (FP32, MIXED, DTYPES[4]) for w, o in ((768, 3072), (3072, 768)) for r, p in ((4, 0.0), (64, 0.1))
]


@specs(OPTIONS[:6])
def test_gradcheck(spec: Lora) -> None:
    checks.assert_gradcheck(replace(spec, lead=(3, 2), width=4, out=5, rank=3))


@specs([*OPTIONS, *RANDOM[:60]])
def test_reference_is_exact(spec: Lora) -> None:
    checks.assert_exact_reference(spec)


@every_kernel
@pytest.mark.parametrize("dtypes", [FP32, MIXED], ids=["fp32", "mixed"])
@specs(OPTIONS)
def test_options(spec: Lora, dtypes: tuple[torch.dtype, torch.dtype], name: str, device: str) -> None:
    checks.assert_within_rule(replace(spec, dtype=dtypes[0], param_dtype=dtypes[1]), name, device)


@every_kernel
@specs(RANDOM)
def test_random(spec: Lora, name: str, device: str) -> None:
    checks.assert_within_rule(spec, name, device)


@specs(COLUMNS)
def test_few_tiles(spec: Lora) -> None:
    checks.assert_within_rule(spec, "cpu", "cpu")


@specs(RANDOM[:40])
def test_random_on_reference(spec: Lora) -> None:
    checks.assert_within_rule(spec, "reference", "cpu")


@every_kernel
@specs(SHAPES)
def test_shapes(spec: Lora, name: str, device: str) -> None:
    checks.assert_within_rule(spec, name, device)


@pytest.mark.full
@every_kernel
@specs([s for s in ALL_SHAPES if s.lead[0]])
def test_all_shapes(spec: Lora, name: str, device: str) -> None:
    checks.assert_within_rule(spec, name, device)


def test_the_reference_sums_what_fp16_can_hold() -> None:
    """Eager code scales dy before the product with the activations."""
    spec = Lora(lead=(2048,), width=64, out=64, rank=8, scale=1e-3, dtype=torch.float16, param_dtype=torch.float16)
    tensors = {n: t.abs() * (30 if n == "x" else 1) for n, t in spec.draw(0).items()}
    assert checks.fused(spec, "reference", tensors, torch.ones(2048, 64).half())["d w_up"].isfinite().all()


@every_backend
@specs(REAL)
def test_real_sizes(spec: Lora, name: str, device: str) -> None:
    checks.assert_within_rule(spec, name, device)


@every_backend
@specs([over(d, lead=lead, biases="up", dropout=p) for d in DTYPES for lead in ((0,), (0, 5), (5, 0)) for p in (0.0, 0.5)])
def test_no_rows(spec: Lora, name: str, device: str) -> None:
    """Zero rows: an empty output, and gradients of zero."""
    tensors, dy = spec.draw(0, device), spec.cotangent(0, device)
    got = checks.fused(spec, name, tensors, dy)
    assert got.pop("y").shape == dy.shape
    assert all(g.shape == tensors[n[2:]].shape and not g.any() for n, g in got.items())


@every_backend
@specs([EVERYTHING, replace(EVERYTHING, dtype=MIXED[0], param_dtype=MIXED[1]), Lora(lead=(70,), width=33, out=7, rank=9)])
class TestCall:
    """What holds for each call, whatever its numbers."""

    def test_gradients_asked_alone(self, spec: Lora, name: str, device: str) -> None:
        checks.assert_single_gradients(spec, name, device)

    def test_without_gradients(self, spec: Lora, name: str, device: str) -> None:
        checks.assert_no_grad_path(spec, name, device)

    def test_arguments_are_untouched(self, spec: Lora, name: str, device: str) -> None:
        checks.assert_untouched(spec, name, device)

    def test_any_layout(self, spec: Lora, name: str, device: str) -> None:
        checks.assert_any_layout(spec, name, device)


@every_kernel
@specs([over(d, lead=(700,), width=w, out=o, rank=r, dropout=0.1) for d in (FP32, MIXED, DTYPES[4]) for w, o, r in ((96, 48, 24), (768, 768, 16), (33, 70, 7))])
def test_deterministic(spec: Lora, name: str, device: str) -> None:
    checks.assert_deterministic(spec, name, device)


@every_kernel
@specs([over(d, lead=(70,), width=w, out=o, rank=r) for d in (MIXED, DTYPES[4]) for w, o, r in ((48, 72, 12), (160, 96, 40))])
def test_parameters_are_rounded_first(spec: Lora, name: str, device: str) -> None:
    checks.assert_rounds_parameters(spec, name, device)


@every_pair
@specs([over(d, lead=(70,), biases="up", dropout=p) for d in (FP32, MIXED, DTYPES[3]) for p in (0.0, 0.4)])
def test_any_backward_after_any_forward(spec: Lora, forward: str, backward: str, device: str) -> None:
    checks.assert_within_rule(spec, forward, device, backward=backward)


@every_backend
def test_rows_beyond_2_31_elements(name: str, device: str) -> None:
    """Rows 2^30 elements apart: the offset of the third does not fit in 32 bits. The 4 GiB are reserved, not touched."""
    spec = over(DTYPES[4], lead=(3,), width=40, out=40, rank=8, dropout=0.3)
    tensors, dy = spec.draw(0, device), spec.cotangent(0, device)
    expected = checks.fused(spec, name, tensors, dy)
    apart = []
    torch.use_deterministic_algorithms(False)  # or the whole buffer would be filled with NaN
    for t in (tensors["x"], tensors["y"], dy):
        rows = torch.empty(2 * 2**30 + 8 + spec.width, dtype=spec.dtype, device=device).as_strided((3, spec.width), (2**30 + 4, 1))
        apart.append(rows.copy_(t))
    checks.assert_same_bits(expected, checks.fused(spec, name, {**tensors, "x": apart[0], "y": apart[1]}, apart[2]))


@every_kernel
@specs([over(d, lead=(130,), width=w, out=w, rank=r, scale=0.7) for d in DTYPES for w, r in ((33, 7), (96, 24))])
def test_without_dropout_it_is_a_bottleneck_of_identity(spec: Lora, name: str, device: str) -> None:
    """The very bits of `bottleneck` with the projection's output as residual."""
    tensors, dy = spec.draw(0, device), spec.cotangent(0, device)
    expected = checks.fused(spec, name, tensors, dy)

    def bottleneck(t: dict[str, Tensor]) -> Tensor:
        return functional.bottleneck(t["x"], t["w_down"], t["w_up"], activation="identity", residual=t["y"], scale=spec.scale)

    with checks.runs_on("bottleneck", name):
        checks.assert_same_bits(checks.evaluate(bottleneck, tensors, dy), expected)  # type: ignore[arg-type]


# Dropout.


def test_philox_gives_the_published_numbers() -> None:
    """The known answers of Random123 (Salmon et al. 2011) for philox4x32 of 10 rounds: zeros, ones, and the digits of pi."""
    low = 0xFFFFFFFF
    known = {
        ((0, 0, 0, 0), (0, 0)): (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8),
        ((low, low, low, low), (low, low)): (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD),
        ((0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344), (0xA4093822, 0x299F31D0)): (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    }
    for (counter, key), words in known.items():
        assert tuple(int(w) for w in philox(tuple(torch.tensor(c) for c in counter), key)) == words


@pytest.mark.parametrize("seed", [0, -1, 2**63 - 1, -(2**63), 12345678901234])
def test_the_mask_is_that_of_another_implementation(seed: int) -> None:
    """`keep`, eager and compiled, against numpy's unsigned integers."""
    for rows, width, p in ((37, 41, 0.1), (3, 4, 0.5), (1, 1, 0.9), (5, 770, 1 - 2**-40), (0, 7, 0.5)):
        key, x = torch.tensor([seed]), torch.empty(rows, width)
        expected = eager.kept(key, x, p)
        assert torch.equal(keep(key, rows, width, p), expected)
        assert torch.equal(torch.compile(keep, fullgraph=True, backend="aot_eager")(key, rows, width, p), expected)


def ones(rows: int, width: int, name: str, device: str) -> Tensor:
    """In float32 where the backend takes it."""
    return torch.ones(rows, width, dtype=torch.bfloat16 if name == "cuda" else torch.float32, device=device)


def dropped(x: Tensor, dropout: float, seed: Tensor | None = None) -> Tensor:
    """D(x), through identity projections of x's own width."""
    eye = torch.eye(x.shape[-1], device=x.device, dtype=x.dtype)
    return functional.lora(x, torch.zeros_like(x), eye, eye.clone(), dropout=dropout, seed=seed)


def masks(x: Tensor, dropout: float, seed: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """What forward and what backward dropped of an x of ones: D(x), and its gradient, which is k where x is kept and else 0."""
    y = dropped(x.requires_grad_(), dropout, seed)
    return y.detach(), torch.autograd.grad(y.sum(), x)[0]


@every_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_forward_and_backward_drop_what_the_definition_says(dtype: torch.dtype, name: str, device: str) -> None:
    for rows, width, p in ((65, 40, 0.5), (300, 72, 0.1), (3, 33, 0.9)):
        seed = torch.tensor([-7], device=device)
        with checks.runs_on("lora", name):
            forward, backward = masks(torch.ones(rows, width, device=device, dtype=dtype), p, seed)
        kept = keep(seed, rows, width, p)
        assert torch.equal(forward != 0, kept) and torch.equal(backward, forward)
        assert torch.equal(forward, torch.where(kept, 1 / (1 - p), 0.0).to(dtype))


@every_backend
@specs([over(d, lead=(300,), width=72, out=40, dropout=0.3) for d in (FP32, MIXED)])
def test_against_the_formula_with_the_mask_written_out(spec: Lora, name: str, device: str) -> None:
    """In fp64, and without eager's autograd: the gradients are those that the paper's formula gives."""
    tensors, dy = spec.draw(0, device), spec.cotangent(0, device)
    got, same = checks.fused(spec, name, tensors, dy), checks.in_eager(spec, tensors, dy)
    x, y, a, b, g = (t.double() for t in (*(tensors[n] for n in ("x", "y", "w_down", "w_up")), dy))
    a, b = (w.to(spec.dtype).double() for w in (a, b))
    m = keep(torch.tensor([spec.seed], device=device), 300, spec.width, spec.dropout).double() / (1 - spec.dropout)
    z = (m * x) @ a.T
    exact = {"y": y + z @ b.T, "d x": m * (g @ b @ a), "d y": g, "d w_down": (g @ b).T @ (m * x), "d w_up": g.T @ z}
    assert got.keys() == exact.keys()
    for key in exact:
        assert_close_to_f64(key, got[key], exact[key], same[key], gradient=key.startswith("d "))


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
def test_almost_all_and_almost_nothing(name: str, device: str) -> None:
    """Probabilities that round to 1 and 0 of 2^32."""
    x, seed = torch.ones(40, 33, device=device), torch.tensor([3], device=device)
    with checks.runs_on("lora", name, counts=(2, 0)), torch.no_grad():
        assert not dropped(x, 1 - 1e-12, seed).any()
        assert torch.equal(dropped(x, 1e-12, seed), x)


@one_backend_or_cuda
def test_how_much_is_dropped(name: str, device: str) -> None:
    """The fraction kept, of all elements and of each column, and the agreement of two masks, within 5 standard deviations of what independent draws give."""
    x = ones(4096, 256, name, device)

    def assert_binomial(hits: Tensor, count: int, probability: float) -> None:
        assert ((hits.double() / count - probability).abs() <= 5 * math.sqrt(probability * (1 - probability) / count)).all()

    torch.manual_seed(0)
    for p in (0.1, 0.5):
        with checks.runs_on("lora", name, counts=(2, 0)), torch.no_grad():
            one, other = (dropped(x, p) != 0 for _ in range(2))
        assert_binomial(one.sum(), one.numel(), 1 - p)
        assert_binomial(one.sum(0), len(one), 1 - p)
        for a, b in ((one, other), (one[:-1], one[1:]), (one[:, :-1], one[:, 1:])):
            assert_binomial((a == b).sum(), a.numel(), p * p + (1 - p) ** 2)


@one_backend_or_cuda
def test_torchs_generator_gives_the_seed(name: str, device: str) -> None:
    """`torch.manual_seed` reproduces a call, the next call draws another mask, and neither without dropout nor with a seed given is a number drawn."""
    x = ones(64, 48, name, device)
    with checks.runs_on("lora", name, counts=(5, 0)), torch.no_grad():
        torch.manual_seed(5)
        first, second = dropped(x, 0.3), dropped(x, 0.3)
        torch.manual_seed(5)
        assert torch.equal(dropped(x, 0.3), first) and not torch.equal(first, second)
        state = torch.get_rng_state() if device == "cpu" else torch.cuda.get_rng_state()
        dropped(x, 0.0), dropped(x, 0.3, torch.tensor([1], device=device))
        assert torch.equal(torch.get_rng_state() if device == "cpu" else torch.cuda.get_rng_state(), state)


@one_backend_or_cuda
@pytest.mark.parametrize("reentrant", [False, True], ids=["non-reentrant", "reentrant"])
def test_a_checkpointed_call_draws_its_mask_again(name: str, device: str, reentrant: bool) -> None:
    """The recomputed forward has the seed of the first one: what is dropped of x's gradient is what was dropped of x."""
    x = ones(64, 48, name, device).requires_grad_()
    torch.manual_seed(1)
    with checks.runs_on("lora", name, counts=(2, 1)):
        y = checkpoint(lambda x: dropped(x, 0.3), x, use_reentrant=reentrant)
        torch.rand(3, device=device)
        y.sum().backward()
    assert torch.equal(x.grad, y) and 0 < (y == 0).sum() < y.numel()  # type: ignore[arg-type]


@one_backend_or_cuda
@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_compiled_calls_draw_their_masks(name: str, device: str, compiler: str) -> None:
    """Without a graph break, another mask each time, the same in backward."""
    torch._dynamo.reset()
    compiled = torch.compile(lambda x: dropped(x, 0.3), fullgraph=True, backend=compiler)
    x, seen = ones(64, 48, name, device).requires_grad_(), []
    with checks.runs_on("lora", name, counts=(3, 3)):
        for seed in (1, None, 1):
            if seed is not None:
                torch.manual_seed(seed)
            y = compiled(x)
            (gradient,) = torch.autograd.grad(y.sum(), x)
            assert torch.equal(gradient, y)
            seen.append(y.detach())
    assert torch.equal(seen[0], seen[2]) and not torch.equal(seen[0], seen[1])


def test_a_batched_transform_is_told_to_give_a_seed_or_say_how_to_draw() -> None:
    """torch's own rule for random numbers under vmap; with a seed all samples have one mask."""
    x = torch.ones(3, 8, 16)
    with pytest.raises(RuntimeError, match="randomness"):
        torch.func.vmap(lambda x: dropped(x, 0.5))(x)
    different = torch.func.vmap(lambda x: dropped(x, 0.5), randomness="different")(x)
    assert not torch.equal(different[0], different[1])
    same = torch.func.vmap(lambda x: dropped(x, 0.5, torch.tensor([1])))(x)
    assert torch.equal(same[0], same[1])
