"""Which backends can run a routed bottleneck."""

from __future__ import annotations

from fastadapt.ops.bottleneck.plan import Plan

PLAN = Plan("fastadapt.ops.routed_bottleneck", {}, ())
