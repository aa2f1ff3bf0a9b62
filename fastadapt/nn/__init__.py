"""Drop-in modules: they hold parameters under the papers' names and call `fastadapt.functional`."""

from fastadapt.nn.bottleneck import Bottleneck, ValueParallelAdapter
from fastadapt.nn.gated_bottleneck import GatedBottleneck
from fastadapt.nn.init import Init
from fastadapt.nn.lora import LoRA
from fastadapt.nn.per_task import PerTask
from fastadapt.nn.projections import LowRankLinear, PHMLinear, Projection, share

__all__ = [
    "Bottleneck", "GatedBottleneck", "Init", "KeyValueAdapter", "LoRA", "LowRankLinear", "PHMLinear", "PerTask", "Projection", "TemporalEmbedding", "UniAdapter", "ValueParallelAdapter", "frame_scores", "frame_weights", "share",
]  # fmt: skip
