"""`fastadapt.fuse` on PEFT's LoRA: the same numbers, training and files as PEFT's own layers, and everything else of them left alone."""

from __future__ import annotations

import contextlib
import copy
import importlib.util
import io
import sys
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import peft
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import Linear as LoraLinear
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard

import fastadapt
from fastadapt import functional
from fastadapt.interop import fusing
from tests.hosts import tiny
from tests.interop.same import assert_agree, ops_ran, results, same_numbers
from tests.tolerance import CURVE, Compared, assert_rule

IN, OUT, RANK = 24, 40, 6


class Host(nn.Module):
    """One square and one rectangular projection, an embedding and a convolution."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.words = nn.Embedding(30, IN, dtype=dtype)
        self.square = nn.Linear(IN, IN, dtype=dtype)
        self.wide = nn.Linear(IN, OUT, dtype=dtype)
        self.conv = nn.Conv1d(OUT, OUT, 3, padding=1, dtype=dtype)

    def forward(self, ids: Tensor) -> Tensor:
        h = self.wide(torch.tanh(self.square(self.words(ids))))
        return h + self.conv(h.transpose(1, 2)).transpose(1, 2)


def lora(seed: int = 0, targets: tuple[str, ...] = ("square", "wide"), dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    torch.manual_seed(seed)
    return get_peft_model(Host(dtype), LoraConfig(target_modules=list(targets), r=RANK, init_lora_weights=False, **options)).eval()


def ids(seed: int = 0, batch: int = 4) -> Tensor:
    return torch.randint(30, (batch, 9), generator=torch.Generator().manual_seed(seed))


def two(seed: int) -> Any:
    model = lora(seed)
    model.add_adapter("second", LoraConfig(target_modules=["square", "wide"], r=3, lora_alpha=5, init_lora_weights=False))
    model.base_model.set_adapter(["default", "second"])
    return model.eval()


@pytest.mark.parametrize(
    "options", [{}, {"use_rslora": True, "lora_alpha": 3}, {"lora_bias": True}, {"lora_dropout": 0.2}], ids=["plain", "rslora", "lora_bias", "dropout_in_eval"]
)
def test_one_adapter(options: dict[str, Any]) -> None:
    same_numbers(lambda seed: lora(seed, **options), lambda m, seed: m(ids(seed)), lora=2)


def test_several_adapters_at_once() -> None:
    """One op: their ranks are stacked."""
    same_numbers(two, lambda m, seed: m(ids(seed)), lora=2)


def test_of_several_adapters_one_of_scale_zero() -> None:
    own = two(0)
    for layer in (own.base_model.model.square, own.base_model.model.wide):
        layer.scaling["default"] = 0.0
    fused = copy.deepcopy(own)
    fastadapt.fuse(fused)
    assert_agree(fused(ids()), own(ids()))


def same_ranks(seed: int, **options: Any) -> Any:
    model = lora(seed, **options)
    for name, alpha in (("second", 5), ("third", 8)):
        model.add_adapter(name, LoraConfig(target_modules=["square", "wide"], r=RANK, lora_alpha=alpha, init_lora_weights=False, **options))
    return model.eval()


@pytest.mark.parametrize("options", [{}, {"lora_bias": True}], ids=["plain", "lora_bias"])
def test_a_batch_that_mixes_adapters(options: dict[str, Any]) -> None:
    """One op a projection, whatever its widths."""
    names = ["second", "__base__", "default", "third", "second"]

    def make(seed: int) -> Any:
        model = same_ranks(seed, **options)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("lora_" in name)
        return model

    same_numbers(make, lambda m, seed: m(ids(seed, batch=5), adapter_names=names), routed_bottleneck=2)


def test_a_mixed_batch_of_different_ranks_runs_pefts_loop() -> None:
    own = two(0)
    fused = copy.deepcopy(own)
    fastadapt.fuse(fused)
    with torch.no_grad(), ops_ran():
        assert torch.equal(fused(ids(), adapter_names=["default", "second"] * 2), own(ids(), adapter_names=["default", "second"] * 2))
    with pytest.raises(ValueError, match="Length of `adapter_names` should be the same"):
        fused(ids(), adapter_names=["default"])


# Quantised bases.


class Packed(nn.Module):
    """A stand-in for the layers of quantisers: what they hold is integers, which the layer alone knows how to use, and it takes an input alone."""

    def __init__(self, infeatures: int, outfeatures: int) -> None:
        super().__init__()
        self.infeatures, self.outfeatures = infeatures, outfeatures
        self.qweight = nn.Parameter(torch.randint(-127, 128, (outfeatures, infeatures), dtype=torch.int8), requires_grad=False)
        self.register_buffer("scales", torch.rand(outfeatures, 1) / 127 / infeatures**0.5)

    def forward(self, x: Tensor) -> Tensor:
        return torch.nn.functional.linear(x, self.qweight.to(x.dtype) * self.scales)


QUANTISED = {"gptq": "GPTQLoraLinear", "awq": "AwqLoraLinear", "aqlm": "AqlmLoraLinear", "eetq": "EetqLoraLinear", "hqq": "HqqLoraLinear", "inc": "IncLoraLinear"}
"""PEFT's modules and their layers; those of the last two take batches that mix adapters."""


def quantised(name: str, seed: int, monkeypatch: pytest.MonkeyPatch) -> nn.Sequential:
    """Two of PEFT's own layers, each with two active adapters, over `Packed`. Some of these classes exist only beside the quantiser's library, of which PEFT imports one class."""
    module: Any = importlib.import_module(f"peft.tuners.lora.{name}")
    if not hasattr(module, QUANTISED[name]):
        for path in ("eetq", "hqq", "hqq.core", "hqq.core.quantize"):
            library: Any = ModuleType(path)
            library.EetqLinear = library.HQQLinear = Packed
            monkeypatch.setitem(sys.modules, path, library)
        monkeypatch.setattr(peft.import_utils, f"is_{name}_available", lambda: True)
        spec: Any = importlib.util.spec_from_file_location(module.__name__, module.__file__)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    torch.manual_seed(seed)
    layers = []
    for widths in ((IN, IN), (IN, OUT)):
        config = LoraConfig(init_lora_weights=False)
        layer = getattr(module, QUANTISED[name])(Packed(*widths), "default", config=config, r=RANK, lora_alpha=7)
        layer.update_layer("second", RANK, lora_alpha=5, config=config)
        layer.set_adapter(["default", "second"])
        layers.append(layer)
    return nn.Sequential(*layers).eval()


quantisers = pytest.mark.parametrize("name", QUANTISED)


def inputs(seed: int) -> Tensor:
    return torch.randn(4, 9, IN, generator=torch.Generator().manual_seed(seed))


def call(model: nn.Module, seed: int) -> Tensor:
    return model(inputs(seed).to(model[0].lora_A["default"].weight.dtype))  # type: ignore[index, operator]


@quantisers
def test_other_quantisers(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    same_numbers(lambda seed: quantised(name, seed, monkeypatch), call, lora=2)
    model = quantised(name, 0, monkeypatch)
    report = fastadapt.fuse(model)
    assert [(site.path, site.kind) for site in report.fused] == [(place, f"PEFT's lora.{QUANTISED[name]}") for place in ("0", "1")] and not report.left


@quantisers
def test_the_base_is_the_module_that_peft_runs(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some of these layers hold it under two names, and run that of the second."""
    model = quantised(name, 0, monkeypatch)
    model[0].base_layer = Packed(IN, IN)
    fused = copy.deepcopy(model)
    fastadapt.fuse(fused)
    with ops_ran(lora=2):
        assert_agree(call(fused, 0), call(model, 0))
    for layer in (*model, *fused):
        layer.enable_adapters(False)
    with ops_ran():
        assert torch.equal(call(fused, 0), call(model, 0))


@quantisers
def test_batches_that_mix_adapters_over_quantised_bases(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def mixed(model: nn.Module, seed: int) -> Tensor:
        x = inputs(seed).to(model[0].lora_A["default"].weight.dtype)  # type: ignore[index]
        for layer in model:  # type: ignore[attr-defined]
            x = layer(x, adapter_names=["second", "__base__", "default", "second"])
        return x

    if name in ("hqq", "inc"):
        return same_numbers(lambda seed: quantised(name, seed, monkeypatch), mixed, routed_bottleneck=2)
    model = quantised(name, 0, monkeypatch)
    for change in (lambda _: None, fastadapt.fuse):  # what PEFT refuses is refused
        change(model)
        with pytest.raises(TypeError, match=r"forward\(\) got an unexpected keyword argument 'adapter_names'"):
            mixed(model, 0)


def test_dropout_in_training_is_the_ops() -> None:
    model = lora(targets=("square",), lora_dropout=0.3).train()
    fastadapt.fuse(model)
    layer = model.base_model.model.square
    x = torch.randn(5, 7, IN)
    torch.manual_seed(3)
    got = layer(x)
    torch.manual_seed(3)
    seed = torch.randint(2**63 - 1, (1,))
    weights = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    assert torch.equal(got, functional.lora(x, layer.base_layer(x), *weights, scale=layer.scaling["default"], dropout=0.3, seed=seed))
    assert not torch.equal(layer(x), got)
    model.eval()
    assert torch.equal(layer(x), functional.lora(x, layer.base_layer(x), *weights, scale=layer.scaling["default"]))


@pytest.mark.parametrize("kind", ["Linear", "autocast", *QUANTISED])
def test_float32_adapters_over_half_precision(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """PEFT keeps adapters in float32 over a bf16 base. The result has the base's dtype either way."""
    autocast = kind == "autocast"
    base = torch.float32 if autocast else torch.bfloat16
    context = (lambda: torch.autocast("cpu", dtype=torch.bfloat16)) if autocast else contextlib.nullcontext

    def run(seed: int) -> dict[str, Compared]:
        own = quantised(kind, seed, monkeypatch)[0].to(base) if kind in QUANTISED else lora(seed, dtype=base, targets=("square",)).base_model.model.square
        if kind in QUANTISED:
            own.lora_A.float(), own.lora_B.float()
        assert own.lora_A["default"].weight.dtype == torch.float32
        exact, fused = copy.deepcopy(own).double(), nn.ModuleList([copy.deepcopy(own)])
        fastadapt.fuse(fused)
        x = torch.randn(32, IN, generator=torch.Generator().manual_seed(seed)).bfloat16()

        def call(layer: nn.Module, x: Tensor, context: Callable[[], Any] = context) -> dict[str, Tensor]:
            def inside(m: nn.Module) -> Tensor:
                with context():
                    return m(x)

            return results(layer, inside)

        with ops_ran(lora=1):
            got = call(fused[0], x.to(base))
        eager, want = call(own, x.to(base)), call(exact, x.double(), contextlib.nullcontext)
        assert got["out"].dtype == eager["out"].dtype == torch.bfloat16
        assert all(got[name].dtype == eager[name].dtype for name in got)
        return {name: Compared(got[name], want[name], eager[name], name != "out") for name in got}

    assert_rule(run, torch.bfloat16)


@pytest.mark.parametrize(("base", "adapter"), [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float16)])
def test_other_pairs_of_dtypes(base: torch.dtype, adapter: torch.dtype) -> None:
    """Adapters of a dtype that the op does not take over this base are cast, as PEFT casts the input."""
    own = lora(dtype=base, targets=("square",))
    layer = own.base_model.model.square
    layer.lora_A.to(adapter), layer.lora_B.to(adapter)
    fastadapt.fuse(own)
    with ops_ran(lora=1):
        got = results(layer, lambda m: m(torch.randn(4, IN, dtype=base)))
    assert got["out"].dtype == base and got["lora_A.default.weight"].dtype == adapter and all(t.isfinite().all() for t in got.values())


class Precise(nn.Linear):
    """A base that stays in float32 under autocast."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", enabled=False):
            return super().forward(x)


def test_a_base_that_autocast_does_not_change() -> None:
    torch.manual_seed(0)
    host = Host()
    host.square = Precise(IN, IN)
    own = get_peft_model(host, LoraConfig(target_modules=["square"], r=RANK, init_lora_weights=False)).eval()
    fused = copy.deepcopy(own)
    fastadapt.fuse(fused)
    x = torch.randn(4, 9, IN)
    with torch.autocast("cpu", dtype=torch.bfloat16), ops_ran(lora=1):
        got = fused.base_model.model.square(x)
    assert got.dtype == torch.float32
    assert_agree(got, own.base_model.model.square(x))  # without autocast


class Int8Linear(nn.Linear):
    """A stand-in for quantised layers: the weight is int8 and the layer alone knows how to use it."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(linear.in_features, linear.out_features, device="meta")
        self.scale = linear.weight.detach().abs().amax() / 127
        self.weight = nn.Parameter((linear.weight.detach() / self.scale).round().to(torch.int8), requires_grad=False)
        self.bias = nn.Parameter(linear.bias.detach(), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return torch.nn.functional.linear(x, self.weight.to(x.dtype) * self.scale.to(x.dtype), self.bias)


def test_a_quantised_base_runs_itself() -> None:
    def make(seed: int) -> Any:
        torch.manual_seed(seed)
        host = Host()
        host.square = Int8Linear(host.square)
        model = get_peft_model(host, LoraConfig(target_modules=["square", "wide"], r=RANK, init_lora_weights=False), autocast_adapter_dtype=False).eval()
        model.base_model.model.square.lora_A.float(), model.base_model.model.square.lora_B.float()
        return model

    same_numbers(make, lambda m, seed: m(ids(seed)), lora=2)


@pytest.mark.parametrize("kind", ["Linear8bitLt", "Linear4bit"])
def test_bitsandbytes(kind: str) -> None:
    bnb = pytest.importorskip("bitsandbytes")
    torch.manual_seed(0)
    host = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 128))
    for i, linear in enumerate(host):
        arguments: Any = {"has_fp16_weights": False} if kind == "Linear8bitLt" else {"quant_type": "nf4"}
        quantised = getattr(bnb.nn, kind)(linear.in_features, linear.out_features, **arguments)
        quantised.load_state_dict(linear.state_dict())
        host[i] = quantised.to("cpu")
    host.is_loaded_in_8bit, host.is_loaded_in_4bit = kind == "Linear8bitLt", kind == "Linear4bit"  # type: ignore[assignment]
    own = get_peft_model(host, LoraConfig(target_modules=["0", "1"], r=RANK, init_lora_weights=False)).eval()
    assert type(own.base_model.model[0]).__name__ == kind
    fused = copy.deepcopy(own)
    fastadapt.fuse(fused)

    def call(m: nn.Module) -> Tensor:
        return m(torch.randn(9, 64, generator=torch.Generator().manual_seed(1)))

    with ops_ran(lora=2):
        got = results(fused, call)
    want = results(own, call)
    assert got.keys() == want.keys()
    for name in got:
        assert_agree(got[name], want[name])


def test_torchao() -> None:
    torchao = pytest.importorskip("torchao.quantization")
    torch.manual_seed(0)
    host = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 128))
    torchao.quantize_(host, torchao.Int8WeightOnlyConfig())
    own = get_peft_model(host, LoraConfig(target_modules=["0", "1"], r=RANK, init_lora_weights=False)).eval()
    assert type(own.base_model.model[0]).__name__ == "TorchaoLoraLinear"
    fused = get_peft_model(nn.Sequential(*(layer.base_layer for layer in own.base_model.model)), LoraConfig(target_modules=["0", "1"], r=RANK)).eval()
    fused.load_state_dict(own.state_dict())
    fastadapt.fuse(fused)

    def call(m: nn.Module) -> Tensor:
        return m(torch.randn(9, 64, generator=torch.Generator().manual_seed(1)))

    with ops_ran(lora=2):
        got = results(fused, call)
    want = results(own, call)
    for name in want:
        assert_agree(got[name], want[name])


# Training.


def curve(model: nn.Module, steps: int = 20) -> list[float]:
    """The losses of AdamW on two batches in turn."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3)  # at 1e-2 float32 itself departs from float64 by 3e-5 on T5
    losses = []
    for step in range(steps):
        loss = model(**tiny.batch(step % 2)).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def tuned(family: str, **options: Any) -> Any:
    targets = ["q_proj", "v_proj", "fc1", "fc2"] if family == "bart" else ["q", "v", "wi", "wo"]
    return get_peft_model(tiny.tiny(family), LoraConfig(target_modules=targets, r=4, lora_alpha=64, **options))


@pytest.mark.parametrize(("family", "options"), [("bart", {}), ("t5", {}), ("bart", {"bias": "lora_only", "lora_bias": True})], ids=["bart", "t5", "bart_with_biases"])
def test_the_same_loss_curve(family: str, options: dict[str, Any]) -> None:
    own = tuned(family, **options)
    fused = copy.deepcopy(own)
    report = fastadapt.fuse(fused)
    assert len(report.fused) == 20 and not report.left
    with ops_ran(lora=20 * 20):
        got = curve(fused)
    want = curve(own)
    assert want[-1] < want[0] - 0.25, "the run did not train"
    assert all(abs(a - b) <= CURVE * abs(b) for a, b in zip(got, want, strict=True)), max(abs(a - b) / abs(b) for a, b in zip(got, want, strict=True))


def test_gradient_checkpointing() -> None:
    for reentrant in (False, True):
        own = tuned("bart").train()
        fused = copy.deepcopy(own)
        fastadapt.fuse(fused)
        fused.gradient_checkpointing_enable({"use_reentrant": reentrant})
        fused.enable_input_require_grads()
        losses = []
        for model in (own, fused):
            loss = model(**tiny.batch()).loss
            loss.backward()
            losses.append(loss)
        assert_agree(losses[1], losses[0])
        for a, b in zip(fused.parameters(), own.parameters(), strict=True):
            assert (a.grad is None) == (b.grad is None)
            if b.grad is not None:
                assert_agree(a.grad, b.grad)


def test_compiles_as_one_graph() -> None:
    model = lora()
    fastadapt.fuse(model)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    want, got = results(model, lambda m: m(ids())), results(model, lambda m: compiled(ids()))
    for name in want:
        assert_agree(got[name], want[name])


def test_generation_with_a_cache() -> None:
    own = tuned("bart", init_lora_weights=False).eval()
    fused = copy.deepcopy(own)
    fastadapt.fuse(fused)
    inputs = {key: value for key, value in tiny.batch().items() if key != "labels"}
    for options in ({}, {"num_beams": 3}):
        got, want = (model.generate(**inputs, max_new_tokens=6, do_sample=False, **options) for model in (fused, own))
        assert torch.equal(got, want)
    mixed, want = (model.generate(**inputs, adapter_names=["default", "__base__"], max_new_tokens=6, do_sample=False) for model in (fused, own))
    assert torch.equal(mixed, want)


@pytest.fixture
def one_process(tmp_path: Any) -> Iterator[None]:
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.usefixtures("one_process")
def test_ddp_and_fsdp2() -> None:
    model = tuned("bart")
    fastadapt.fuse(model)
    loss = model(**tiny.batch()).loss
    with ops_ran(lora=20):
        nn.parallel.DistributedDataParallel(model)(**tiny.batch()).loss.backward()
    grads = [p.grad for p in model.parameters() if p.requires_grad]
    assert all(grad is not None for grad in grads)
    stacks = model.base_model.model.model
    layer = stacks.encoder.layers[0].fc1
    for part in (layer, *stacks.encoder.layers, *stacks.decoder.layers, model):
        fully_shard(part)
    with ops_ran(lora=20):
        sharded = model(**tiny.batch()).loss
    sharded.backward()
    assert torch.equal(sharded, loss)
    before = type(layer)
    with pytest.raises(RuntimeError, match=r"a fused Linear has become a .*FSDPLinear; undo that first"):
        fastadapt.unfuse(model)
    assert type(layer) is before


# What stays PEFT's.


def test_parameters_keys_and_class_stay() -> None:
    own = same_ranks(0)
    model = copy.deepcopy(own)
    before = {name: id(p) for name, p in model.named_parameters()}, list(model.state_dict()), tiny.snapshot(model), repr(model)
    fastadapt.fuse(model)
    layer = model.base_model.model.square
    assert isinstance(layer, LoraLinear) and type(layer) is not LoraLinear and type(layer).__name__ == "Linear"
    assert ({name: id(p) for name, p in model.named_parameters()}, list(model.state_dict()), repr(model)) == (before[0], before[1], before[3])
    fastadapt.unfuse(model)
    tiny.assert_same(before[2], tiny.snapshot(model))
    assert type(layer) is LoraLinear


def test_pefts_own_methods_go_on_working() -> None:
    own = same_ranks(0)
    fused = copy.deepcopy(own)
    fastadapt.fuse(fused)

    def agree(**ran: int) -> None:
        with torch.no_grad(), ops_ran(**ran):
            got = fused(ids())
        with torch.no_grad():
            assert_agree(got, own(ids()))

    def both(act: Callable[[Any], object]) -> None:
        torch.manual_seed(5)
        act(own)
        torch.manual_seed(5)
        act(fused)

    agree(lora=2)
    both(lambda m: m.set_adapter("third"))
    agree(lora=2)
    with own.disable_adapter(), fused.disable_adapter():
        agree()
    both(lambda m: m.merge_adapter())
    agree()
    both(lambda m: m.unmerge_adapter())
    agree(lora=2)
    both(lambda m: m.delete_adapter("second"))
    both(lambda m: m.add_adapter("fourth", LoraConfig(target_modules=["square"], r=2, init_lora_weights=False)))
    both(lambda m: m.set_adapter("fourth"))
    agree(lora=1)
    both(lambda m: m.base_model.model.square.set_scale("fourth", 0.25))
    agree(lora=1)
    own, fused = own.merge_and_unload(), fused.merge_and_unload()
    agree()
    with pytest.raises(ValueError, match="no layer of this Host is fused"):
        fastadapt.unfuse(fused)


def test_files_are_the_same_before_and_after(tmp_path: Any) -> None:
    model = lora()
    model.save_pretrained(tmp_path / "before")
    fastadapt.fuse(model)
    model.save_pretrained(tmp_path / "after")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "before" / name).read_bytes() == (tmp_path / "after" / name).read_bytes()
    torch.manual_seed(0)
    loaded = PeftModel.from_pretrained(Host(), str(tmp_path / "after")).eval()
    fastadapt.fuse(loaded)
    assert torch.equal(loaded(ids()), model(ids()))
    loaded.load_adapter(str(tmp_path / "before"), "again")
    loaded.set_adapter("again")
    want = model(ids())
    with ops_ran(lora=2):
        assert torch.equal(loaded(ids()), want)


def test_copies_and_pickles_are_fused() -> None:
    model = lora()
    fastadapt.fuse(model)
    want = model(ids())
    copied = copy.deepcopy(model)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    fusing.fused_class.cache_clear()  # as in another process
    for other in (copied, torch.load(buffer, weights_only=False)):
        layer = other.base_model.model.square
        assert isinstance(layer, LoraLinear) and layer is not model.base_model.model.square
        with ops_ran(lora=2):
            assert torch.equal(other(ids()), want)
        fastadapt.unfuse(other)
        assert type(layer) is LoraLinear


def test_hooks_on_parts_run() -> None:
    model = lora()
    fastadapt.fuse(model)
    seen: list[str] = []
    layer = model.base_model.model.square
    layer.register_forward_hook(lambda *_: seen.append("layer"))
    with ops_ran(lora=2):
        model(ids())
    handle = layer.lora_A["default"].register_forward_hook(lambda *_: seen.append("part"))
    with ops_ran(lora=1):
        model(ids())
    handle.remove()
    with ops_ran(lora=2):
        model(ids())
    assert seen == ["layer", "part", "layer", "layer"]


def test_backward_hooks_on_parts_run() -> None:
    model = lora().train()
    fastadapt.fuse(model)
    seen: list[str] = []
    model.base_model.model.wide.lora_A["default"].register_full_backward_pre_hook(lambda *_: seen.append("part"))
    with ops_ran(lora=1):
        model(ids()).sum().backward()
    assert seen == ["part"]


def test_a_forward_put_on_a_part_runs() -> None:
    """As accelerate's dispatch puts one there."""
    model = lora()
    part = model.base_model.model.square.lora_A["default"]
    own = part.forward
    part.forward = lambda x: 10 * own(x)
    want = model(ids())
    fastadapt.fuse(model)
    with ops_ran(lora=1):
        assert_agree(model(ids()), want)
    del part.forward
    with ops_ran(lora=2):
        model(ids())


# What is left, and errors.


def test_what_cannot_be_fused_is_named() -> None:
    model = lora(targets=("square", "wide", "words", "conv"))
    model.add_adapter("dora", LoraConfig(target_modules=["wide"], r=2, use_dora=True, init_lora_weights=False))
    want = model(ids())
    model.base_model.set_adapter(["default", "dora"])
    mixed = model(ids())
    report = fastadapt.fuse(model)
    assert [(site.path, site.kind, site.op) for site in report.fused] == [(f"base_model.model.{name}", "PEFT's lora.Linear", "lora") for name in ("square", "wide")]
    assert [(site.path, site.kind) for site in report.left] == [("base_model.model.words", "PEFT's lora.Embedding"), ("base_model.model.conv", "PEFT's lora.Conv1d")]
    assert report.fused[1].note == "'dora' is DoraLinearVariant, which runs as before"
    text = str(report)
    assert "2 layers fused, 2 left alone" in text and "left alone: base_model.model.conv (1): PEFT's lora.Conv1d: its forward is not that of a LoRA Linear" in text
    with ops_ran(lora=1):
        assert_agree(model(ids()), mixed)
    model.base_model.set_adapter(["default"])
    with ops_ran(lora=2):
        assert_agree(model(ids()), want)


def test_layers_that_are_all_variants_and_other_tuners_are_left() -> None:
    torch.manual_seed(0)
    dora = get_peft_model(Host(), LoraConfig(target_modules=["square"], use_dora=True))
    report = fastadapt.fuse(dora)
    assert not report.fused and report.left[0].why == "its adapters are variants: 'default' is DoraLinearVariant"
    other = get_peft_model(Host(), peft.IA3Config(target_modules=["square"], feedforward_modules=[]))
    assert fastadapt.fuse(other).left == (fusing.LeftSite("base_model.model.square", "PEFT's ia3.Linear", "only LoRA has a fused op"),)


def test_a_subclass_with_a_forward_of_its_own_is_left() -> None:
    model = lora()
    layer = model.base_model.model.square
    layer.__class__ = type("Mine", (LoraLinear,), {"forward": lambda self, x: self.base_layer(x), "__module__": "peft.tuners.lora.layer"})
    assert [site.path for site in fastadapt.fuse(model).fused] == ["base_model.model.wide"]
    model.base_model.model.wide.forward = model.base_model.model.wide.forward
    fastadapt.unfuse(model)
    assert {site.why for site in fastadapt.fuse(model).left} == {
        "its forward is not that of a LoRA Linear",
        "has a forward of its own on the instance (accelerate's dispatch puts one there); fuse before that",
    }


def test_state_at_the_time_of_fusing_is_reported() -> None:
    model = lora()
    model.merge_adapter()
    assert "default merged: runs as before until unmerged" in str(fastadapt.fuse(model))
    model.unmerge_adapter()
    model.base_model.disable_adapter_layers()
    assert "adapters disabled: runs as before until enabled" in str(fastadapt.fuse(model))
    model.base_model.enable_adapter_layers()
    assert {site.note for site in fastadapt.fuse(model).fused} == {""}


def test_fusing_again_changes_nothing() -> None:
    model = lora()
    first = fastadapt.fuse(model)
    classes = [type(m) for m in model.modules()]
    assert fastadapt.fuse(model) == first and [type(m) for m in model.modules()] == classes


def test_errors_leave_the_model_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(TypeError, match=r"model: must be an nn.Module, not dict"):
        fastadapt.fuse({})  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"model: must be an nn.Module, not dict"):
        fastadapt.unfuse({})  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"no layer of this Host is known; known are PEFT's LoRA layers, AdapterHub's .* Compacter repositories"):
        fastadapt.fuse(Host())
    model = lora()
    before = tiny.snapshot(model)
    # The second layer refuses its class.
    model.base_model.model.wide.__class__ = type("Stubborn", (LoraLinear,), {"__setattr__": _refuse, "__module__": LoraLinear.__module__})
    with pytest.raises(RuntimeError, match=r"refused"):
        fastadapt.fuse(model)
    object.__setattr__(model.base_model.model.wide, "__class__", LoraLinear)
    tiny.assert_same(before, tiny.snapshot(model))


def _refuse(self: Any, name: str, value: Any) -> None:
    if name == "__class__":
        raise RuntimeError("refused")
    nn.Module.__setattr__(self, name, value)


def test_peft_inside_an_adapter_is_refused() -> None:
    """The adapter's op reads the projections' weights, and would run nothing that stands on them."""
    model = tiny.tiny("bart")
    fastadapt.patch(model, "vl_adapter", reduction_factor=4)
    wrapped = get_peft_model(model, LoraConfig(target_modules=["down_sampler"], init_lora_weights=False))
    with pytest.raises(TypeError, match="Linear: a layer of PEFT stands in an adapter, whose fused op would not run it; leave adapters out"):
        wrapped(**tiny.batch())
