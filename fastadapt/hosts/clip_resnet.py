"""CLIP's ResNet with VL-Adapter's visual adapters (VL-Adapter's code, ``--use_vis_adapter``). transformers has no such model: these are the blocks, under CLIP's own names."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from fastadapt.nn import VisualAdapter

POSITIONS = ("front", "middle", "back", "transition")


class ClipBottleneck(nn.Module):
    r"""A bottleneck block of CLIP's ModifiedResNet with visual adapters beside its convolutions.

    With batch norms in the adapters, and without:

    .. math:: relu(adapter(x) + BN_i(conv_i * x)), \qquad relu(BN_i(adapter(x) + conv_i * x))

    "front" is beside ``conv1`` (inplanes to planes), "middle" beside ``conv2`` (planes to planes), "back" beside ``conv3`` (planes to 4 planes; its relu waits for the block's
    residual); "transition" is behind the block: :math:`relu(adapter(y) + y)`. A stride is an average pool before ``conv3``, and before the shortcut's convolution.

    Submodules have CLIP's names (``conv1``, ``bn1``, ..., ``downsample.0``, ``downsample.1``) and the published ones (``front_adapter``, ``middle_adapter``, ``back_adapter``,
    ``transition_adapter``), so CLIP's own state dict loads with ``strict=False``.

    Args:
        inplanes: channels that enter.
        planes: a quarter of the channels that leave.
        stride: of the average pools.
        adapter_type: "<positions>-<kind>", the positions joined by "+", the kind as in `fastadapt.nn.VisualAdapter` ("middle-bottleneck", the published default); None: no adapter.
        reduction_factor: of the adapters; published: 2.
        use_bn: batch norms in the adapters.

    Raises:
        ValueError: an unknown position or kind.
    """

    def __init__(
        self, inplanes: int, planes: int, stride: int = 1, *, adapter_type: str | None = "middle-bottleneck", reduction_factor: int = 2, use_bn: bool = True,
    ) -> None:  # fmt: skip
        super().__init__()
        out = 4 * planes
        self.use_bn = use_bn
        self.conv1, self.bn1 = nn.Conv2d(inplanes, planes, 1, bias=False), nn.BatchNorm2d(planes)
        self.conv2, self.bn2 = nn.Conv2d(planes, planes, 3, padding=1, bias=False), nn.BatchNorm2d(planes)
        self.avgpool = nn.AvgPool2d(stride) if stride > 1 else nn.Identity()
        self.conv3, self.bn3 = nn.Conv2d(planes, out, 1, bias=False), nn.BatchNorm2d(out)
        shortcut: dict[str, nn.Module] = {"-1": nn.AvgPool2d(stride), "0": nn.Conv2d(inplanes, out, 1, bias=False), "1": nn.BatchNorm2d(out)}
        self.downsample = None
        if stride > 1 or inplanes != out:
            self.downsample = nn.Sequential()
            for name, module in shortcut.items():
                self.downsample.add_module(name, module)
        positions, kind = _adapters(adapter_type)
        for position, channels in zip(POSITIONS, ((inplanes, planes), (planes, planes), (planes, out), (out, out)), strict=True):
            adapter = VisualAdapter(*channels, kind, reduction_factor, use_bn) if position in positions else None
            self.register_module(f"{position}_adapter", adapter)

    def forward(self, x: Tensor) -> Tensor:
        """(N, inplanes, H, W) to (N, 4 planes, H / stride, W / stride)."""
        y = F.relu(self._beside(x, self.conv1, self.bn1, self.front_adapter))
        y = F.relu(self._beside(y, self.conv2, self.bn2, self.middle_adapter))
        y = self._beside(self.avgpool(y), self.conv3, self.bn3, self.back_adapter)
        y = F.relu(y + (x if self.downsample is None else self.downsample(x)))
        return y if self.transition_adapter is None else F.relu(self.transition_adapter(y) + y)  # type: ignore[operator]

    def _beside(self, x: Tensor, conv: nn.Conv2d, norm: nn.BatchNorm2d, adapter: Any) -> Tensor:
        if adapter is None:
            return norm(conv(x))
        return adapter(x) + norm(conv(x)) if self.use_bn else norm(adapter(x) + conv(x))


def clip_stage(
    inplanes: int, planes: int, blocks: int, stride: int = 1, *, adapter_type: str | None = "middle-bottleneck", reduction_factor: int = 2, use_bn: bool = True,
    use_bn_everywhere: bool = False,
) -> nn.Sequential:  # fmt: skip
    """A stage of CLIP's ResNet (``layer1`` to ``layer4``): ``blocks`` blocks, of which the first has the stride.

    Args:
        inplanes, planes, stride, adapter_type, reduction_factor, use_bn: see `ClipBottleneck`.
        use_bn_everywhere: ``use_bn=False`` holds for all blocks. The published code passes it on to the first block of a stage only, so that the others keep their batch norms.

    Raises:
        ValueError: no block, or an unknown position or kind.
    """
    if blocks < 1:
        raise ValueError(f"blocks: must be at least 1, not {blocks}")
    common: dict[str, Any] = {"adapter_type": adapter_type, "reduction_factor": reduction_factor}
    first = ClipBottleneck(inplanes, planes, stride, use_bn=use_bn, **common)
    return nn.Sequential(first, *(ClipBottleneck(4 * planes, planes, use_bn=use_bn or not use_bn_everywhere, **common) for _ in range(blocks - 1)))


def _adapters(adapter_type: str | None) -> tuple[tuple[str, ...], Any]:
    if adapter_type is None:
        return (), "bottleneck"
    places, _, kind = adapter_type.partition("-")
    positions = tuple(places.split("+"))
    if unknown := [position for position in positions if position not in POSITIONS]:
        raise ValueError(f"adapter_type: {', '.join(map(repr, unknown))} in {adapter_type!r} is unknown; positions are {', '.join(POSITIONS)}")
    return positions, kind
