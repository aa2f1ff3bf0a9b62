"""Drop-in modules: they hold parameters under the papers' names and call `fastadapt.functional`."""

from fastadapt.nn.bottleneck import Bottleneck, ValueParallelAdapter
from fastadapt.nn.gated_bottleneck import GatedBottleneck
from fastadapt.nn.init import Init

__all__ = ["Bottleneck", "GatedBottleneck", "Init", "ValueParallelAdapter"]
