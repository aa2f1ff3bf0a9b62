"""The methods of Compacter's repository on stock T5: counts to the digit, recorded tensors of the published code, starting values, and what a patch must be able to do."""

from __future__ import annotations

import copy
import io
import pickle
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import T5Config, T5ForConditionalGeneration
from transformers.models.t5.modeling_t5 import T5Block, T5LayerNorm

import fastadapt
from fastadapt import methods, patching
from fastadapt.hosts import t5
from fastadapt.nn import IntrinsicDimension, Prompt
from fastadapt.nn.intrinsic import Dense, Fastfood, walsh_hadamard
from fastadapt.patching import Handle, patch
from tests import golden
from tests.hosts.published import fp64_rms_norm  # noqa: F401
from tests.hosts.tiny import assert_same, batch, logits, randomize, snapshot, tiny
from tests.methods.test_methods import assert_normal, wide
from tests.tolerance import assert_matches_recorded

# Counts: the published ones, on a t5-base with the tokenizer's 32,100 tokens.

BASE = 222_882_048
ROWS = [
    ("houlsby", 1_855_104, 0.8323, 1.0649),
    ("pfeiffer", 951_360, 0.4268, 1.0324),
    ("adapterdrop", 1_101_984, 0.4944, 1.0378),
    ("low_rank", 161_664, 0.0725, 1.0041),
    ("phm_adapter", 398_976, 0.1790, 1.0126),
    ("compacter_t5", 161_728, 0.0726, 1.0041),
    ("compacter++", 104_704, 0.0470, 1.0020),
    ("bitfit_t5", 280_932, 0.1260, 1.0101),
    ("prompt_tuning", 76_800, 0.0345, 1.0028),
    ("prompt_tuning_tokens", 76_800, 0.0345, 1.0028),
    ("said", 20_000, None, None),
    ("said_dense", 20_000, None, None),
]


@pytest.fixture(scope="module")
def t5_base() -> nn.Module:
    with torch.device("meta"):
        return T5ForConditionalGeneration(T5Config(vocab_size=32_100, d_model=768, d_kv=64, d_ff=3072, num_layers=12, num_heads=12))


@pytest.mark.parametrize(("preset", "trainable", "percent", "eight_tasks"), ROWS)
def test_counts(t5_base: nn.Module, preset: str, trainable: int, percent: float | None, eight_tasks: float | None) -> None:
    """Trained parameters, their percentage of the base, and the size of the base with eight tasks' additions."""
    assert sum(p.numel() for p in t5_base.parameters()) == BASE
    handle = patch(t5_base, preset)
    report = handle.report
    handle.unpatch()
    assert report.trainable == trainable
    assert percent is None or round(100 * trainable / BASE, 4) == percent
    assert eight_tasks is None or round(((report.total - BASE) * 8 + BASE) / BASE, 4) == eight_tasks


def test_places() -> None:
    """Never behind cross-attention; "pfeiffer" behind self-attention only, Compacter++ behind the feed-forward network only."""
    places = {}
    for preset in ("houlsby", "pfeiffer", "compacter++"):
        places[preset] = {re.sub(r"\.\d+", "", name) for name in patch(tiny("t5"), preset, reduction_factor=8).sites}
    both = {f"{stack}.{name}" for stack in ("encoder", "decoder") for name in ("self_attention", "feed_forward")}
    assert places == {"houlsby": both, "pfeiffer": {n for n in both if "self" in n}, "compacter++": {n for n in both if "feed" in n}}
    handle = patch(tiny("t5", layers=7), "adapterdrop", reduction_factor=8, decoder=False)
    assert list(handle.sites) == [f"encoder.{i}.{name}" for i in (5, 6) for name in ("self_attention", "feed_forward")]
    assert ("encoder.0.self_attention", "vl_adapter leaves out this layer") in handle.skipped
    assert len(handle.report.trained_base) == 7 * 5 + 2, "all norms, in layers without adapters too"


# Recorded tensors.

BLOCKS = ["comp_t5_block_houlsby", "comp_t5_block_self_attention_only", "comp_t5_block_feed_forward_only", "comp_t5_decoder_block_houlsby"]
published_norms = pytest.mark.usefixtures("fp64_rms_norm")


def renamed(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Published names to those of a patched stock T5: the rule is the first projection's, the prefix a prompt."""
    names = {"prefix_shared": "encoder.prompt.prefix_embedding.0.weight", "phm_rule": "encoder.block.0.layer.0.adapter.down_sampler.phm_rule"}
    return {names.get(name) or re.sub(r"adapter_controller\.adapters\.\w+", "adapter", name): t for name, t in tensors.items() if not name.endswith("prefix_emb")}


def compare(case: golden.Case, outputs: dict[str, Tensor], inputs: dict[str, Tensor], model: nn.Module, dtype: torch.dtype) -> None:
    """Outputs and gradients against the recorded ones; the trained set is the recorded one."""
    grads = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    wanted = renamed(case.param_grads)
    assert grads.keys() == wanted.keys() and outputs.keys() == case.outputs.keys()
    recorded = case.entry["fp32_run_max_rel_diff"]
    triples = [(n, outputs[n], t) for n, t in case.outputs.items()] + [(n, inputs[n].grad, t) for n, t in case.input_grads.items()]
    for name, got, want in triples + [(n, grads[n], t) for n, t in wanted.items()]:
        assert got is not None, f"{name}: no gradient"
        if dtype == torch.float64:
            assert_matches_recorded(name, got.reshape(want.shape), want)
        else:
            # The recordings' own rule: ten times the largest error of the published code in fp32, at least 2e-6, of the largest magnitude or 1.
            limit = max(10 * max(recorded.values()), 2e-6) * max(1.0, want.abs().max().item())
            assert (got.reshape(want.shape).double() - want).abs().max().item() <= limit, name


def run_block(case: golden.Case, dtype: torch.dtype) -> None:
    o, decoder = case.options, "decoder" in case.id
    config = T5Config(d_model=o["d_model"], num_heads=o["heads"], d_kv=o["d_model"] // o["heads"], d_ff=o["d_ff"], is_decoder=decoder)
    block = T5Block(config, has_relative_attention_bias=True, layer_idx=0).to(dtype).eval()
    switches = {name: o.get(f"add_adapter_in_{name}", True) for name in ("self_attention", "feed_forward")}
    patch(block, "houlsby", rank=o["bottleneck"], **switches)
    block.load_state_dict(renamed(golden.to(case.params, dtype)), strict=True)
    inputs = {name: t.requires_grad_(name in case.input_grads) for name, t in golden.to(case.inputs, dtype).items()}
    out = block(**inputs)[0]
    out.backward(case.cotangents["hidden_states"].to(dtype))
    compare(case, {"hidden_states": out}, inputs, block, dtype)


@published_norms
@pytest.mark.parametrize("case_id", BLOCKS)
def test_recorded_blocks_in_fp64(case_id: str) -> None:
    fastadapt.backend.ran(reset=True)
    run_block(golden.load_case(case_id), torch.float64)
    assert {name for _, _, name in fastadapt.backend.ran()} == {"reference"}


@pytest.mark.parametrize("case_id", BLOCKS)
def test_recorded_blocks_on_the_cpu_kernels(case_id: str) -> None:
    case = golden.load_case(case_id)
    explained = fastadapt.backend.explain("bottleneck", rows=8, width=case.options["d_model"], rank=case.options["bottleneck"], dtype=torch.float32, param_dtype=torch.float32)
    if why := explained.reasons.get("cpu"):
        pytest.skip("; ".join(why))
    fastadapt.backend.ran(reset=True)
    with fastadapt.backend.use("cpu"):
        run_block(case, torch.float32)
    assert {name for _, _, name in fastadapt.backend.ran()} == {"cpu"}


def recorded_model(case: golden.Case, dtype: torch.dtype, preset: str, prefix: str = "", **options: Any) -> tuple[Any, Handle]:
    """A stock T5 with the case's parameters, patched."""
    o, layers = case.options, int(case.options["layers"][0])
    sizes = {"vocab_size": o["vocab"], "d_model": o["d_model"], "d_kv": o["d_model"] // o["heads"], "num_heads": o["heads"], "d_ff": o["d_ff"], "num_layers": layers}
    model = T5ForConditionalGeneration(T5Config(**sizes, decoder_start_token_id=0, pad_token_id=0, eos_token_id=1)).to(dtype).eval()
    handle = patch(model, preset, **options)
    params = renamed({name.removeprefix(prefix): t for name, t in golden.to(case.params, dtype).items() if name.startswith(prefix)})
    model.load_state_dict(params, strict=False)
    missing = model.state_dict().keys() - params.keys()
    # A rule that all projections share is in the state dict under all their names.
    assert all("phm_rule" in name or name.startswith("intrinsic_dimension.") for name in missing) and params.keys() <= model.state_dict().keys()
    return model, handle


MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "comp_t5_compacter_shared_rule": ("compacter_t5", {"reduction_factor": 4}),
    "comp_t5_bitfit": ("bitfit_t5", {}),
    "comp_t5_prompt_tuning": ("prompt_tuning", {"encoder_prompt": 4}),
}


@published_norms
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("case_id", MODELS)
def test_recorded_models(case_id: str, dtype: torch.dtype) -> None:
    case = golden.load_case(case_id)
    preset, options = MODELS[case_id]
    model, _ = recorded_model(case, dtype, preset, **options)
    out = model(**case.inputs)
    out.loss.backward()
    outputs = {"logits": out.logits, "loss": out.loss.reshape(1), "encoder_last_hidden_state": out.encoder_last_hidden_state}
    compare(case, {name: outputs[name] for name in case.outputs}, {}, model, dtype)
    if "greedy_ids" in case.extra:
        text = {name: case.inputs[name] for name in ("input_ids", "attention_mask")}
        for cached in (True, False):
            assert torch.equal(model.generate(**text, num_beams=1, do_sample=False, max_length=8, use_cache=cached), case.extra["greedy_ids"])


@published_norms
def test_recorded_norm_with_a_bias() -> None:
    case = golden.load_case("comp_t5_layer_norm_bias")
    block = T5Block(T5Config(d_model=case.options["d_model"], num_heads=4, d_kv=12, d_ff=8), layer_idx=0).double()
    patch(block, "bitfit_t5")
    norm = block.layer[0].layer_norm
    norm.load_state_dict({name.removeprefix("layer_norm."): t for name, t in golden.to(case.params, torch.float64).items()}, strict=True)
    x = case.inputs["x"].double().requires_grad_()
    norm.weight.requires_grad_(True)
    y = norm(x)
    y.backward(case.cotangents["y"].double())
    found = {"x": x.grad, "layer_norm.weight": norm.weight.grad, "layer_norm.bias": norm.bias.grad}
    assert_matches_recorded("y", y, case.outputs["y"])
    for name, want in {**case.input_grads, **case.param_grads}.items():
        assert_matches_recorded(name, found[name], want)  # type: ignore[arg-type]


def set_projection(projection: Fastfood, case: golden.Case, suffix: str = "") -> None:
    for name in ("B", "Pi", "G"):
        getattr(projection, name).copy_(case.inputs[name + suffix])


@pytest.mark.parametrize("case_id", ["comp_fastfood_D48", "comp_fastfood_D64"])
@pytest.mark.parametrize("published", [False, True])
def test_recorded_fastfood(case_id: str, published: bool) -> None:
    """The published gradient is the true one divided by the transform's length."""
    case = golden.load_case(case_id)
    projection = Fastfood(case.options["D"], published_gradient=published, dtype=torch.float64)
    assert projection.G.numel() == case.options["LL"]
    set_projection(projection, case)
    v = case.params["intrinsic_parameter"].double().requires_grad_()
    y = projection(v)
    assert_matches_recorded("y", y, case.outputs["y"])
    (y * case.inputs["w"]).sum().backward()
    assert_matches_recorded("grad_v", v.grad, case.extra["grad_v_published" if published else "grad_v_true"])  # type: ignore[arg-type]


@published_norms
def test_recorded_said() -> None:
    case = golden.load_case("comp_t5_said_fastfood")
    model, handle = recorded_model(case, torch.float64, "said", "model.", dimension=case.options["intrinsic_dim_asked"])
    whole = handle.sites["intrinsic_dimension"]
    names = [name for name, _ in model.named_parameters() if not name.startswith("intrinsic_dimension.")]
    assert names == case.options["hook_order"][1:], "the order in which the factors go to the tensors"
    for k, name in enumerate(names):
        set_projection(whole.projections[k], case, f"/{name}")  # type: ignore[union-attr, index]
    whole.load_state_dict({name: case.params[name].double() for name in ("intrinsic_parameter", "intrinsic_parameter_said")}, strict=True)
    out = model(**case.inputs)
    outputs = {"logits": out.logits, "loss": out.loss.reshape(1)}
    for key in case.outputs.keys() - outputs.keys():
        name = key.removeprefix("theta/")
        outputs[key] = whole(names.index(name), model.get_parameter(name))
    assert outputs.keys() == case.outputs.keys()
    for name, want in case.outputs.items():
        assert_matches_recorded(name, outputs[name], want)


# Starting values.


def test_adapters_start_as_in_the_repository() -> None:
    """N(0, 0.01) and zero biases; rules N(0, 0.01) where each projection has its own, else N(0, 1e-4)."""
    handle = patch(wide("t5"), "houlsby", reduction_factor=4)
    for name, p in ((n, p) for m in handle.sites.values() for n, p in m.named_parameters()):
        if name.endswith("bias"):
            assert not p.any()
        else:
            assert_normal(p.detach(), 0.01)
    own = patch(wide("t5"), "phm_adapter", division=8, reduction_factor=4)
    assert_normal(torch.cat([m.down_sampler.phm_rule.detach().flatten() for m in own.sites.values()]), 0.01)
    shared = patch(wide("t5"), "compacter_t5", division=16, reduction_factor=4)
    rules = {id(p): p for m in shared.sites.values() for n, p in m.named_parameters() if "phm_rule" in n}
    assert len(rules) == 1
    assert_normal(next(iter(rules.values())).detach(), 1e-4)


def test_prompts_start_at_random_or_with_tokens() -> None:
    model = tiny("t5")
    table = model.shared.weight
    handle = patch(model, "prompt_tuning_tokens", encoder_prompt=5)
    (prompt,) = handle.sites.values()
    assert torch.equal(prompt(), table[:5]) and prompt().data_ptr() != table.data_ptr()
    assert [name for name, _ in prompt.named_parameters()] == ["prefix_embedding.0.weight"], "the table is not the prompt's"
    handle.unpatch()
    (prompt,) = patch(model, "prompt_tuning", encoder_prompt=50).sites.values()
    assert 0.45 < prompt().abs().max().item() <= 0.5


def test_tokens_are_copied_after_loading() -> None:
    """Patched without values, then loaded: the published code copies the rows of a table that has not been loaded yet."""
    weights = tiny("t5").state_dict()
    with torch.device("meta"):
        model = T5ForConditionalGeneration(tiny("t5").config)
    handle = patch(model, "prompt_tuning_tokens", encoder_prompt=5)
    model.to_empty(device="cpu")
    model.load_state_dict(weights, strict=False)
    handle.reset_parameters()
    (prompt,) = handle.sites.values()
    assert torch.equal(prompt(), weights["shared.weight"][:5])


def test_said_starts_at_the_base_and_has_the_same_projections_for_a_seed() -> None:
    model, other, third = tiny("t5"), tiny("t5"), tiny("t5")
    before = logits(model)
    first, second = (patch(m, "said", dimension=120).sites["intrinsic_dimension"] for m in (model, other))
    assert torch.equal(logits(model), before)
    assert not first.intrinsic_parameter.any() and torch.equal(first.intrinsic_parameter_said, torch.ones_like(first.intrinsic_parameter_said))
    seeded = patch(third, "said", dimension=120, seed=1).sites["intrinsic_dimension"]
    for a, b, c in zip(first.projections, second.projections, seeded.projections, strict=True):
        assert torch.equal(a.G, b.G) and torch.equal(a.Pi, b.Pi) and torch.equal(a.B, b.B) and not torch.equal(a.G, c.G)
        assert torch.equal(a.Pi.sort().values, torch.arange(a.Pi.numel(), dtype=torch.int32)) and set(a.B.tolist()) == {-1, 1}
    assert len({tuple(p.G[:16].tolist()) for p in first.projections}) == len(first.projections)
    assert_normal(torch.cat([p.G for p in first.projections]), 1.0)
    dense = patch(tiny("t5"), "said_dense", dimension=120, said=False).sites["intrinsic_dimension"]
    assert dense.intrinsic_parameter_said is None and dense.intrinsic_parameter.numel() == 120
    assert_normal(dense.projections[0].P, 0.01)


# The intrinsic dimension.


def test_walsh_hadamard_by_its_definition() -> None:
    x = torch.randn(2, 16, dtype=torch.float64)
    h = torch.ones(1, 1, dtype=torch.float64)
    for _ in range(4):
        h = torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64), h)
    assert_matches_recorded("H x", walsh_hadamard(x), x @ h)
    assert torch.equal(walsh_hadamard(x[:, :1]), x[:, :1])
    with pytest.raises(ValueError, match=r"x: the last of \(2, 3\) must be a power of two"):
        walsh_hadamard(x[:, :3])


@pytest.mark.parametrize("preset", ["said", "said_dense"])
@pytest.mark.parametrize("tied", [False, True])
def test_gradients_are_those_of_the_formula(preset: str, tied: bool) -> None:
    """Against a base whose tensors are theta, computed apart from the patch."""
    base, model = tiny("t5").double(), tiny("t5").double()
    handle = patch(model, preset, dimension=70, tied_output=tied)
    randomize(handle, std=0.05)
    whole = handle.sites["intrinsic_dimension"]
    model(**batch()).loss.backward()

    v, said = (p.detach().clone().requires_grad_() for p in (whole.intrinsic_parameter, whole.intrinsic_parameter_said))
    theta = {n: p.detach() + (said[k] * whole.projections[k](v)).view(p.shape) for k, (n, p) in enumerate(base.named_parameters())}
    untied = {} if tied else {"lm_head.weight": base.shared.weight.detach()}
    tables = dict.fromkeys(("encoder.embed_tokens.weight", "decoder.embed_tokens.weight", "lm_head.weight"), theta["shared.weight"])
    torch.func.functional_call(base, {**theta, **tables, **untied}, (), batch(), tie_weights=False).loss.backward()
    assert_matches_recorded("v", whole.intrinsic_parameter.grad, v.grad)  # type: ignore[arg-type]
    assert_matches_recorded("said", whole.intrinsic_parameter_said.grad, said.grad)  # type: ignore[arg-type]
    assert whole.intrinsic_parameter_said.grad[-1] == 0, "the last factor belongs to no tensor, as published"


def test_checkpointing_reads_the_moved_tensors_again() -> None:
    grads = []
    for checkpointing in (False, True):
        model = tiny("t5").double().train()
        handle = patch(model, "said", dimension=120)
        randomize(handle, std=0.05)
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model(**batch()).loss.backward()
        grads.append(handle.sites["intrinsic_dimension"].intrinsic_parameter.grad)
    # In fp64: the tensors' parts of the vector's gradient are added in another order.
    assert_matches_recorded("v", grads[1], grads[0])


def test_a_moved_layer_compiles() -> None:
    model = tiny("t5")
    randomize(patch(model, "said", dimension=120, published_gradient=True), std=0.05)
    layer, x = model.encoder.block[0].layer[1].DenseReluDense.wi, torch.randn(2, 5, 32)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    v = model.intrinsic_dimension.intrinsic_parameter
    results = []
    for call in (layer, compiled):
        y = call(x)
        (grad,) = torch.autograd.grad(y.square().sum(), v)
        results.append((y, grad))
    assert torch.equal(results[0][0], results[1][0]) and torch.equal(results[0][1], results[1][1])


def test_a_moved_model_in_a_new_process(tmp_path: Path) -> None:
    """The layers' classes are made on demand; pickle finds them where none has been made."""
    model = tiny("t5")
    randomize(patch(model, "said", dimension=120), std=0.05)
    with torch.no_grad():
        assert torch.equal(pickle.loads(pickle.dumps(model))(**batch()).logits, logits(model))
    layer, x = model.encoder.embed_tokens, torch.tensor([3, 1])
    torch.save((layer, x, layer(x).detach()), tmp_path / "layer.pt")
    code = "import sys, torch; layer, x, want = torch.load(sys.argv[1], weights_only=False); print(type(layer).__mro__[2].__name__, torch.equal(layer(x), want))"
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "layer.pt")], capture_output=True, text=True)
    assert done.stdout.strip() == "Embedding True", done.stderr


def test_a_half_precision_base_moves_by_float_updates() -> None:
    model = tiny("t5").bfloat16()
    handle = patch(model, "said", dimension=120)
    whole = handle.sites["intrinsic_dimension"]
    assert whole.intrinsic_parameter.dtype == whole.projections[0].G.dtype == torch.float32
    assert whole(0, model.shared.weight).dtype == torch.bfloat16
    model(**batch()).loss.backward()
    assert whole.intrinsic_parameter.grad.any()


# BitFit.


def test_biases_have_the_published_names_and_go_again() -> None:
    model = tiny("t5")
    before, out = snapshot(model), logits(model)
    handle = patch(model, "bitfit_t5")
    added = {name for name in model.state_dict() if name not in before["values"]}
    linears = {name for name, m in model.named_modules() if isinstance(m, nn.Linear)}
    norms = {name for name, m in model.named_modules() if isinstance(m, T5LayerNorm) and "final" not in name}
    assert added == {f"{name}.bias" for name in linears | norms} and "lm_head.bias" in added
    assert added == {name for name, p in model.named_parameters() if p.requires_grad} and len(handle.report.trained_base) == len(added)
    assert {type(m) for m in model.modules() if isinstance(m, T5LayerNorm)} == {T5LayerNorm, t5.T5LayerNorm}
    assert torch.equal(logits(model), out)
    randomize(handle)
    moved = logits(model)
    with handle.disabled():
        assert torch.equal(logits(model), out) and "lm_head.bias" not in dict(model.named_parameters())
    assert torch.equal(logits(model), moved)
    handle.remember_base()
    handle.reset_parameters()
    assert torch.equal(logits(model), out)
    handle.unpatch(restore_base=True)
    assert_same(before, snapshot(model))


def test_biases_take_the_bases_dtype() -> None:
    model = tiny("t5").bfloat16()
    handle = patch(model, "bitfit_t5")
    assert {p.dtype for p in handle.trainable_parameters()} == {torch.bfloat16}
    model(**batch()).loss.backward()
    assert all(p.grad is not None for p in handle.trainable_parameters())


# What a patch must be able to do, for each preset.

SMALL: dict[str, dict[str, Any]] = {
    "houlsby": {"reduction_factor": 4},
    "pfeiffer": {"reduction_factor": 4},
    "adapterdrop": {"reduction_factor": 4, "layers": [1]},
    "low_rank": {"reduction_factor": 4},
    "phm_adapter": {"reduction_factor": 4, "division": 4},
    "compacter_t5": {"reduction_factor": 4},
    "compacter++": {"reduction_factor": 4},
    "bitfit_t5": {},
    "prompt_tuning": {"encoder_prompt": 4},
    "prompt_tuning_tokens": {"encoder_prompt": 4},
    "said": {"dimension": 120},
    "said_dense": {"dimension": 120},
}


@pytest.mark.parametrize("preset", SMALL)
def test_trains_saves_loads_and_comes_out(preset: str, tmp_path: Path) -> None:
    model = tiny("t5")
    before, out = snapshot(model), logits(model)
    handle = patch(model, preset, **SMALL[preset])
    randomize(handle, std=0.1)
    start = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.SGD(handle.trainable_parameters(), lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        model(**batch()).loss.backward()
        optimizer.step()
    # A bias of the keys moves all scores of a query alike, which softmax does not see.
    assert all(not torch.equal(model.get_parameter(name), s) or name.endswith(".k.bias") for name, s in start.items())
    with handle.disabled():
        assert torch.equal(logits(model), out)
    handle.save(tmp_path)
    fresh = tiny("t5")
    patching.load(fresh, tmp_path)
    assert torch.equal(logits(fresh), logits(model))
    copied = copy.deepcopy(model)
    randomize(Handle.of(copied), seed=7)
    assert not torch.equal(logits(copied), logits(model)) and torch.equal(logits(fresh), logits(model))
    handle.unpatch(restore_base=True)
    assert_same(before, snapshot(model))


def test_an_identity_start_keeps_the_published_std() -> None:
    down = patch(wide("t5"), "houlsby", init="identity").sites["encoder.0.self_attention"].down_sampler
    assert_normal(down.weight, 0.01)
    assert not down.bias.any()


def test_presets_are_the_published_ones() -> None:
    assert set(SMALL) == {row[0] for row in ROWS} and set(SMALL) <= set(methods.available())
    config = methods.config("adapterdrop").resolved("t5", "repo")
    assert config.layers == (5, 6, 7, 8, 9, 10, 11) and config.stored()["layers"] == [5, 6, 7, 8, 9, 10, 11]
    assert methods.config("phm_adapter").rule_range == 0.01 and methods.config("compacter_t5").rule_range == 1e-4
    assert methods.config("said") == methods.IntrinsicDimensionConfig(dimension=20_000, projection="fastfood", said=True)


def test_the_model_saves_without_projections() -> None:
    model = tiny("t5")
    patch(model, "said", dimension=120)
    assert {name for name in model.state_dict() if "intrinsic" in name} == {f"intrinsic_dimension.intrinsic_parameter{s}" for s in ("", "_said")}
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        ("houlsby", {"layers": []}, r"layers: must be numbers of layers, from 0, or None for all, not \[\]"),
        ("houlsby", {"layers": [-1]}, r"layers: must be numbers of layers, from 0, or None for all, not \[-1\]"),
        ("houlsby", {"layers": [9]}, "layers: no stack has 9; encoder has 0 to 1, decoder has 0 to 1"),
        ("houlsby", {"self_attention": 1}, "self_attention: must be True or False, not 1"),
        ("houlsby", {"self_attention": False, "feed_forward": False}, "self_attention: must be True where"),
        ("houlsby", {"std": 0.0}, "std: must be a positive number or None, not 0.0"),
        ("prompt", {"prompt_start": "tokens"}, "prompt_start: must be 'random', or 'tokens' with prompt_mid=None, not 'tokens' with prompt_mid=800"),
        ("prompt_tuning", {"prompt_start": "text"}, "prompt_start: must be 'random', or 'tokens' with prompt_mid=None, not 'text' with prompt_mid=None"),
        ("prompt_tuning_tokens", {}, "table: must have at least 100 rows of 32, and mid must be None; not 99 rows of 32 and None"),
        ("prompt_tuning", {"init": "identity"}, "init: 'identity' is impossible with"),
        ("bitfit_t5", {"add_biases": "all"}, "add_biases: must be True or False, not 'all'"),
        ("said", {"dimension": 48}, "dimension: 48 must be above 48, one for each of the 47 tensors and one more, so that some are left for the vector"),
        ("said", {"dimension": 0}, "dimension: must be a positive integer, not 0"),
        ("said", {"projection": "random"}, "projection: must be one of fastfood, dense, not 'random'"),
        ("said_dense", {"published_gradient": True}, "published_gradient: only fastfood's differs from the true one, not that of projection='dense'"),
        ("said", {"seed": -1}, "seed: must be an integer from 0 to below 2\\^31, not -1"),
        ("said", {"said": 1}, "said: must be True or False, not 1"),
        ("said", {"add_biases": True}, "add_biases: not with an intrinsic dimension"),
    ],
)
def test_errors(method: str, options: dict[str, Any], message: str) -> None:
    model = tiny("t5")
    before = snapshot(model)
    with pytest.raises(ValueError, match=message):
        patch(model, method, **options)
    assert_same(before, snapshot(model))


def test_what_cannot_be_moved_is_refused() -> None:
    model = tiny("t5")
    model.encoder.block[0].layer[1].DenseReluDense.wi.weight = nn.Parameter(torch.zeros(64, 32, dtype=torch.int8), requires_grad=False)
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"model: an intrinsic dimension moves floating tensors on one device, cpu; one is torch.int8 on cpu"):
        patch(model, "said", dimension=120)
    assert_same(before, snapshot(model))
    model = tiny("t5")
    model.shared.weight_reparametrised = nn.Identity()
    with pytest.raises(ValueError, match="model: shared has a 'weight_reparametrised' already"):
        patch(model, "said", dimension=120)


def test_a_dense_projection_ignores_autocast() -> None:
    torch.manual_seed(0)
    projection, v = Dense(40, 7), torch.randn(7)
    want = projection(v)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(projection(v), want)


def test_modules_alone() -> None:
    """Without a model: theta of two tensors, and a prompt with a table."""
    whole = IntrinsicDimension([6, 4], 8, dtype=torch.float64)
    with torch.no_grad():
        whole.intrinsic_parameter.normal_()
    tensors = torch.randn(2, 3, dtype=torch.float64), torch.randn(4, dtype=torch.float64)
    for k, tensor in enumerate(tensors):
        assert_matches_recorded(f"theta {k}", whole(k, tensor), tensor + whole.projections[k](whole.intrinsic_parameter).view(tensor.shape))
        assert torch.equal(whole.of(k)(tensor), whole(k, tensor)) and not list(whole.of(k).parameters())
    table = nn.Embedding(7, 4)
    assert torch.equal(Prompt(3, 4, table=table)(), table.weight[:3])
