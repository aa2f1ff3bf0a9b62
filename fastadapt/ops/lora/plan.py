"""Which backends can run LoRA's update."""

from __future__ import annotations

from fastadapt.ops.bottleneck.plan import Plan

PLAN = Plan("fastadapt.ops.lora", {}, ())
