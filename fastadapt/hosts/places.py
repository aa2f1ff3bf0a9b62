"""Places that hosts of several families share."""

from __future__ import annotations

from fastadapt.hosts.roles import Place

SEQ2SEQ_STAGES = ("encoder.prompt", "decoder.prompt", "encoder.hypernetwork", "decoder.hypernetwork")


def projections(attention: str, path: str, query: str = "q_proj", value: str = "v_proj") -> tuple[Place, ...]:
    """Beside the query and value projections of an attention."""
    return Place(f"{attention}.query", f"{path}.{query}", "parallel_adapter"), Place(f"{attention}.value", f"{path}.{value}", "parallel_adapter")


# A layer that adds both residuals in its own forward.
LAYER = (Place("encoder.self_attention", "", "self_attention_adapter"), Place("encoder.feed_forward", "", "feed_forward_adapter"))

BART_ENCODER = (*LAYER, *projections("encoder.self_attention", "self_attn"))
BART_DECODER = (
    Place("decoder.self_attention", "", "self_attention_adapter"),
    Place("decoder.cross_attention", "", "cross_attention_adapter"),
    Place("decoder.feed_forward", "", "feed_forward_adapter"),
    *projections("decoder.self_attention", "self_attn"),
    *projections("decoder.cross_attention", "encoder_attn"),
    Place("decoder.cross_attention.key_value", "", "key_value_adapter"),
    Place("decoder.feed_forward.inner", "fc2", "inner_adapter"),
)

T5_ENCODER = (
    Place("encoder.self_attention", "layer.0", "adapter"),
    Place("encoder.feed_forward", "layer.1", "adapter"),
    *projections("encoder.self_attention", "layer.0.SelfAttention", "q", "v"),
)
T5_DECODER = (
    Place("decoder.self_attention", "layer.0", "adapter"),
    Place("decoder.cross_attention", "layer.1", "adapter"),
    Place("decoder.feed_forward", "layer.2", "adapter"),
    *projections("decoder.self_attention", "layer.0.SelfAttention", "q", "v"),
    *projections("decoder.cross_attention", "layer.1.EncDecAttention", "q", "v"),
    Place("decoder.cross_attention.key_value", "layer.1", "key_value_adapter"),
    Place("decoder.feed_forward.inner", "layer.2.DenseReluDense.wo", "inner_adapter"),
)
