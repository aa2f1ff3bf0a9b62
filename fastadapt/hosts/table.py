"""The table of supported hosts, from the register."""

from __future__ import annotations

from fastadapt.hosts import generic, roles, vlm

# What the register cannot say without transformers: the layers and models of the files that import it.
_WRITTEN_OUT = {
    "bart": ("`BartEncoderLayer`, `BartDecoderLayer`", "BART, VL-BART; Florence-2 (language)"),
    "t5": ("`T5Block`", "T5, Flan-T5, VL-T5; BLIP-2, InstructBLIP (language)"),
    "blip": ("`BlipEncoderLayer`, `BlipTextLayer`", "BLIP, for UniAdapter"),
}


def table() -> str:
    """The supported hosts as a Markdown table: family (the file in `fastadapt.hosts`), the layers of transformers that it adapts, the models that have them."""
    families = {family: (_WRITTEN_OUT[family] if family in _WRITTEN_OUT else _declared(family)) for family in roles.families()}
    rows = [(f"`{family}`", *row) for family, row in families.items()]
    rows.append((f"`{vlm.FAMILY}`", ", ".join(f"`{name}`" for name in vlm.PROJECTORS), ", ".join(dict.fromkeys(", ".join(vlm.PROJECTORS.values()).split(", ")))))
    rows.append((f"`{generic.FAMILY}`", "output projections by their names, or `sites={role: pattern}`", "others; without the residual stream, so without VL-PET's gates"))
    return "\n".join(f"| {' | '.join(row)} |" for row in (("family", "layers", "models"), ("---",) * 3, *rows))


def _declared(family: str) -> tuple[str, str]:
    roles.load_declarations()
    blocks = {name: host for (_, name), host in roles._declared.items() if host.family == family}
    return ", ".join(f"`{name}`" for name in blocks), "; ".join(dict.fromkeys(host.models for host in blocks.values()))
