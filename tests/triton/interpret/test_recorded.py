"""The kernels in Triton's interpreter against the tensors recorded from the authors' code: the recorded cases of tests/ops, counted by `backend.ran`."""

from __future__ import annotations

import pytest

from tests.golden import load_case
from tests.ops import checks, test_bottleneck, test_gated_bottleneck, test_phm_bottleneck

OPS = {"bottleneck": test_bottleneck, "gated_bottleneck": test_gated_bottleneck, "phm_bottleneck": test_phm_bottleneck}
# One of each kind: plain, both layer norms, a residual of its own, a tensor scale, pairs of heads; every granularity, the added gate, T5's scales; Compacter.
QUICK = {
    "vla_adapter_relu",
    "comp_adapter_prepost_ln",
    "vlpet_parallel_value_adapter_controller",
    "vla_clipvil_adapter_gated",
    "vlpet_bart_attn_site_multihead_pair_no_gate",
    "vlpet_bart_attn_site_full_rank_gate",
    "vlpet_bart_attn_site_large_added_gate",
    "vlpet_bart_ff_site_middleX",
    "vlpet_bart_ff_site_middleY",
    "vlpet_bart_ff_site_small",
    "vlpet_t5_attn_site_large_scale0.3",
    "vla_phm_n4_rank1",
}
CASES = [(op, case_id) for op, module in OPS.items() for case_id in module.RECORDED]


@pytest.mark.parametrize(("op", "case_id"), [pytest.param(*case, marks=[] if case[1] in QUICK else pytest.mark.full, id=case[1]) for case in CASES])
def test_recorded_in_fp32(op: str, case_id: str) -> None:
    checks.assert_recorded(OPS[op].build, load_case(case_id), op, "triton", "cpu")


def test_quick_cases_are_recorded_ones() -> None:
    assert {case_id for _, case_id in CASES} >= QUICK
    assert len(CASES) == 41
