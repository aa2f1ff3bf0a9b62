"""`VisualEmbedding`'s forms, pooling, and errors at the door."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fastadapt.hosts.visual import VisualEmbedding, downsample, shorten


def make(**options: object) -> VisualEmbedding:
    torch.manual_seed(0)
    return VisualEmbedding(6, 8, **options)  # type: ignore[arg-type]


def test_order_embeddings_count_from_the_end_of_the_table() -> None:
    module, table = make(), torch.randn(20, 8)
    feats, boxes = torch.randn(2, 4, 6), torch.rand(2, 4, 4)
    img, obj = torch.tensor([[0, 0, 1, 1]]), torch.tensor([[0, 1, 0, 1]])
    plain = make(use_vis_order_embedding=False)
    plain.load_state_dict({k: v for k, v in module.state_dict().items() if not k.startswith("img_order")})
    want = plain(feats, boxes, table) + module.img_order_embedding.weight[img] + table[[19, 18, 19, 18]]
    torch.testing.assert_close(module(feats, boxes, table, img, obj), want)
    torch.testing.assert_close(module(feats, boxes, table), module(feats, boxes, table, torch.zeros(2, 4, dtype=torch.long), torch.arange(4)[None]))


def test_area_enters_beside_the_box() -> None:
    module, feats = make(use_vis_layer_norm=False, use_vis_order_embedding=False), torch.randn(1, 1, 6)
    boxes = torch.tensor([[[0.1, 0.5, 0.25, 0.75]]])  # x1, x2, y1, y2: 0.4 wide, 0.5 high
    pos = torch.cat([boxes, torch.tensor([[[0.2]]])], -1)
    torch.testing.assert_close(module(feats, boxes, torch.zeros(3, 8)), module.feat_embedding(feats) + module.absolute_vis_pos_embedding(pos))


def test_float32_boxes_beside_half_precision() -> None:
    assert make().bfloat16()(torch.randn(1, 4, 6).bfloat16(), torch.rand(1, 4, 4), torch.randn(9, 8).bfloat16()).dtype == torch.bfloat16


def test_one_layer_norm_after_the_sum() -> None:
    module = make(individual_vis_layer_norm=False)
    assert isinstance(module.layer_norm, nn.LayerNorm) and len(module.feat_embedding) == len(module.absolute_vis_pos_embedding) == 1
    out = module(torch.randn(2, 4, 6), torch.rand(2, 4, 4), torch.randn(20, 8))
    torch.testing.assert_close(out.mean(-1), torch.zeros(2, 4), atol=1e-5, rtol=0)


def test_downsample_pools_each_image_by_itself() -> None:
    feats = torch.randn(2, 2 * 49, 5)
    pooled = downsample(feats, 36, 2)
    assert pooled.shape == (2, 72, 5)
    grid = feats[1, 49:].T.reshape(5, 7, 7)
    assert torch.equal(pooled[1, 36:].T, nn.AdaptiveMaxPool2d(6)(grid).flatten(1))
    assert torch.equal(downsample(feats, 49, 2), feats)
    ids = torch.tensor([[0] * 49 + [1] * 49])
    assert torch.equal(shorten(ids, 72, 2), torch.tensor([[0] * 36 + [1] * 36]))
    assert torch.equal(shorten(torch.tensor([[0] * 36 + [1] * 36]), 72, 2), torch.tensor([[0] * 36 + [1] * 36]))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"feats": torch.zeros(2, 4, 5)}, r"feats: shape \(2, 4, 5\) must be \(batch, tokens, 6\)"),
        ({"feats": torch.zeros(4, 6)}, "feats: shape"),
        ({"boxes": torch.zeros(2, 3, 4)}, r"boxes: shape \(2, 3, 4\) must be \(2, 4, 4\)"),
        ({"boxes": torch.zeros(2, 4, 5)}, r"boxes: shape \(2, 4, 5\) must be \(2, 4, 4\)"),
        ({"img_order_ids": torch.zeros(2, 3, dtype=torch.long)}, "img_order_ids: shape"),
        ({"obj_order_ids": torch.zeros(4, dtype=torch.long)}, "obj_order_ids: shape"),
    ],
)
def test_errors(change: dict[str, torch.Tensor], message: str) -> None:
    call = {"feats": torch.zeros(2, 4, 6), "boxes": torch.zeros(2, 4, 4), "table": torch.zeros(20, 8)} | change
    with pytest.raises(ValueError, match=message):
        make()(**call)


@pytest.mark.parametrize("tokens, n_boxes, images", [(48, 36, 1), (49, 35, 1), (97, 36, 2)])
def test_downsample_wants_square_grids(tokens: int, n_boxes: int, images: int) -> None:
    with pytest.raises(ValueError, match="square"):
        downsample(torch.zeros(1, tokens, 3), n_boxes, images)
