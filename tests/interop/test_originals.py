"""`fastadapt.fuse` on the adapter classes of the VL-Adapter, VL-PET, UniAdapter and Compacter repositories: small classes here with their names, attributes and arguments."""

from __future__ import annotations

import copy
import pickle
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.activations import get_activation

import fastadapt
from fastadapt.interop.fusing import FusedSite, LeftSite
from tests.interop.same import Activations, assert_agree, ops_ran, results, rows, same_numbers

WIDTH, RANK = 24, 8
TASKS = ("vqa", "gqa")


def config(**options: Any) -> SimpleNamespace:
    return SimpleNamespace(
        **{"tasks": list(TASKS), "non_linearity": "gelu_new", "track_z": False, "add_layer_norm_before_adapter": False, "add_layer_norm_after_adapter": False, **options}
    )


class LowRankLinear(nn.Module):
    def __init__(self, inside: int, outside: int, rank: int = 1) -> None:
        super().__init__()
        self.bias, self.rank = True, rank
        self.W_left, self.W_right, self.b = nn.Parameter(torch.randn(inside, rank)), nn.Parameter(torch.randn(rank, outside)), nn.Parameter(torch.randn(outside))

    def forward(self, x: Tensor) -> Tensor:
        w = self.W_left.matmul(self.W_right)
        out = torch.matmul(x, w)
        return out + self.b if self.bias else out


class ElementwiseLowRankLinear(LowRankLinear):
    """The Compacter repository's, which has the same name there."""

    def forward(self, x: Tensor) -> Tensor:
        w = self.W_left * self.W_right
        out = torch.matmul(x, w)
        return out + self.b if self.bias else out


ElementwiseLowRankLinear.__name__ = "LowRankLinear"


def matvec_product(w: Tensor, x: Tensor, bias: Tensor, phm_rule: Tensor) -> Tensor:
    return x @ sum(torch.kron(a, b) for a, b in zip(phm_rule, w, strict=True)) + bias  # type: ignore[call-overload, no-any-return]


class PHMLinear(nn.Module):
    def __init__(self, inside: int, outside: int, *, factors: bool = True, rule_factors: bool = False, rank: int = 1, n: int = 4, rule: bool = True) -> None:
        super().__init__()
        self.factorized_phm, self.factorized_phm_rule, self.phm_rank, self.phm_rule = factors, rule_factors, rank, None
        if rule_factors:
            self.phm_rule_left, self.phm_rule_right = nn.Parameter(torch.randn(n, n, 1)), nn.Parameter(torch.randn(n, 1, n))
        elif rule:
            self.phm_rule = nn.Parameter(torch.randn(n, n, n))
        if factors:
            self.W_left, self.W_right = nn.Parameter(torch.randn(n, inside // n, rank)), nn.Parameter(torch.randn(n, rank, outside // n))
        else:
            self.W = nn.Parameter(torch.randn(n, inside // n, outside // n))
        self.b = nn.Parameter(torch.randn(outside))

    def set_phm_rule(self, phm_rule: nn.Parameter) -> None:
        self.phm_rule = phm_rule

    def forward(self, x: Tensor, phm_rule: Tensor | None = None) -> Tensor:
        rule = torch.bmm(self.phm_rule_left, self.phm_rule_right) if self.factorized_phm_rule else self.phm_rule
        w = torch.bmm(self.W_left, self.W_right) if self.factorized_phm else self.W
        return matvec_product(w, x, self.b, rule)  # type: ignore[arg-type]


class Adapter(nn.Module):
    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config, self.track_z, self.activation = config, config.track_z, Activations(config.non_linearity)
        self.down_sampler, self.up_sampler = self.projections()
        self.use_gate = getattr(config, "use_gate", False)
        if self.use_gate:
            self.gate = nn.Parameter(torch.randn(1))

    def projections(self) -> tuple[nn.Module, nn.Module]:
        return nn.Linear(WIDTH, RANK), nn.Linear(RANK, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        z = self.activation(self.down_sampler(x))
        if self.track_z:
            self.z = z
        out = self.up_sampler(z)
        return self.gate * out if self.use_gate else out


class HyperComplexAdapter(Adapter):
    def projections(self) -> tuple[nn.Module, nn.Module]:
        return PHMLinear(WIDTH, RANK, **self.config.phm), PHMLinear(RANK, WIDTH, **self.config.phm)


class LowRankAdapter(Adapter):
    def projections(self) -> tuple[nn.Module, nn.Module]:
        kind = getattr(self.config, "low_rank_kind", LowRankLinear)
        return kind(WIDTH, RANK, self.config.low_rank_rank), kind(RANK, WIDTH, self.config.low_rank_rank)


KINDS = {"Adapter": Adapter, "HyperComplexAdapter": HyperComplexAdapter, "LowRankAdapter": LowRankAdapter}


class AdapterController(nn.Module):
    """VL-Adapter's; with ``y`` VL-PET's."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config, self.tasks, self.use_single_adapter = config, config.tasks, getattr(config, "single", False)
        kind = KINDS[getattr(config, "kind", "Adapter")]
        one = kind(config)
        self.adapters = nn.ModuleDict({task: one if self.use_single_adapter else kind(config) for task in self.tasks})
        self.add_layer_norm_before_adapter, self.add_layer_norm_after_adapter = config.add_layer_norm_before_adapter, config.add_layer_norm_after_adapter
        if self.add_layer_norm_before_adapter:
            self.pre_layer_norm = nn.LayerNorm(WIDTH)
        if self.add_layer_norm_after_adapter:
            self.post_layer_norm = nn.LayerNorm(WIDTH)

    def get_task(self, task: str) -> str:
        return task

    def get_adapter(self, task: str) -> nn.Module:
        return self.adapters[task]

    def forward(self, inputs: Tensor, task: str, y: Tensor | None = None) -> Tensor:
        adapter = self.get_adapter(self.get_task(task))
        out = adapter(self.pre_layer_norm(inputs) if self.add_layer_norm_before_adapter else inputs)
        if self.config.use_scaling_factor:
            out = self.config.scaling_factor * out
        if self.add_layer_norm_after_adapter:
            out = self.post_layer_norm(out)
        return out + y if self.config.use_parallel_adapter else out + inputs  # type: ignore[operator]


class CompacterController(AdapterController):
    """The Compacter repository's, which has the same name there."""

    def enable_adapters(self, tasks: Any) -> None:
        self.switch(tasks, True)

    def disable_adapters(self, tasks: Any) -> None:
        self.switch(tasks, False)

    def switch(self, tasks: Any, on: bool) -> None:
        for task in tasks if isinstance(tasks, list) else [tasks]:
            self.adapters[task].requires_grad_(on)

    def forward(self, inputs: Tensor, task: str) -> Tensor:  # type: ignore[override]
        task = self.get_task(task)
        self.enable_adapters(task)
        self.disable_adapters([other for other in self.tasks if other != task])
        out = self.get_adapter(task)(self.pre_layer_norm(inputs) if self.add_layer_norm_before_adapter else inputs)
        if self.add_layer_norm_after_adapter:
            out = self.post_layer_norm(out)
        return out + inputs


CompacterController.__name__ = "AdapterController"


class MetaLayersAdapterController(nn.Module):
    def __init__(self, config: Any) -> None:
        super().__init__()
        self.activation_type, self.track_z = config.non_linearity, config.track_z
        self.add_layer_norm_before_adapter, self.add_layer_norm_after_adapter = config.add_layer_norm_before_adapter, config.add_layer_norm_after_adapter

    def forward(self, inputs: Tensor, adapter_weights: Any) -> Tensor:
        def norm(x: Tensor, weights: Any) -> Tensor:
            return F.layer_norm(x, (WIDTH,), weights.weight, weights.bias)

        x = norm(inputs, adapter_weights.pre_norm) if self.add_layer_norm_before_adapter else inputs
        z = get_activation(self.activation_type)(F.linear(x, adapter_weights.down.weight, adapter_weights.down.bias))
        out = F.linear(z, adapter_weights.up.weight, adapter_weights.up.bias)
        return (norm(out, adapter_weights.post_norm) if self.add_layer_norm_after_adapter else out) + inputs


class LoRALinearController(nn.Linear):
    def __init__(self, inside: int, outside: int, dropout: float = 0.0, fan_in_fan_out: bool = False) -> None:
        super().__init__(inside, outside)
        self.tasks, self.r, self.scaling, self.fan_in_fan_out = list(TASKS), 4, 2.0, fan_in_fan_out
        self.lora_dropout = nn.Dropout(dropout) if dropout else _same
        self.lora_As = nn.ParameterDict({task: torch.randn(4, inside) for task in TASKS})
        self.lora_Bs = nn.ParameterDict({task: torch.randn(outside, 4) for task in TASKS})
        if fan_in_fan_out:
            self.weight.data = self.weight.data.T

    def forward(self, x: Tensor, task: str) -> Tensor:  # type: ignore[override]
        y = F.linear(x, self.weight.T if self.fan_in_fan_out else self.weight, self.bias)
        return y + ((self.lora_dropout(x) if self.training else x) @ self.lora_As[task].T @ self.lora_Bs[task].T) * self.scaling


def _same(x: Tensor) -> Tensor:
    return x


class UniAdapter(nn.Module):
    def __init__(self, option: str = "in", learnable: bool = False, dropout: float = 0.0) -> None:
        super().__init__()
        self.adapter_layernorm_option, self.dropout, self.non_linear_func = option, dropout, nn.ReLU()
        self.scale = nn.Parameter(torch.full((1,), 0.1)) if learnable else 0.1
        self.adapter_layer_norm_before = nn.LayerNorm(WIDTH) if option in ("in", "out") else None
        self.adapter_layer_norm_cross_modal, self.down_proj = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, RANK)
        self.up_proj, self.multi_up_proj, self.visual_up_proj = (nn.Linear(RANK, WIDTH) for _ in range(3))

    def forward(self, x: Tensor, add_residual: bool = True, mode: str = "text") -> Tensor:
        k = self.non_linear_func(self.down_proj(self.adapter_layer_norm_before(x) if self.adapter_layernorm_option == "in" else x))
        k = nn.functional.dropout(k, self.dropout, self.training)
        if mode == "multimodal":
            up = self.adapter_layer_norm_cross_modal(self.multi_up_proj(k) + self.up_proj(k))
        else:
            up = (self.visual_up_proj if mode == "visual" else self.up_proj)(k)
        up = up * self.scale
        up = self.adapter_layer_norm_before(up) if self.adapter_layernorm_option == "out" else up
        return up + x if add_residual else up


class Adapter_Lora(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.down_proj, self.up_proj, self.scale = nn.Linear(WIDTH, RANK), nn.Linear(RANK, WIDTH), nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor, add_residual: bool = True) -> Tensor:
        return self.up_proj(self.down_proj(x)) * self.scale


PHM = {"factors and a rule": {}, "rank 2": {"rank": 2}, "a rule of factors": {"rule_factors": True}, "full": {"factors": False}}
ADAPTERS: dict[str, tuple[type[Adapter], dict[str, Any], str]] = {
    "bottleneck": (Adapter, {}, "bottleneck"),
    "relu": (Adapter, {"non_linearity": "relu"}, "bottleneck"),
    "CLIP-ViL's gate": (Adapter, {"use_gate": True}, "bottleneck"),
    "low rank": (LowRankAdapter, {"low_rank_rank": 1}, "bottleneck"),
    "low rank, by elements": (LowRankAdapter, {"low_rank_rank": 1, "low_rank_kind": ElementwiseLowRankLinear}, "bottleneck"),
    "low rank of rank 3": (LowRankAdapter, {"low_rank_rank": 3}, "bottleneck"),
    **{f"PHM, {name}": (HyperComplexAdapter, {"phm": options}, "bottleneck" if name == "full" else "phm_bottleneck") for name, options in PHM.items()},
}


def seeded(make: Any) -> Any:
    def run(seed: int) -> nn.Module:
        torch.manual_seed(seed)
        return make()

    return run


@pytest.mark.parametrize("name", ADAPTERS)
def test_an_adapter_by_itself(name: str) -> None:
    kind, options, op = ADAPTERS[name]
    make = seeded(lambda: kind(config(**options)))
    same_numbers(make, lambda m, seed: m(rows(seed, m, 3, 7, WIDTH)), **{op: 1})
    assert fastadapt.fuse(make(0)).fused == (FusedSite("", kind.__name__, op),)


@pytest.mark.parametrize("norms", [(False, False), (True, False), (False, True), (True, True)])
@pytest.mark.parametrize("kind", KINDS)
def test_a_controller_is_one_op(kind: str, norms: tuple[bool, bool]) -> None:
    common = {"kind": kind, "phm": {}, "low_rank_rank": 1, "use_scaling_factor": True, "scaling_factor": 0.3, "use_parallel_adapter": norms[0]}
    make = seeded(lambda: AdapterController(config(**common, add_layer_norm_before_adapter=norms[0], add_layer_norm_after_adapter=norms[1])))
    op = "phm_bottleneck" if kind == "HyperComplexAdapter" else "bottleneck"
    same_numbers(make, lambda m, seed: m(rows(seed, m, 3, 7, WIDTH), "gqa", rows(seed + 1, m, 3, 7, WIDTH)), **{op: 1})
    assert fastadapt.fuse(make(0)).fused == (FusedSite("", f"AdapterController of {kind}s", op),)


PLAIN = {"use_scaling_factor": False, "use_parallel_adapter": False}


def test_a_single_adapter_and_its_keys() -> None:
    controller = AdapterController(config(single=True, **PLAIN))
    keys = list(controller.state_dict())
    fastadapt.fuse(controller)
    x = torch.randn(2, 5, WIDTH)
    with ops_ran(bottleneck=2):
        assert torch.equal(controller(x, "vqa"), controller(x, "gqa"))
    assert list(controller.state_dict()) == keys and isinstance(controller, AdapterController)
    other = pickle.loads(pickle.dumps(copy.deepcopy(controller)))
    assert torch.equal(other(x, "vqa"), controller(x, "vqa"))
    fastadapt.unfuse(other)
    assert type(other) is AdapterController and type(other.adapters["vqa"]) is Adapter


def test_compacters_controller_trains_the_tasks_adapter_only() -> None:
    controller = CompacterController(config(kind="HyperComplexAdapter", phm={}))
    own = copy.deepcopy(controller)
    fastadapt.fuse(controller)
    for module in (controller, own):
        module.requires_grad_(False)  # its forward turns the task's on, whatever the user did
    with ops_ran(phm_bottleneck=1):
        got = results(controller, lambda m: m(rows(0, m, 2, 5, WIDTH), "gqa"))
    want = results(own, lambda m: m(rows(0, m, 2, 5, WIDTH), "gqa"))
    assert got.keys() == want.keys() == {"out", *(name for name, _ in own.named_parameters() if ".gqa." in name)}
    for name in want:
        assert_agree(got[name], want[name])
    assert [(n, p.requires_grad) for n, p in controller.named_parameters()] == [(n, p.requires_grad) for n, p in own.named_parameters()]


def test_a_controller_that_does_more_keeps_its_forward() -> None:
    class Odd(AdapterController):
        def forward(self, inputs: Tensor, task: str) -> Tensor:  # type: ignore[override]
            return self.get_adapter(task)(inputs).tanh()

    Odd.__name__ = "AdapterController"
    odd = Odd(config(**PLAIN))
    x = torch.randn(2, 5, WIDTH)
    want = odd(x, "vqa")
    assert {site.path for site in fastadapt.fuse(odd).fused} == {"adapters.vqa", "adapters.gqa"}
    with ops_ran(bottleneck=1):
        assert_agree(odd(x, "vqa"), want)


def test_a_shared_rule_that_comes_later() -> None:
    """The repositories hand one Parameter to every projection after they have built the model."""
    adapter = HyperComplexAdapter(config(phm={"rule": False}))
    fastadapt.fuse(adapter)
    with pytest.raises(TypeError), ops_ran():
        adapter(torch.randn(2, 3, WIDTH))  # the original's own error
    rule = nn.Parameter(torch.randn(4, 4, 4))
    adapter.down_sampler.set_phm_rule(rule)
    adapter.up_sampler.set_phm_rule(rule)
    x = torch.randn(2, 3, WIDTH)
    with ops_ran(phm_bottleneck=1):
        got = adapter(x)
    fastadapt.unfuse(adapter)
    assert_agree(got, adapter(x))


def test_z_is_kept_for_the_regulariser() -> None:
    adapter = Adapter(config(track_z=True))
    assert fastadapt.fuse(adapter).fused[0].note.startswith("track_z is on: runs as before")
    with ops_ran():
        adapter(torch.randn(2, 3, WIDTH))
    assert adapter.z.shape == (2, 3, RANK) and adapter.z.requires_grad


@pytest.mark.parametrize("norms", [False, True])
def test_hyperformer(norms: bool) -> None:
    def make(seed: int) -> nn.Module:
        torch.manual_seed(seed)
        model: Any = nn.Module()
        model.controller = MetaLayersAdapterController(config(add_layer_norm_before_adapter=norms, add_layer_norm_after_adapter=norms))
        model.down, model.up, model.pre, model.post = nn.Linear(WIDTH, RANK), nn.Linear(RANK, WIDTH), nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        return model

    def call(m: Any, seed: int) -> Tensor:
        return m.controller(rows(seed, m, 3, 7, WIDTH), SimpleNamespace(down=m.down, up=m.up, pre_norm=m.pre if norms else None, post_norm=m.post if norms else None))

    same_numbers(make, call, bottleneck=1)


@pytest.mark.parametrize(("outside", "transposed"), [(WIDTH, False), (40, True)])
def test_lora_controller(outside: int, transposed: bool) -> None:
    make = seeded(lambda: LoRALinearController(WIDTH, outside, fan_in_fan_out=transposed))
    same_numbers(make, lambda m, seed: m(rows(seed, m, 3, 7, WIDTH), "gqa"), lora=1)
    layer = LoRALinearController(WIDTH, outside, dropout=0.4).train()
    fastadapt.fuse(layer)
    x = torch.ones(2, 3, WIDTH)
    assert not torch.equal(layer(x, "vqa"), layer(x, "vqa")) and torch.equal(layer.eval()(x, "vqa"), layer(x, "vqa"))


@pytest.mark.parametrize("mode", ["text", "visual", "multimodal"])
@pytest.mark.parametrize("option", ["in", "out", "none"])
@pytest.mark.parametrize("learnable", [False, True])
def test_uniadapter(mode: str, option: str, learnable: bool) -> None:
    make = seeded(lambda: UniAdapter(option, learnable))
    for add_residual in (False, True):
        same_numbers(make, lambda m, seed, a=add_residual: m(rows(seed, m, 3, 7, WIDTH), a, mode), bottleneck=1)  # type: ignore[misc]


def test_uniadapters_dropout_and_key_value_adapter() -> None:
    layer = UniAdapter(dropout=0.5).train()
    own = copy.deepcopy(layer)
    fastadapt.fuse(layer)
    x = torch.randn(3, 7, WIDTH)
    torch.manual_seed(3)
    want = own(x, mode="multimodal")
    torch.manual_seed(3)
    assert_agree(layer(x, mode="multimodal"), want)
    same_numbers(seeded(Adapter_Lora), lambda m, seed: m(rows(seed, m, 3, 7, WIDTH)), bottleneck=1)


@torch.no_grad()
def test_uniadapter_without_gradients() -> None:
    """The cross-modal weights are summed once; nothing of that stays behind."""
    layer = UniAdapter().eval()
    x = torch.randn(3, 7, WIDTH)
    want, own = layer(x, mode="multimodal"), set(layer.__dict__)
    fastadapt.fuse(layer)
    with ops_ran(bottleneck=2):
        assert torch.equal(layer(x, mode="multimodal"), layer(x, mode="multimodal"))
    assert_agree(copy.deepcopy(layer)(x, mode="multimodal"), want)
    layer.multi_up_proj.bias += 1.0
    got = layer(x, mode="multimodal")
    fastadapt.unfuse(layer)
    assert set(layer.__dict__) == own
    assert_agree(got, layer(x, mode="multimodal"))
    layer.non_linear_func = nn.GELU()  # type: ignore[assignment]
    want = layer(x)
    fastadapt.fuse(layer)
    with ops_ran():
        assert torch.equal(layer(x), want)


class OutputAdapter(Adapter):
    def projections(self) -> tuple[nn.Module, nn.Module]:
        return nn.Linear(WIDTH, RANK), nn.Linear(RANK, 99)


class BartEncoderLayer(nn.Module):
    """VL-PET's have every attribute, of which most are None."""

    def __init__(self, **parts: nn.Module | nn.Parameter | None) -> None:
        super().__init__()
        self.attn_adapter_multihead_down = self.encoder_attn_adapter_gating_large_x_down = self.encoder_attn_adapter_gating_middle_ia3_add = self.attn_value_ia3 = None
        for name, part in parts.items():
            setattr(self, name, part)
        self.attn_adapter = AdapterController(config(**PLAIN))


def test_vlpets_layers() -> None:
    """Those with multi-head adapters, gates or vectors of their own are named; the controllers in them are fused in any case."""
    parts: dict[str, Any] = {
        "attn_adapter_multihead_down": nn.ModuleList([nn.Linear(WIDTH, 2)]),
        "encoder_attn_adapter_gating_large_x_down": nn.Linear(WIDTH, 2),
        "encoder_attn_adapter_gating_middle_ia3_add": nn.Parameter(torch.zeros(WIDTH)),
        "attn_value_ia3": nn.Parameter(torch.zeros(WIDTH)),
    }
    report = fastadapt.fuse(nn.ModuleList([BartEncoderLayer(), *(BartEncoderLayer(**{name: part}) for name, part in parts.items())]))
    assert [site.path for site in report.fused] == [f"{i}.attn_adapter" for i in range(5)]
    assert [site.path for site in report.left] == ["1", "2", "3", "4"] and {site.kind for site in report.left} == {"VL-PET's BartEncoderLayer"}
    assert report.left[0].why.startswith("its multi-head adapters, gates and vectors are lines of its own forward")


def doing_more(kind: type[nn.Module], forward: Any) -> Any:
    """A class of the same name with another forward, as copies of the repositories have them."""
    return type(kind.__name__, (kind,), {"forward": forward})


def test_what_is_left_and_named() -> None:
    odd, clamped = Adapter(config()), HyperComplexAdapter(config(phm={}))
    odd.up_sampler = nn.Bilinear(2, 2, 2)  # type: ignore[assignment]
    clamped.up_sampler.__class__ = doing_more(PHMLinear, lambda self, x: PHMLinear.forward(self, x).clamp(max=4))
    model = nn.ModuleList(
        [
            OutputAdapter(config()),
            LowRankAdapter(config(low_rank_rank=2, low_rank_kind=ElementwiseLowRankLinear)),
            Adapter(config(non_linearity="tanh")),
            odd,
            fastadapt.nn.UniAdapter(8, 2),
            clamped,
            doing_more(Adapter, lambda self, x: Adapter.forward(self, x).clamp(max=4))(config()),
            doing_more(Adapter, lambda self, x, mask: Adapter.forward(self, x))(config()),
            doing_more(MetaLayersAdapterController, lambda self, inputs, adapter_weights, do_float_32=False: inputs)(config()),
            doing_more(LoRALinearController, lambda self, x, task: LoRALinearController.forward(self, x, task).clamp(max=4))(8, 8),
            doing_more(UniAdapter, lambda self, x, add_residual=True, mode="text": UniAdapter.forward(self, x).clamp(max=4))(),
        ]
    )
    report = fastadapt.fuse(model)
    assert not report.fused
    more = "its forward does more than the repositories'"
    assert report.left == (
        LeftSite("0", "OutputAdapter", "no op has an output of another width than its input"),
        LeftSite("1", "LowRankAdapter", "its rank is 2 and its factors are multiplied by elements"),
        LeftSite("2", "Adapter", "no op has its activation"),
        LeftSite("3", "Adapter", "its projections are a Linear and a Bilinear"),
        LeftSite("5", "HyperComplexAdapter", "the forward of its PHMLinears does more than the repositories'"),
        LeftSite("6", "Adapter", more),
        LeftSite("7", "Adapter", more),
        LeftSite("8", "MetaLayersAdapterController", more),
        LeftSite("9", "LoRALinearController", more),
        LeftSite("10", "UniAdapter", "its forward does more than the repository's"),
    )
