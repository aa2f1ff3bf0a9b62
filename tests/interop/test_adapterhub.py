"""`fastadapt.fuse` on AdapterHub's bottleneck layers.

The library needs an older transformers than fastadapt's hosts, so these tests run on small classes with its names and attributes, written from its documentation, and
`test_the_library_itself` in an environment that it makes.
"""

from __future__ import annotations

import copy
import itertools
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import fastadapt
from fastadapt import interop
from fastadapt.interop.fusing import FusedSite, LeftSite
from tests.hosts import tiny
from tests.interop.same import HUB_KINDS, Activations, assert_agree, hub_kind, ops_ran, results, rows, same_numbers

WIDTH, RANK, ROOT = 24, 8, Path(__file__).parents[2]


class ForwardContext:
    """Carries shared parameters and what the caller asked for through a forward pass."""

    current: ClassVar[Any] = None

    @classmethod
    def get_context(cls) -> Any:
        return cls.current


class PHMLayer(nn.Module):
    def __init__(self, inside: int, outside: int, position: str, factors: bool, rule: str, n: int = 4, rank: int = 2) -> None:
        super().__init__()
        self.name, self.position, self.phm_rank = "a", position, rank
        self.factorized_phm_W, self.factorized_phm_rule, self.shared_W_phm, self.shared_phm_rule = factors, rule == "factors", False, rule == "shared"
        if rule == "factors":
            self.phm_rule_left, self.phm_rule_right = nn.Parameter(torch.randn(n, n, 1)), nn.Parameter(torch.randn(n, 1, n))
        elif rule == "own":
            self.phm_rule = nn.Parameter(torch.randn(n, n, n))
        if factors:
            self.W_left, self.W_right = nn.Parameter(torch.randn(n, inside // n, rank)), nn.Parameter(torch.randn(n, rank, outside // n))
        else:
            self.W = nn.Parameter(torch.randn(n, inside // n, outside // n))
        self.b = nn.Parameter(torch.randn(outside))

    def forward(self, x: Tensor) -> Tensor:
        w = torch.bmm(self.W_left, self.W_right) if self.factorized_phm_W else self.W
        if self.shared_phm_rule:
            rule = ForwardContext.current.shared_parameters[self.name]["phm_rule"]
        else:
            rule = torch.bmm(self.phm_rule_left, self.phm_rule_right) if self.factorized_phm_rule else self.phm_rule
        return x @ sum(torch.kron(a, b) for a, b in zip(rule, w, strict=True)) + self.b


class Adapter(nn.Module):
    def __init__(
        self, activation: str = "relu", scaling: Any = 1.0, phm: tuple[bool, str] | None = None, before: bool = False, after: str = "", dropout: float = 0.0, gating: bool = False
    ):
        super().__init__()
        self.input_size, self.use_gating = WIDTH, gating
        self.add_layer_norm_before, self.add_layer_norm_after, self.adapter_residual_before_ln = before, bool(after), after == "residual first"
        down, up = (nn.Linear(WIDTH, RANK), nn.Linear(RANK, WIDTH)) if phm is None else (PHMLayer(WIDTH, RANK, "down", *phm), PHMLayer(RANK, WIDTH, "up", *phm))
        self.non_linearity = Activations(activation)
        self.adapter_down = nn.Sequential(*([nn.LayerNorm(WIDTH)] if before else []), down, self.non_linearity)
        self.adapter_up = up
        self.scaling = scaling if isinstance(scaling, float) else nn.Parameter(torch.randn(scaling))
        if after:
            self.adapter_norm_after = nn.LayerNorm(WIDTH)
        if gating:
            self.gate = nn.Linear(WIDTH, 1)
        self.dropout = nn.Dropout(dropout)

    def scaled(self, x: Tensor) -> tuple[Tensor, Tensor]:
        up = self.adapter_up(self.adapter_down(x))
        up = (self.DropPath(up) if hasattr(self, "DropPath") and type(self) is Adapter else up) * self.scaling  # the library's parallel one has it, and does not use it
        out = self.dropout(up)
        return (out * torch.sigmoid(self.gate(x)).mean(1).unsqueeze(-1) if self.use_gating else out), up

    def forward(self, x: Tensor, residual_input: Tensor, output_gating: bool = False) -> Any:
        out, up = self.scaled(x)
        if self.adapter_residual_before_ln:
            return self.adapter_norm_after(out + residual_input), None, up
        out = self.adapter_norm_after(out) if self.add_layer_norm_after else out
        return (out + residual_input, None, up, "gate") if output_gating else (out + residual_input, None, up)


class ParallelAdapter(Adapter):
    def forward(self, x: Tensor, residual_input: Tensor, output_gating: bool = False) -> Any:
        out, up = self.scaled(x)
        return (self.adapter_norm_after(out) if self.add_layer_norm_after else out), None, up


class State(NamedTuple):
    hidden_states: Tensor
    adapter_residual: Tensor
    bottleneck_up: Tensor | None = None
    last: str | None = None


class AdapterLayerBase:
    adapter_modules_name = ""


class Fuse(list[str]):
    """A composition whose adapters' up-projections are attended to."""


class BottleneckLayer(AdapterLayerBase, nn.Module):
    adapter_modules_name = "adapters"

    def __init__(self, **adapters: Adapter) -> None:
        super().__init__()
        self.adapters, self.adapter_fusion_layer = nn.ModuleDict(adapters), nn.ModuleDict()
        self.setup: Any = next(iter(adapters), None)
        self.gates: list[object] = []

    def get_active_setup(self) -> Any:
        return self.setup

    def compose_single(self, adapter_setup: str, state: State, lvl: int = 0) -> State:
        asked = getattr(ForwardContext.current, "output_adapter_gating_scores", False)
        found = self.adapters[adapter_setup](state.hidden_states, residual_input=state.adapter_residual, output_gating=asked)
        self.gates += found[3:]
        return state._replace(hidden_states=found[0], bottleneck_up=found[2], last=adapter_setup)

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        states = [self.compose_single(name, State(x, residual)) for name in ([self.setup] if isinstance(self.setup, str) else self.setup)]
        if isinstance(self.setup, Fuse):
            return torch.stack([state.bottleneck_up for state in states]).mean(0) + residual  # type: ignore[arg-type]
        return torch.stack([state.hidden_states for state in states]).sum(0)


class PrefixTuningLayer(AdapterLayerBase, nn.Module):
    adapter_modules_name = "prefixes"

    def __init__(self) -> None:
        super().__init__()
        self.prefixes = nn.ModuleDict({"a": nn.Linear(2, 2)})


def call(layer: nn.Module, seed: int) -> Tensor:
    return layer(rows(seed, layer, 4, 9, WIDTH), rows(seed + 1, layer, 4, 9, WIDTH))


@pytest.mark.parametrize("kind", [Adapter, ParallelAdapter])
@pytest.mark.parametrize(
    ("options", "op"),
    [
        ({}, "bottleneck"),
        ({"activation": "gelu_new", "scaling": 4.0}, "bottleneck"),
        ({"activation": "gelu", "scaling": 1}, "bottleneck"),
        ({"activation": "swish", "scaling": WIDTH}, "bottleneck"),
        ({"before": True}, "bottleneck"),
        ({"after": "residual last"}, "bottleneck"),
        ({"after": "residual first", "before": True, "scaling": 2.0}, "bottleneck"),
        ({"gating": True}, "bottleneck"),
        ({"dropout": 0.5}, "bottleneck"),
        ({"phm": (True, "own")}, "phm_bottleneck"),
        ({"phm": (True, "factors"), "scaling": 2.0}, "phm_bottleneck"),
        ({"phm": (True, "own"), "scaling": 1}, "bottleneck"),
        ({"phm": (False, "own")}, "bottleneck"),
    ],
    ids=lambda value: " ".join(f"{k}={v}" for k, v in value.items()) or "plain" if isinstance(value, dict) else value,
)
def test_an_adapter(kind: type[Adapter], options: dict[str, Any], op: str) -> None:
    def make(seed: int) -> nn.Module:
        torch.manual_seed(seed)
        return BottleneckLayer(a=kind(**options)).eval()

    same_numbers(make, call, **{op: 1})
    name = f"AdapterHub's {'parallel ' if kind is ParallelAdapter else ''}{'Compacter' if 'phm' in options else 'bottleneck'} adapter"
    assert fastadapt.fuse(make(0)).fused == (FusedSite("", name, op),)


def test_a_shared_rule_comes_from_the_forwards_context(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    rule = nn.Parameter(torch.randn(4, 4, 4))
    own = BottleneckLayer(a=Adapter(phm=(True, "shared")))
    own.rule = rule
    fused = copy.deepcopy(own)
    fastadapt.fuse(fused)
    found = []
    for layer in (own, fused):
        context = type("Context", (), {"shared_parameters": {"a": {"phm_rule": layer.rule}}})
        monkeypatch.setattr(ForwardContext, "current", context)
        found.append(results(layer, lambda m: call(m, 3)))
    assert found[0].keys() == found[1].keys() >= {"rule", "out"}
    for name in found[0]:
        assert_agree(found[1][name], found[0][name])


@pytest.mark.parametrize("kind", [Adapter, ParallelAdapter])
@pytest.mark.parametrize("depth", [False, True], ids=["dropout", "and stochastic depth"])
def test_dropout_in_training_is_the_librarys(kind: type[Adapter], depth: bool) -> None:
    torch.manual_seed(0)
    adapter = kind(dropout=0.3, scaling=2.0)
    if depth:
        adapter.DropPath = nn.Dropout2d(0.5)  # whole rows of the second dimension
    own = BottleneckLayer(a=adapter).train()
    fused = copy.deepcopy(own)
    fastadapt.fuse(fused)
    torch.manual_seed(5)
    want = call(own, 0)
    torch.manual_seed(5)
    with ops_ran(bottleneck=1):
        got = call(fused, 0)
    assert_agree(got, want)


def test_compositions_and_gating_scores(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    own = BottleneckLayer(a=Adapter(), b=Adapter(activation="gelu", scaling=2.0))
    fused = copy.deepcopy(own)
    assert fastadapt.fuse(fused).fused == (FusedSite("", "AdapterHub's bottleneck adapter", "bottleneck"),)
    for fusion, setup in ((False, ["a", "b"]), (True, Fuse(["a", "b"])), (True, "b")):
        for layer in (own, fused):
            layer.setup, layer.adapter_fusion_layer = setup, nn.ModuleDict({"a,b": nn.Identity()} if fusion else {})
        want = call(own, 1)
        with ops_ran(bottleneck=len(setup)):
            assert_agree(call(fused, 1), want)
    monkeypatch.setattr(ForwardContext, "current", type("Context", (), {"output_adapter_gating_scores": True}))
    with ops_ran():
        call(fused, 1)
    assert fused.gates == ["gate"]


def test_adapters_added_later_run_fused() -> None:
    layer = BottleneckLayer(a=Adapter())
    fastadapt.fuse(layer)
    layer.adapters["b"], layer.setup = ParallelAdapter(), "b"
    with ops_ran(bottleneck=1):
        call(layer, 0)


def test_autocast_keeps_the_residual_stream() -> None:
    torch.manual_seed(0)
    own = BottleneckLayer(a=Adapter())
    fused = copy.deepcopy(own)
    fastadapt.fuse(fused)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        want, got = call(own, 0), call(fused, 0)
    assert got.dtype == want.dtype == torch.float32
    assert_agree(got, want, torch.bfloat16)


@pytest.mark.parametrize("what", ["activation", "hook", "wrapped", "dtype"])
def test_what_the_op_does_not_take_runs_the_librarys_forward(what: str) -> None:
    layer = BottleneckLayer(a=Adapter(activation="tanh" if what == "activation" else "relu"))
    adapter: Any = layer.adapters["a"]
    seen: list[object] = []
    if what == "hook":
        adapter.register_forward_hook(lambda *_: seen.append(1))
    elif what == "wrapped":
        adapter.adapter_up = nn.Sequential(adapter.adapter_up)
    elif what == "dtype":
        layer.bfloat16()
    x = torch.randn(3, 5, WIDTH, dtype=torch.bfloat16 if what == "dtype" else torch.float32)
    want = layer(x, x)
    report = fastadapt.fuse(layer)
    assert ("no op has its activation" in str(report)) == (what == "activation")
    with ops_ran(**({"bottleneck": 1} if what == "dtype" else {})):
        assert torch.equal(layer(x, x), want) or what == "dtype"
    assert len(seen) == (2 if what == "hook" else 0)
    if what == "dtype":
        with pytest.raises(RuntimeError), ops_ran():  # float32 rows over bfloat16 weights: the library's own error
            layer(x.float(), x.float())


def test_what_is_left_and_named() -> None:
    odd = Adapter()
    odd.__class__ = type("Odd", (Adapter,), {"forward": lambda self, x, residual_input, output_gating=False: (x, None, x)})
    model = nn.ModuleList([BottleneckLayer(a=odd), PrefixTuningLayer(), BottleneckLayer(), BottleneckLayer(a=Adapter())])
    report = fastadapt.fuse(model)
    assert report.left == (
        LeftSite("0", "AdapterHub's BottleneckLayer", "its adapter 'a', a Odd, is no bottleneck of the library"),
        LeftSite("1", "AdapterHub's PrefixTuningLayer", "only bottleneck, parallel and Compacter adapters have a fused op"),
    )
    assert [site.path for site in report.fused] == ["3"]


def test_copies_pickles_and_unfusing() -> None:
    layer = BottleneckLayer(a=Adapter())
    keys = list(layer.state_dict())
    fastadapt.fuse(layer)
    want = call(layer, 0)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        with ops_ran(bottleneck=1):
            assert torch.equal(call(other, 0), want)
        fastadapt.unfuse(other)
        assert type(other) is BottleneckLayer and list(other.state_dict()) == keys


@pytest.mark.full
def test_the_library_itself(tmp_path: Path) -> None:
    """AdapterHub 1.3.0 in an environment of its own: the same numbers, losses, files and compositions on tiny BERT, BART and T5."""
    python = tmp_path / "bin" / "python"
    subprocess.run([sys.executable, "-m", "venv", str(tmp_path)], check=True)
    subprocess.run([str(python), "-m", "pip", "install", "--quiet", f"torch=={torch.__version__.split('+')[0]}", "adapters==1.3.0", "numpy", "safetensors"], check=True)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    bases = {}
    for family in ("bart", "t5"):
        folder = tmp_path / "files" / family
        folder.mkdir(parents=True)
        model = bases[family] = tiny.tiny(family)
        save_file({name: p.detach().clone() for name, p in model.named_parameters()}, folder / "base.safetensors")
        for kind in HUB_KINDS:
            patched = copy.deepcopy(model)
            method, options = hub_kind(kind, family)
            handle = fastadapt.patch(patched, method, **options)
            tiny.randomize(handle)
            interop.to_adapterhub(handle, folder / kind / "ours")
            save_file({"logits": answers(patched)}, folder / kind / "wanted.safetensors")
    program = str(Path(__file__).with_name("adapterhub_real.py"))
    done = subprocess.run([str(python), program, str(tmp_path / "files")], env=environment, capture_output=True, text=True)
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    wrong = [line for line in lines if not line.get("right", True)]
    assert done.returncode == 0 and lines and lines[-1] == {"cases": 50, "right": 50} and not wrong, f"{wrong}\n{done.stderr[-2000:]}"
    for family, kind in itertools.product(bases, HUB_KINDS):
        model, folder = copy.deepcopy(bases[family]), tmp_path / "files" / family / kind
        handle = interop.from_adapterhub(model, folder / "theirs")
        assert_agree(answers(model), load_file(folder / "theirs.safetensors")["logits"])
        assert {key: hub_kind(kind, family)[1][key] for key in ("rank", "activation")} == {key: getattr(handle.config, key) for key in ("rank", "activation")}


def answers(model: Any) -> Tensor:
    """As the other program asks."""
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(3, 90, (4, 9), generator=generator)
    with torch.no_grad():
        return model(input_ids=ids, labels=torch.randint(3, 90, (4, 5), generator=generator)).logits
