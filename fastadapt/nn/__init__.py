"""Drop-in modules: they hold parameters under the papers' names and call `fastadapt.functional`."""

from fastadapt.nn.bottleneck import Bottleneck, StreamBottleneck, ValueParallelAdapter
from fastadapt.nn.gated_bottleneck import GatedBottleneck
from fastadapt.nn.gates import IA3, Gate, GatingOnly, InTurn, ValueResidual, in_turn
from fastadapt.nn.hypernetwork import GeneratedBottleneck, HyperNetwork, TaskEmbeddings
from fastadapt.nn.init import Init
from fastadapt.nn.intrinsic import IntrinsicDimension
from fastadapt.nn.lora import LoRA, MergedLoRA
from fastadapt.nn.per_task import PerTask
from fastadapt.nn.projections import LowRankLinear, PHMLinear, Projection, share
from fastadapt.nn.prompt import Prompt
from fastadapt.nn.uni_adapter import KeyValueAdapter, TemporalEmbedding, UniAdapter, frame_scores, frame_weights
from fastadapt.nn.visual_adapter import VisualAdapter

__all__ = [
    "IA3", "Bottleneck", "Gate", "GatedBottleneck", "GatingOnly", "GeneratedBottleneck", "HyperNetwork", "InTurn", "Init", "IntrinsicDimension", "KeyValueAdapter", "LoRA",
    "LowRankLinear", "MergedLoRA", "PHMLinear", "PerTask", "Projection", "Prompt", "StreamBottleneck", "TaskEmbeddings", "TemporalEmbedding", "UniAdapter", "ValueParallelAdapter",
    "ValueResidual", "VisualAdapter", "frame_scores", "frame_weights", "in_turn", "share",
]  # fmt: skip
