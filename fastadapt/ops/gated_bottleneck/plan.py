"""Which backends can run a gated bottleneck."""

from fastadapt.ops.bottleneck.plan import Plan

PLAN = Plan("fastadapt.ops.gated_bottleneck")
