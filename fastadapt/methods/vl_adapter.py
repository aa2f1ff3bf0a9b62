"""VL-Adapter (CVPR 2022): a sequential bottleneck behind every sub-layer of encoder and decoder."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Self

import torch
from torch import nn

from fastadapt.methods.base import MethodConfig, Target, per_task, reduced_rank
from fastadapt.nn import Bottleneck, Init, Projection, StreamBottleneck

SHARING = ("single", "multiple", "up", "down")
READS = ("output", "stream", "sum")
_SUBLAYERS = ("self_attention", "cross_attention", "feed_forward")


@dataclass(frozen=True, kw_only=True)
class VLAdapterConfig(MethodConfig):
    """VL-Adapter's bottlenecks (section 3.2), 4.18 % of VL-BART with the single adapter.

    Args:
        sharing: between tasks (section 3.3): "single", one adapter for all; "multiple", one per task; "up", one down-projection per task and one up-projection for all (the paper's
            half-shared adapters); "down", the other way round. Layer norms around the adapter are always shared.
        reduction_factor: rank = D // reduction_factor; 8 in the published BART runs (rank 96), 8 and 4 on T5.
        rank: the rank itself, instead of a reduction factor.
        activation: see `fastadapt.nn.Bottleneck`.
        layer_norm_before, layer_norm_after: layer norms around the adapter.
        self_attention, cross_attention, feed_forward: behind which sub-layers.
        decoder: adapters in the decoder too.
        reads: what the bottlenecks read: "output", that of the sub-layer (VL-Adapter; Houlsby et al. 2019); "stream", the residual stream that entered it, so that they run
            beside it (He et al. 2022); or "sum", of both, behind the host's layer norm on BART (Pfeiffer et al. 2020), known on BART- and T5-like hosts. What they give is added to
            the sub-layer's output.
        scale: factor of what the bottlenecks give.
        std: the Linears start with weights N(0, std^2) and zero biases; None: by the host's rule.
        layers: see `MethodConfig`; "AdapterDrop" (Rückle et al. 2021): 5 to 11.
        layer_norms: published: "all" on BART; "none" on T5, where the published code looks for another class of layer norm and leaves them frozen (as its
            counts, 4.49 % and 7.98 %, say).
        visual_embedding, biases, lm_head, language_model: see `MethodConfig`.
    """

    method: ClassVar[str] = "vl_adapter"
    published: ClassVar[dict[str, dict[str, Any]]] = {"bart": {"layer_norms": "all"}, "t5": {"layer_norms": "none"}, "other hosts": {"layer_norms": "none"}}

    sharing: Literal["single", "multiple", "up", "down"] = "single"
    reduction_factor: int = 8
    rank: int | None = None
    activation: str = "gelu_new"
    layer_norm_before: bool = False
    layer_norm_after: bool = False
    cross_attention: bool = True
    self_attention: bool = True
    feed_forward: bool = True
    decoder: bool = True
    reads: Literal["output", "stream", "sum"] = "output"
    scale: float = 1.0
    std: float | None = None

    def resolved(self, family: str, init: str) -> Self:
        config = super().resolved(family, init)
        if not config.roles():
            raise ValueError("self_attention: must be True where cross_attention (of a decoder) and feed_forward are not, or there is no adapter")
        if config.reads not in READS:
            raise ValueError(f"reads: must be one of {', '.join(READS)}, not {config.reads!r}")
        if config.reads == "sum" and family not in ("bart", "t5"):
            raise ValueError(f"reads: 'sum' is known on BART- and T5-like hosts, not on {family}, since others have their layer norms elsewhere")
        if config.std is not None and config.std <= 0:
            raise ValueError(f"std: must be a positive number or None, not {config.std!r}")
        return config

    def roles(self) -> tuple[str, ...]:
        names = [name for name in _SUBLAYERS if getattr(self, name)]
        stacks = ("encoder", "decoder") if self.decoder else ("encoder",)
        return tuple(f"{stack}.{name}" for stack in stacks for name in names if (stack, name) != ("encoder", "cross_attention"))

    def reads_stream(self, role: str) -> bool:
        return self.reads != "output"

    def build(self, role: str, target: Target, init: str, *, device: torch.device, dtype: torch.dtype) -> nn.Module | None:
        if self.sharing not in SHARING:
            raise ValueError(f"sharing: must be one of {', '.join(SHARING)}, not {self.sharing!r}")
        rank = reduced_rank(target.width, self.rank, self.reduction_factor)
        rule = self.rule(target)

        def make() -> Bottleneck:
            options: dict[str, Any] = {
                "activation": self.activation,
                "scale": self.scale,
                "norm_before": self.layer_norm_before,
                "norm_after": self.layer_norm_after,
                "projection": self.projection(),
                "init": rule if init == "repo" else Init(rule.std, zero=("up_sampler",)),
                "device": device,
                "dtype": dtype,
            }
            if self.reads == "output":
                adapter = Bottleneck(target.width, rank, **options)
            else:
                adapter = StreamBottleneck(target.width, rank, reads=self.reads, norm=target.norm, **options)
            self.connect(adapter, target)
            return adapter

        half = {"up": ("up_sampler.",), "down": ("down_sampler.",)}.get(self.sharing, ())
        return per_task(self.sharing, target, make, (*half, "pre_layer_norm.", "post_layer_norm.", *self.shared_over_tasks()))

    def rule(self, target: Target) -> Init:
        """How the projections start with ``init="repo"``."""
        return target.init if self.std is None else dataclasses.replace(target.init, std=float(self.std))

    def projection(self) -> Projection | None:
        """What makes the projections; None: ``nn.Linear``."""
        return None

    def connect(self, adapter: Bottleneck, target: Target) -> None:
        """Lets a new adapter share parameters with others of the patch."""

    def shared_over_tasks(self) -> tuple[str, ...]:
        """Starts of the names of further parameters that all tasks share."""
        return ()
