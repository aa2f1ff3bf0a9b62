"""Kronecker and low-rank projections, adapters per task and LoRA: against recorded tensors of the published code, and by their formulas."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers.pytorch_utils import Conv1D

import fastadapt
from fastadapt import backend
from fastadapt.nn import Bottleneck, Init, LoRA, LowRankLinear, MergedLoRA, PerTask, PHMLinear, share
from tests import golden
from tests.methods.test_methods import assert_normal, assert_uniform
from tests.ops.checks import ran as ran_of_adapters
from tests.ops.checks import runs_on
from tests.tolerance import assert_matches_recorded

PHM = [c for c in golden.case_ids() if c.startswith(("vla_phm", "comp_phm", "comp_compacter"))]
LOW_RANK = [c for c in golden.case_ids() if c.startswith(("vla_lowrank", "comp_lowrank"))]
LORA = ["vla_lora_r8", "vla_lora_r4_rect_2tasks"]


def adapter_of(case: golden.Case, params: dict[str, Tensor], dtype: torch.dtype) -> nn.Module:
    """The module of a recorded controller, with its parameters."""
    width, rank, first = case.options["d_model"], case.options["bottleneck"], case.options["tasks"][0]
    sizes = {name.removeprefix(f"adapters.{first}.down_sampler."): tuple(t.shape) for name, t in params.items() if f".{first}.down_sampler." in name}
    make: Callable[..., nn.Module] | None = None
    if "phm_rule" in sizes:
        factor = sizes["W_left"][2] if "W_left" in sizes else None
        make = lambda i, o, **k: PHMLinear(i, o, sizes["phm_rule"][0], rank=factor, **k)
    elif "W_left" in sizes:
        make = lambda i, o, **k: LowRankLinear(i, o, sizes["W_left"][1], **k)
    norms = {"norm_before": case.options["pre_layer_norm"], "norm_after": case.options["post_layer_norm"]}
    adapter = Bottleneck(width, rank, activation=case.options["activation"], projection=make, dtype=dtype, **norms)
    own = {name.removeprefix(f"adapters.{first}."): t for name, t in params.items() if f"adapters.{first}." in name or "layer_norm" in name}
    adapter.load_state_dict(own, strict=True)
    if case.entry.get("aliases", {}).get(f"adapters.{first}.up_sampler.phm_rule", "").endswith("down_sampler.phm_rule"):
        share(adapter.down_sampler, adapter.up_sampler, "phm_rule")
    return adapter


def run(case: golden.Case, dtype: torch.dtype, call: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    inputs = {name: t.requires_grad_() for name, t in golden.to(case.inputs, dtype).items()}
    outputs = call(inputs)
    torch.autograd.backward([outputs[name] for name in case.outputs], [case.cotangents[name].to(dtype) for name in case.outputs])
    return outputs, {name: t.grad for name, t in inputs.items()}  # type: ignore[misc]


@pytest.mark.parametrize("make", [lambda: PHMLinear(12, 8, 4), lambda: PHMLinear(12, 8, 4, rank=1, factorized_rule=True), lambda: LowRankLinear(12, 8, 2)])
def test_without_gradients_a_weight_is_made_once(make: Callable[[], Any]) -> None:
    """Until a parameter changes in value, place or dtype; with gradients always, and a copy or a pickle does not carry it along."""
    projection, calls = make(), []
    matrix = projection.matrix
    projection.matrix = lambda: calls.append(1) or matrix()
    for context in (torch.no_grad, torch.inference_mode):
        calls.clear()
        with context():
            first = projection.weight
            assert torch.equal(first, projection.weight) and len(calls) == 1
        with torch.no_grad():
            next(projection.parameters()).add_(1.0)
        with context():
            assert not torch.equal(first, projection.weight) and torch.equal(projection.weight, matrix().t()) and len(calls) == 2
            projection.load_state_dict({name: p * 2 for name, p in projection.state_dict().items()})
            assert torch.equal(projection.weight, matrix().t()) and len(calls) == 3
        assert projection.weight.requires_grad and projection.weight is not projection.weight and len(calls) == 6
    with torch.no_grad():
        held = projection.weight
        del projection.matrix
        assert copy.deepcopy(projection)._kept is None and projection._kept is not None
        assert projection.double().weight.dtype == torch.float64 and held.dtype == torch.float32


def test_fake_tensors_have_no_address_to_keep_a_weight_by() -> None:
    with FakeTensorMode(), torch.no_grad():
        projection = PHMLinear(12, 8, 4)
        assert projection.weight.shape == (8, 12) and projection._kept is None


def test_no_weight_is_kept_of_what_functional_call_puts() -> None:
    """A state may have the addresses of the one before, which is gone."""
    projection, x = LowRankLinear(12, 8, 2), torch.randn(2, 12)
    memory = {name: p.detach().numpy().copy() for name, p in projection.named_parameters()}
    with torch.no_grad():
        for factor in (1.0, 2.0, 3.0):
            for values in memory.values():
                values *= factor
            state = {name: torch.from_numpy(values) for name, values in memory.items()}
            want = x @ (state["W_left"] @ state["W_right"]) + state["b"]
            torch.testing.assert_close(torch.func.functional_call(projection, state, x), want)


@pytest.mark.parametrize("fused", [True, False])
def test_a_step_of_an_optimiser_is_seen(fused: bool) -> None:
    """Torch's fused ones raise no version."""
    for projection in (PHMLinear(12, 8, 4), LowRankLinear(12, 8, 2)):
        optimizer = torch.optim.AdamW(projection.parameters(), lr=0.1, fused=fused)
        projection(torch.randn(3, 12)).sum().backward()
        with torch.no_grad():
            before = projection.weight.clone()
            optimizer.step()
            assert not torch.equal(projection.weight, before)


@torch.no_grad()
def test_a_write_through_data_is_seen_after_train_or_eval() -> None:
    for projection in (PHMLinear(12, 8, 4), LowRankLinear(12, 8, 2)):
        for change in (projection.eval, projection.train):
            kept = projection.weight.clone()
            for p in projection.parameters():
                p.data.mul_(2)
            change()
            torch.testing.assert_close(projection.weight, 4 * kept)


def test_weights_are_made_in_their_own_dtype_under_autocast() -> None:
    for projection in (PHMLinear(12, 8, 4), PHMLinear(12, 8, 4, rank=2), LowRankLinear(12, 8, 2)):
        expected = projection.weight
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(projection.weight, expected) and projection.weight.dtype == torch.float32


@pytest.mark.parametrize("case_id", [*PHM, *LOW_RANK])
def test_recorded_in_fp64(case_id: str) -> None:
    case = golden.load_case(case_id)
    first = case.options["tasks"][0]
    adapter = adapter_of(case, golden.to(case.params, torch.float64), torch.float64)
    outputs, grads = run(case, torch.float64, lambda x: dict(zip(case.outputs, map(adapter, x.values()), strict=True)))
    for name, want in case.outputs.items():
        assert_matches_recorded(name, outputs[name], want)
    for name, want in case.input_grads.items():
        assert_matches_recorded(name, grads[name], want)
    found = {name if "layer_norm" in name else f"adapters.{first}.{name}": p.grad for name, p in adapter.named_parameters()}
    assert found.keys() == case.param_grads.keys(), "a shared rule is one parameter"
    for name, want in case.param_grads.items():
        assert_matches_recorded(name, found[name], want)


@pytest.mark.parametrize("case_id", [*PHM, *LOW_RANK])
def test_recorded_on_the_cpu_kernels(case_id: str) -> None:
    case = golden.load_case(case_id)
    adapter = adapter_of(case, golden.to(case.params, torch.float32), torch.float32)
    explained = fastadapt.backend.explain(rows=8, dtype=torch.float32, **adapter.call())
    if why := explained.reasons.get("cpu"):
        pytest.skip("; ".join(why))
    fastadapt.backend.ran(reset=True)
    with fastadapt.backend.use("cpu"):
        outputs, grads = run(case, torch.float32, lambda x: dict(zip(case.outputs, map(adapter, x.values()), strict=True)))
    assert {(op, name) for op, _, name in ran_of_adapters()} == {(adapter.call()["op"], "cpu")}
    recorded = max(case.entry["fp32_run_max_rel_diff"].values())
    for name, got, want in [*((n, outputs[n], t) for n, t in case.outputs.items()), *((n, grads[n], t) for n, t in case.input_grads.items())]:
        # The recordings' own rule: ten times the largest error of the published code in fp32, at least 2e-6, of the largest magnitude or 1.
        assert (got.double() - want).abs().max().item() <= max(10 * recorded, 2e-6) * max(1.0, want.abs().max().item()), name


def test_adapters_per_task_recorded() -> None:
    case = golden.load_case("vla_adapter_multiple_2tasks")
    module = PerTask({task: Bottleneck(case.options["d_model"], case.options["bottleneck"], dtype=torch.float64) for task in case.options["tasks"]})
    module.load_state_dict(golden.to(case.params, torch.float64), strict=True)

    def call(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        out = {}
        for task in case.options["tasks"]:
            module.set_task(task)
            out[f"y_out_{task}"] = module(inputs[f"x_{task}"])
        return out

    outputs, grads = run(case, torch.float64, call)
    for name, want in {**case.outputs, **case.input_grads}.items():
        assert_matches_recorded(name, {**outputs, **grads}[name], want)
    for name, p in module.named_parameters():
        assert_matches_recorded(name, p.grad, case.param_grads[name])


@pytest.mark.parametrize("case_id", LORA)
def test_lora_recorded(case_id: str) -> None:
    case = golden.load_case(case_id)
    p, o = golden.to(case.params, torch.float64), case.options
    base = nn.Linear(o["in_features"], o["out_features"], dtype=torch.float64)
    base.load_state_dict({name: p[name] for name in ("weight", "bias")})
    base.weight.requires_grad_(False)
    modules = {}
    for task in {name.rpartition(".")[2] for name in p if ".lora_As" in f".{name}"}:
        modules[task] = LoRA(o["in_features"], o["out_features"], o["r"], alpha=o["alpha"], dropout=0.1, dtype=torch.float64).eval()
        modules[task].load_state_dict({"lora_A.weight": p[f"lora_As.{task}"], "lora_B.weight": p[f"lora_Bs.{task}"]})
        assert modules[task].scale == o["scaling"]
    outputs, grads = run(case, torch.float64, lambda x: {f"y_{t}": modules[t](v, base(v)) for n, v in x.items() if (t := n.removeprefix("x_"))})
    for name, want in {**case.outputs, **case.input_grads}.items():
        assert_matches_recorded(name, {**outputs, **grads}[name], want)
    found = {f"lora_{kind}s.{task}": getattr(m, f"lora_{kind}").weight.grad for task, m in modules.items() for kind in "AB"} | {"bias": base.bias.grad}
    for name, want in case.param_grads.items():
        assert_matches_recorded(name, found[name], want)


@pytest.mark.parametrize(("n", "rank", "factorized"), [(2, None, False), (4, 1, False), (4, 3, True), (12, None, True)])
def test_kronecker_sum_by_its_indices(n: int, rank: int | None, factorized: bool) -> None:
    p = PHMLinear(24, 12, n, rank=rank, factorized_rule=factorized, rule_init="uniform", rule_range=1.0, dtype=torch.float64)
    rule = p.phm_rule if not factorized else torch.bmm(p.phm_rule_left, p.phm_rule_right)
    w = p.W if rank is None else torch.bmm(p.W_left, p.W_right)
    want = torch.zeros(24, 12, dtype=torch.float64)
    for a in range(n):
        for c in range(n):
            for k in range(24 // n):
                for q in range(12 // n):
                    want[a * (24 // n) + k, c * (12 // n) + q] = sum(rule[i, a, c] * w[i, k, q] for i in range(n))
    assert_matches_recorded("H", p.matrix(), want)
    x = torch.randn(3, 24, dtype=torch.float64)
    assert_matches_recorded("y", p(x), x @ want + p.b)


def test_autocast_leaves_the_weights_alone() -> None:
    for p in (PHMLinear(16, 8, 4, rank=1), LowRankLinear(16, 8, 2)):
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(p.matrix(), p.matrix().float()) and p.matrix().dtype == torch.float32


def test_starting_values() -> None:
    torch.manual_seed(0)
    p = PHMLinear(768, 96, 2)
    bound = math.sqrt(2) * math.sqrt(6 / (384 + 48))
    assert 0.99 * bound < p.W.abs().max().item() <= bound
    assert not p.b.any() and p.phm_rule.shape == (2, 2, 2)
    rules = torch.cat([PHMLinear(48, 48, 12, rule_range=0.01).phm_rule.flatten() for _ in range(4)])
    assert abs(rules.std().item() / 0.01 - 1) < 4 / math.sqrt(2 * rules.numel())
    low = LowRankLinear(768, 96, 1)
    assert low.W_left.abs().max().item() <= math.sqrt(2) * math.sqrt(6 / 769)


@pytest.mark.parametrize(
    ("make", "std"),
    [
        (lambda: LowRankLinear(768, 96, 96, weight_init="glorot-normal").W_left, math.sqrt(2) * math.sqrt(2 / (768 + 96))),
        (lambda: PHMLinear(768, 96, 2, weight_init="glorot-normal").W, math.sqrt(2) * math.sqrt(2 / (384 + 48))),
        (lambda: PHMLinear(96, 96, 4, weight_init="normal", init_range=0.5).W, 0.5),
    ],
    ids=["low-rank, glorot", "Kronecker, glorot", "Kronecker"],
)
def test_normal_starting_values(make: Callable[[], Tensor], std: float) -> None:
    torch.manual_seed(0)
    w = make().detach()
    assert_normal(w, std)
    assert w.abs().max() > 3 * std, "uniform ones of that deviation end at 1.73 of it"


def test_uniform_starting_values() -> None:
    torch.manual_seed(0)
    assert_uniform(PHMLinear(48, 48, 12, rule_init="uniform", rule_range=0.5).phm_rule.detach(), 0.5)
    assert_uniform(LoRA(64, 64, 64).lora_A.weight.detach(), 1 / math.sqrt(64))


@pytest.mark.parametrize("make", [lambda i, o, **k: PHMLinear(i, o, 4, **k), lambda i, o, **k: PHMLinear(i, o, 4, rank=1, **k), lambda i, o, **k: LowRankLinear(i, o, 2, **k)])
def test_identity_start_can_be_left(make: Callable[..., nn.Module]) -> None:
    """With a zero up-projection the output is the input, and a factor of the up-projection gets a gradient."""
    adapter = Bottleneck(16, 8, projection=make, init=Init(zero=("up_sampler",)))
    x = torch.randn(3, 16)
    y = adapter(x)
    assert torch.equal(y, x)
    y.square().sum().backward()
    assert adapter.up_sampler._parameters[adapter.up_sampler.scaled].grad.any()  # type: ignore[union-attr, index]


def test_lora_starts_exact_and_merges() -> None:
    torch.manual_seed(0)
    lora, x, y = LoRA(16, 16, 4, alpha=8), torch.randn(5, 16), torch.randn(5, 16)
    assert torch.equal(lora(x, y), y)
    lora = lora.double()
    nn.init.normal_(lora.lora_B.weight)
    x, y = x.double(), y.double()
    assert_matches_recorded("merged", lora(x, y), y + x @ lora.merged_delta().t())


def test_lora_dropout_in_training_only() -> None:
    lora, x, y = LoRA(16, 16, 4, dropout=0.5), torch.randn(64, 16), torch.zeros(64, 16)
    nn.init.normal_(lora.lora_B.weight)
    assert not torch.equal(lora(x, y), lora(x, y))
    lora.eval()
    assert torch.equal(lora(x, y), lora(x, y))


@pytest.mark.parametrize(("width", "out", "dropout"), [(16, 16, 0.0), (16, 24, 0.0), (24, 16, 0.3), (16, 16, 0.3)])
def test_lora_is_one_op(width: int, out: int, dropout: float) -> None:
    """Whatever its widths, dropout included; `explain` is asked about that very call."""
    lora, x, y = LoRA(width, out, 4, dropout=dropout), torch.randn(5, 7, width, requires_grad=True), torch.randn(5, 7, out)
    with runs_on("lora", "reference"):
        lora(x, y).sum().backward()
    assert lora.call() == {"op": "lora", "width": width, "rank": 4, "param_dtype": torch.float32, "out_width": out, "dropout": dropout > 0}
    backend.explain(rows=35, **lora.call())


def test_lora_of_a_fused_projection_is_lora_of_each() -> None:
    """Query and value of a fused query, key and value: outputs, gradients and merged weights of two separate modules."""
    torch.manual_seed(0)
    fused = MergedLoRA(16, 36, 4, enabled=(True, False, True), alpha=8, dtype=torch.float64)
    nn.init.normal_(fused.lora_B.weight)
    one, other = (LoRA(16, 12, 4, alpha=8, dtype=torch.float64) for _ in range(2))
    for i, lora in enumerate((one, other)):
        lora.load_state_dict({"lora_A.weight": fused.lora_A.weight[4 * i : 4 * i + 4], "lora_B.weight": fused.lora_B.weight[12 * i : 12 * i + 12]})
    x, y, dy = torch.randn(5, 16, dtype=torch.float64), torch.randn(5, 36, dtype=torch.float64), torch.randn(5, 36, dtype=torch.float64)
    q, k, v = y.chunk(3, -1)
    expected, got = torch.cat([one(x, q), k, other(x, v)], -1), fused(x, y)
    assert_matches_recorded("y", got, expected)
    assert_matches_recorded("merged", y + x @ fused.merged_delta().t(), expected)
    expected.backward(dy), got.backward(dy)
    for name in ("lora_A", "lora_B"):
        assert_matches_recorded(name, getattr(fused, name).weight.grad, torch.cat([getattr(lora, name).weight.grad for lora in (one, other)]))
    assert fused.call()["rank"] == 8 and fused.call()["out_width"] == 36
    assert torch.equal(MergedLoRA(16, 36, 4, enabled=(True, True, True))(x.float(), y.float()), y.float())


@pytest.mark.parametrize("projection", [nn.Linear(16, 24, bias=False), nn.Linear(16, 16), Conv1D(24, 16), Conv1D(16, 16)], ids=["linear", "square", "Conv1D", "square Conv1D"])
def test_a_merged_weight_gives_what_the_module_gave(projection: nn.Module) -> None:
    """Whichever way round the projection holds its weight."""
    projection, x = copy.deepcopy(projection).double(), torch.randn(5, 16, dtype=torch.float64)
    y = projection(x)
    lora = LoRA(16, y.shape[-1], 4, dropout=0.1, dtype=torch.float64).eval()
    nn.init.normal_(lora.lora_B.weight)
    expected, merged = lora(x, y), lora.merged_weight(projection)
    assert not torch.allclose(expected, y)
    projection.weight.data.copy_(merged)
    assert_matches_recorded("merged", projection(x), expected)


def test_what_cannot_be_merged() -> None:
    lora, projection = LoRA(16, 24, 4), nn.Linear(16, 24)
    for weight, match in ((torch.ones(192, 1, dtype=torch.uint8), r"torch.uint8 \(192, 1\)"), (torch.ones(16, 24), r"torch.float32 \(16, 24\)")):
        projection.weight = nn.Parameter(weight, requires_grad=False)
        with pytest.raises(ValueError, match=match):
            lora.merged_weight(projection)
    projection.weight = nn.Parameter(torch.full((24, 16), 6e4, dtype=torch.half))
    nn.init.constant_(lora.lora_A.weight, 1e3), nn.init.constant_(lora.lora_B.weight, 1e3)
    with pytest.raises(ValueError, match="would not be finite"):
        lora.merged_weight(projection)


def test_only_the_selected_task_gets_gradients() -> None:
    module = PerTask({task: Bottleneck(8, 4) for task in ("vqa", "gqa")}, ["up_sampler.weight", "up_sampler.bias"])
    module.set_task("gqa")
    module(torch.randn(3, 8)).sum().backward()
    with_gradient = {name for name, p in module.named_parameters() if p.grad is not None}
    # The shared up-projection is listed under the first task that holds it.
    assert with_gradient == {f"adapters.{t}.{n}" for t, m in (("gqa", "down_sampler"), ("vqa", "up_sampler")) for n in (f"{m}.weight", f"{m}.bias")}


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: PHMLinear(10, 8, 4), ValueError, "division: 4 must divide both widths, 10 and 8"),
        (lambda: PHMLinear(8, 8, 4, rule_range=-1.0), ValueError, "rule_range: must be a number, 0 or more, not -1.0"),
        (lambda: PHMLinear(8, 8, 4, init_range=10**400), ValueError, "init_range: must be a number, 0 or more, not 1000"),
        (lambda: PHMLinear(8, 8, 4, weight_init="phm"), ValueError, "weight_init: must be one of glorot-uniform, glorot-normal, normal, not 'phm'"),
        (lambda: PHMLinear(8, 8, 0), ValueError, "division: must be a positive integer, not 0"),
        (lambda: LowRankLinear(8, 8, 0), ValueError, "rank: must be a positive integer, not 0"),
        (lambda: LoRA(8, 8, 4, dropout=1.0), ValueError, "dropout: must be from 0 to below 1, not 1.0"),
        (lambda: LoRA(8, 8, 4, dropout=False), ValueError, "dropout: must be from 0 to below 1, not False"),
        (lambda: LoRA(8, 8, 4, dropout="0.1"), ValueError, "dropout: must be from 0 to below 1, not '0.1'"),  # type: ignore[arg-type]
        (lambda: LoRA(8, 8, 4, alpha=math.nan), ValueError, "alpha: must be a finite number, not nan"),
        (lambda: MergedLoRA(8, 9, 4, enabled=(True, False)), ValueError, r"enabled: must have a true part, and as many parts as divide out_features 9, not \(True, False\)"),
        (lambda: MergedLoRA(8, 9, 4, enabled=(False,) * 3), ValueError, "enabled: must have a true part"),
        (lambda: MergedLoRA(8, 9, 4, enabled=()), ValueError, "enabled: must have a true part"),
        (lambda: PerTask({}), ValueError, "tasks: an adapter per task needs at least one task"),
        (lambda: PerTask({"keys": nn.Identity()}), ValueError, "tasks: 'keys' cannot name a module"),
        (lambda: PerTask({"vqa": Bottleneck(8, 4)}).set_task("gqa"), ValueError, "task: 'gqa' has no adapter here; must be one of vqa"),
        (lambda: PerTask({"vqa": Bottleneck(8, 4)})(torch.randn(2, 8)), RuntimeError, "no task is selected"),
        (lambda: share(Bottleneck(8, 4), Bottleneck(8, 2), "up_sampler.weight"), ValueError, "up_sampler.weight: cannot be shared"),
        (lambda: Bottleneck(8, 4, heads=2, pair=True, projection=LowRankLinear), ValueError, "projection: only Linears can be block diagonal"),
    ],
)
def test_errors(make: Callable[[], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make()
