"""Parameter counts of real-size models, to the digit, as the published code prints them: four tasks, vocabularies of 50,465 (BART) and 32,200 (T5), tied heads counted once."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fastadapt.hosts.vlbart import VLT5, VLBart, VLBartConfig, VLT5Config
from fastadapt.patching import patch

IMAGE, VIDEO = 2048, 512


def real_size(family: str, feat_dim: int, **options: int) -> nn.Module:
    with torch.device("meta"):
        if family == "bart":
            sizes = {f"{side}_{name}": value for side in ("encoder", "decoder") for name, value in (("layers", 6), ("attention_heads", 12), ("ffn_dim", 3072))}
            return VLBart(VLBartConfig(vocab_size=50465, d_model=768, **sizes, max_position_embeddings=1024, feat_dim=feat_dim, **options))
        return VLT5(VLT5Config(vocab_size=32200, d_model=768, d_kv=64, d_ff=3072, num_layers=12, num_heads=12, feat_dim=feat_dim, **options))


# VL-PET's gates and lightweight decoder on the adapters of VL-Adapter and Compacter (VL-PET, table 9).
ON_VL_ADAPTER: dict[str, tuple[int, int, float]] = {
    "large": (6_052_416, 145_606_464, 4.1567),
    "middleX": (4_281_804, 143_835_852, 2.9769),
    "middleY": (4_281_792, 143_835_840, 2.9769),
    "small": (4_291_020, 143_845_068, 2.9831),
}
ON_COMPACTER: dict[str, tuple[int, int | None, float]] = {
    "large": (4_725_600, 144_279_648, 3.2753),
    "middleX": (2_954_988, None, 2.0735),
    "middleY": (2_954_976, None, 2.0735),
    "small": (2_964_204, 142_518_252, 2.0799),
}

ROWS = [
    ("bart", IMAGE, "vl_adapter", {}, 6_081_600, 145_606_464, 4.1767),
    ("bart", VIDEO, "vl_adapter", {}, 4_901_952, 144_426_816, 3.3941),
    ("bart", IMAGE, "full", {}, 141_156_864, 141_156_864, 100.0),
    ("bart", IMAGE, "visual_projection", {}, 1_582_848, 141_156_864, 1.1213),
    ("bart", IMAGE, "layer_norm", {}, 1_632_000, 141_156_864, 1.1562),
    ("bart", IMAGE, "bitfit", {}, 1_708_800, 141_156_864, 1.2106),
    ("bart", IMAGE, "lm_head", {}, 40_339_968, 141_156_864, 28.5781),
    ("bart", IMAGE, "vl_adapter", {"sharing": "multiple"}, 19_430_400, 158_955_264, 12.2238),
    ("bart", IMAGE, "vl_adapter", {"sharing": "up"}, 12_725_760, 152_250_624, 8.3584),
    ("bart", IMAGE, "vl_adapter", {"sharing": "down"}, 12_786_240, 152_311_104, 8.3948),
    ("bart", IMAGE, "compacter", {}, 3_870_240, 143_395_104, 2.6990),
    ("bart", IMAGE, "compacter", {"sharing": "multiple"}, 10_584_960, 150_109_824, 7.0515),
    ("bart", IMAGE, "compacter", {"division": 4, "phm_rank": 1, "shared_rule": True}, 1_709_824, 141_234_688, 1.2106),
    ("bart", IMAGE, "low_rank_adapter", {}, 1_709_760, 141_234_624, 1.2106),
    ("bart", IMAGE, "prompt", {}, 2_843_936, 142_417_952, 1.9969),
    ("bart", IMAGE, "prompt", {"prompt_sharing": "multiple"}, 6_627_200, 146_201_216, 4.5329),
    ("bart", VIDEO, "prompt", {}, 1_664_288, 141_238_304, 1.1784),
    ("t5", IMAGE, "prompt", {}, 2_842_400, 225_801_248, 1.2588),
    ("bart", IMAGE, "hyperformer", {}, 8_579_088, 148_103_952, 5.7926),
    ("bart", IMAGE, "hyperformer", {"one_hypernet": True}, 4_708_592, 144_233_456, 3.2646),
    ("t5", IMAGE, "hyperformer", {}, 8_534_544, 231_493_392, 3.6867),
    ("bart", IMAGE, "lora", {}, 8_786_688, 148_234_752, 5.9275),
    ("bart", IMAGE, "lora", {"sharing": "multiple"}, 30_020_352, 169_468_416, 17.7144),
    ("bart", VIDEO, "lora", {}, 7_607_040, 147_055_104, 5.1729),
    ("bart", VIDEO, "compacter", {}, 2_690_592, 142_215_456, 1.8919),
    ("bart", VIDEO, "bitfit", {}, 529_152, None, 0.3780),
    ("t5", IMAGE, "compacter", {}, 6_057_792, 229_016_640, 2.6451),
    ("t5", IMAGE, "bitfit", {}, 1_582_080, 224_540_160, 0.7046),
    ("t5", IMAGE, "vl_adapter", {}, 10_480_512, 233_439_360, 4.4896),
    ("t5", IMAGE, "vl_adapter", {"reduction_factor": 4}, 19_333_632, 242_292_480, 7.9795),
    ("bart", IMAGE, "vlpet", {}, 6_052_416, 145_606_464, 4.1567),
    ("bart", IMAGE, "vlpet", {"granularity": "middleX"}, 4_281_804, 143_835_852, 2.9769),
    ("bart", IMAGE, "vlpet", {"granularity": "middleY"}, 4_281_792, 143_835_840, 2.9769),
    ("bart", IMAGE, "vlpet", {"granularity": "small"}, 4_291_020, 143_845_068, 2.9831),
    ("bart", IMAGE, "vlpet", {"granularity": "large_full"}, 11_359_680, 150_913_728, 7.5273),
    ("bart", VIDEO, "vlpet", {}, 4_872_768, None, 3.3739),
    ("bart", VIDEO, "vlpet", {"granularity": "middleX"}, 3_102_156, None, 2.1746),
    ("bart", VIDEO, "vlpet", {"granularity": "middleY"}, 3_102_144, None, 2.1746),
    ("bart", VIDEO, "vlpet", {"granularity": "small"}, 3_111_372, None, 2.1809),
    *(("bart", IMAGE, "vlpet", {"heads": 1, "granularity": g}, *counts) for g, counts in ON_VL_ADAPTER.items()),
    *(("bart", IMAGE, "vlpet", {"adapter": "compacter", "granularity": g}, *counts) for g, counts in ON_COMPACTER.items()),
    ("t5", IMAGE, "vlpet", {}, 17_582_208, 240_521_856, 7.3100),
    ("t5", IMAGE, "vlpet", {"granularity": "middleX"}, 10_499_736, 233_439_384, 4.4978),
    ("t5", IMAGE, "vlpet", {"granularity": "middleY"}, 10_499_712, 233_439_360, 4.4978),
    ("t5", IMAGE, "vlpet", {"granularity": "small"}, 10_518_168, 233_457_816, 4.5054),
]


@pytest.fixture(scope="module")
def models() -> dict[tuple[str, int], nn.Module]:
    return {(family, feat): real_size(family, feat) for family, feat in dict.fromkeys((row[0], row[1]) for row in ROWS)}


@pytest.mark.parametrize(("family", "feat_dim", "total"), [("bart", IMAGE, 141_156_864), ("bart", VIDEO, 139_977_216), ("t5", IMAGE, 224_540_160)])
def test_base(models: dict[tuple[str, int], nn.Module], family: str, feat_dim: int, total: int) -> None:
    assert sum(p.numel() for p in models[family, feat_dim].parameters()) == total


@pytest.mark.parametrize(("family", "feat_dim", "method", "options", "trainable", "total", "percent"), ROWS)
def test_counts(models, family, feat_dim, method, options, trainable, total, percent) -> None:  # type: ignore[no-untyped-def]
    model = models[family, feat_dim]
    handle = patch(model, method, tasks=["vqa", "gqa", "nlvr", "caption"], **options)
    report = handle.report
    handle.unpatch()
    assert report.trainable == trainable
    assert total is None or report.total == total
    assert round(report.percent, 4) == percent


def test_rows_by_hand(models: dict[tuple[str, int], nn.Module]) -> None:
    """VL-PET-large on BART: 12 adapters and 12 gates of 148,320, 6 value adapters, 13 encoder layer norms, the visual embedding."""
    model = models["bart", IMAGE]
    handle = patch(model, "vlpet")
    adapters = {s.id: s.parameters for s in handle.report.sites}
    base = {t.id: t.parameter.numel() for t in handle._trained}
    handle.unpatch()
    assert sum(n for name, n in adapters.items() if name.startswith("encoder")) == 2 * 12 * 148_320
    assert sum(n for name, n in adapters.items() if name.endswith(".value")) == 6 * 148_320
    assert sum(n for name, n in base.items() if name.startswith("encoder")) == 13 * 1_536
    assert sum(n for name, n in base.items() if name.startswith("visual_embedding")) == 1_582_848
    assert "encoder.layernorm_embedding.weight" in base and len(base) == 26 + 9


@pytest.mark.parametrize(("gate_rank", "trainable", "percent"), [(None, 280_416, 0.2005), (96, 551_616, 0.3937)])
def test_low_rank_visual_projector(gate_rank: int | None, trainable: int, percent: float) -> None:
    """VL-PET's projector is all that is trained."""
    report = patch(real_size("bart", IMAGE, visual_projector_rank=96, visual_projector_gate_rank=gate_rank), "visual_projection").report
    assert (report.trainable, report.total, round(report.percent, 4)) == (trainable, 139_574_016 + trainable, percent)


@pytest.mark.parametrize(
    ("options", "parameters"),
    [
        ({"decoder": "value_sequential"}, 6 * 148_320),
        ({"decoder": "value_ia3"}, 6 * 768),
        ({"decoder": "key_value"}, 6 * 148_320),
        ({"decoder": "feed_forward_ia3"}, 6 * 3072),
        ({"decoder": "multihead"}, 18 * 148_320),
        ({"decoder": ["self_attention", "feed_forward"], "decoder_ranks": [96, 48]}, 6 * (148_320 + 2 * 48 * 768 + 48 + 768)),
        ({"decoder": "cross_attention", "cross_gate_rank": 96}, 6 * 2 * 148_320),
        ({"decoder": "value_parallel", "value_residual": True}, 6 * 148_320),
        ({"decoder": "value_parallel", "value_residual": True, "value_gate_rank": 96}, 12 * 148_320),
        ({"decoder": (), "gating_rank": 96}, 12 * 148_320),
        ({"decoder": (), "granularity": "layernorm"}, 12 * 2 * 768),
        ({"decoder": (), "granularity": "l2norm"}, 0),
        ({"decoder": (), "adapter": "lora", "adapter_options": {"rank": 128}}, 12 * 2 * 128 * 768 - 12 * 148_320),
    ],
)
def test_vlpet_variants_by_hand(models: dict[tuple[str, int], nn.Module], options: dict[str, object], parameters: int) -> None:
    """Beside the encoder's adapters, 12 of 148,320 without a gate, its layer norms and the visual embedding."""
    handle = patch(models["bart", IMAGE], "vlpet", **{"granularity": "none", **options})
    trainable = handle.report.trainable
    handle.unpatch()
    assert trainable - 12 * 148_320 - 13 * 1_536 - 1_582_848 == parameters
