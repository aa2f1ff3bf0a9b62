"""The adapter classes of the UniAdapter repository on `fastadapt.functional.bottleneck`, known by class name and attributes."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from fastadapt import functional
from fastadapt.interop.fusing import Foreign, Fused, Kind, fits, mentions_only, plain
from fastadapt.nn.uni_adapter import MODES, UniAdapter

# What the forwards mention.
_UNI = {
    "adapter_layernorm_option", "adapter_layer_norm_before", "down_proj", "non_linear_func", "nn", "functional", "dropout", "training", "up_proj", "visual_up_proj",
    "adapter_layer_norm_cross_modal", "multi_up_proj", "scale",
}  # fmt: skip
_LORA = {"down_proj", "up_proj", "scale"}


class _Uni(Fused):
    """The published class has the parameters of `fastadapt.nn.UniAdapter`, whose forward this is."""

    parts = ("adapter_layer_norm_before", "adapter_layer_norm_cross_modal", "down_proj", "non_linear_func", "up_proj", "multi_up_proj", "visual_up_proj")
    _kept = None
    _norm = UniAdapter._norm
    _with_dropout = UniAdapter._with_dropout
    __getstate__ = UniAdapter.__getstate__

    @property
    def layer_norm(self: Any) -> str:
        return self.adapter_layernorm_option

    def forward(self: Any, x: Tensor, add_residual: bool = True, mode: str = "text") -> Tensor:
        projections = (self.down_proj, self.up_proj, self.multi_up_proj, self.visual_up_proj)
        if mode not in MODES or not all(plain(p) for p in projections) or not plain(self.non_linear_func, nn.ReLU) or not fits(x, *self.parameters()):
            return super().forward(x, add_residual, mode)  # type: ignore[misc]
        return UniAdapter.forward(self, x, add_residual, mode)  # type: ignore[arg-type]


class _AdapterLora(Fused):
    parts = ("down_proj", "up_proj")

    def forward(self: Any, x: Tensor, add_residual: bool = True) -> Tensor:
        """As published: linear, and without the residual that the argument asks for."""
        down, up = self.down_proj, self.up_proj
        if not (plain(down) and plain(up) and fits(x, *self.parameters())):
            return super().forward(x, add_residual)  # type: ignore[misc]
        return functional.bottleneck(x, down.weight, up.weight, down.bias, up.bias, activation="identity", residual=None, scale=self.scale)


def recognise(module: nn.Module) -> Kind | Foreign | None:
    """The repository's two classes."""
    cls: Any = module._base if isinstance(module, Fused) else type(module)
    layer: Any = module
    for name, names, mixin in (("UniAdapter", _UNI, _Uni), ("Adapter_Lora", _LORA, _AdapterLora)):
        if cls.__name__ == name and all(hasattr(layer, own) for own in names - {"nn", "functional"}):
            return Kind(name, "bottleneck", mixin) if mentions_only(cls, names) else Foreign(name, "its forward does more than the repository's")
    return None
