"""What every launch asks of global memory is what the tables "bytes" above the kernels say, to the byte: the emulator's counters against the formulas in csrc/cuda/*.cuh."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from typing import Any, NamedTuple

import pytest
import torch

from fastadapt.backend import Call
from fastadapt.ops import _cost
from tests.cuda import emulator
from tests.ops import checks
from tests.ops.specs import BF16, DTYPES, GRANULARITIES, MIXED, PHM, Bottleneck, Gated, Lora, Norm, Routed, Spec

FP16, FP16_MIXED = DTYPES[3:]
KERNELS = (
    "prologue_kernel",
    "forward_kernel",
    "gated_forward_kernel",
    "gates_kernel",
    "rows_kernel",
    "slab_kernel",
    "reduce_kernel",
    "phm_forward_kernel",
    "phm_rows_kernel",
    "phm_reduce_kernel",
)
KERNELS += tuple(f"routed_{name}_kernel" for name in ("prologue", "forward", "rows", "slab", "reduce"))
KERNELS += tuple(f"lora_{name}_kernel" for name in ("forward", "slab", "reduce"))
KERNELS += tuple(f"norm_{name}_kernel" for name in ("forward", "rows", "reduce"))


class Line(NamedTuple):
    """A line of a kernel's table."""

    kernel: str
    direction: str
    named: frozenset[str]
    formula: str


@cache
def lines() -> tuple[Line, ...]:
    out = []
    for path in sorted((emulator.CSRC / "cuda").glob("*.cuh")):
        for kernel, table in re.findall(r"// (\w+)'s bytes[^\n]*\n((?://   [^\n]*\n)+)", path.read_text()):
            out += [Line(kernel, row[5:14].strip(), frozenset(row[14:37].split()) - {"-"}, row[37:].strip()) for row in table.splitlines()]
    return tuple(out)


class Launch(NamedTuple):
    """Part of a launch: a kernel, what of its table's names is given or asked for, and the values of the formulas' names. Of several in one launch, one counts."""

    kernel: str
    named: frozenset[str]
    values: dict[str, int]
    counts: bool = True
    only: frozenset[str] = frozenset()
    """Names that a line must have: the others count elsewhere."""

    def lines(self) -> Iterator[Line]:
        return (line for line in lines() if line.kernel == self.kernel and self.only <= line.named <= self.named)

    def bytes(self, direction: str) -> int:
        return sum(eval(line.formula, {}, self.values) for line in self.lines() if line.direction == direction)


# ---- csrc/include/cuda_plan.h once more


def bucket(rank: int, gated: bool = False) -> int:
    return next(r for r in ((32, 96, 192, 256) if gated else (32, 64, 96, 128, 192, 256)) if rank <= r)


def up_to(multiple: int, n: int) -> int:
    return -(-n // multiple) * multiple


def row_tiles(rows: int, bucket: int) -> dict[str, int]:
    threads = 128 if bucket <= 96 else 256
    return {"threads": threads, "tiles": -(-rows // (threads // 2))}


def splits(rows: int, width: int) -> int:
    most = max(1, min(-(-192 // -(-width // 64)), -(-rows // 256)))
    return -(-rows // max(64, up_to(64, -(-rows // most))))


def shares(rows: int, length: int) -> int:
    return sum(length * len({row // length for row in range(first, min(rows, first + 16))}) for first in range(0, rows, 16))


# ---- The launches of a call


def launches(spec: Spec, needs: frozenset[str]) -> Iterator[Launch]:
    """Of a call that trains ``needs``."""
    if isinstance(spec, PHM):
        yield from phm_launches(spec, needs)
        return
    if isinstance(spec, Routed):
        yield from routed_launches(spec, needs)
        return
    if isinstance(spec, Lora):
        yield from lora_launches(spec, needs)
        return
    if isinstance(spec, Norm):
        yield from norm_launches(spec, needs)
        return
    gated = spec if isinstance(spec, Gated) else None
    shapes = spec.shapes()
    given = {name for name in shapes}
    rows, width, rank = torch.Size(spec.lead).numel(), spec.width, spec.rank
    large = gated is not None and gated.granularity == "large"
    ranks = {"": rank, **({"gate_": gated.gate_rank} if large else {})}
    widest, cast, save = max(ranks.values()), spec.param_dtype not in (None, spec.dtype), bool(needs)
    base = {"N": rows, "D": width, "R": rank, "S": up_to(8, rank), "P": 4 if spec.param_dtype == torch.float32 else 2}
    if large:
        base |= {"G": gated.gate_rank, "H": up_to(8, gated.gate_rank)}

    def launch(kernel: str, named: dict[str, Any], counts: bool = True, **values: int) -> Launch:
        return Launch(kernel, frozenset(name for name, there in named.items() if there), {**base, **values}, counts)

    def prologue(copies: list[tuple[int, int, int, int]], fold: bool = False) -> Iterator[Launch]:
        """Copies: (rows, columns, to_stride, bytes a number)."""
        for i, (n, columns, to_stride, size) in enumerate(copies):
            yield launch("prologue_kernel", {"copy": True}, i == 0, rows=n, columns=columns, to_stride=to_stride, B=size)
        if fold:
            yield launch("prologue_kernel", {"fold": True, "b_up": "b_up" in given}, not copies)

    def weights(down: Callable[[str], bool]) -> list[tuple[int, int, int, int]]:
        out = []
        for part, r in ranks.items():
            if cast and down(part):
                out.append((r, width, width, base["P"]))
            if cast or r % 8:
                out.append((width, r, up_to(8, r), base["P"]))
        return out

    padded = [r for r in ranks.values() if r % 8]
    kind = gated.granularity if gated else ""
    row, small = kind in ("middleX", "small"), kind == "small"
    biases = {name: name in given for name in ("b_down", "b_up", "gate")}
    yield from prologue(weights(lambda part: True), row)
    if gated is None:
        named = {**biases, "scale": "scale" in given, "added": spec.options().get("residual") == "input", "other": "residual" in given, "z": save}
        yield launch("forward_kernel", named, **row_tiles(rows, bucket(rank)))
    else:
        own = bucket(widest, gated=True)
        tiles = {**row_tiles(rows, own), "passes": 2 if large and own >= 192 else 1, "shares": shares(rows, spec.lead[-1]), "sweeps": 2 if kind == "middleX" else 1}
        kept = bool(gated.save_gate and save)
        named = {**biases, "dual": large, "row": row, "gate_b": "gate_bias" in given, "gate_b_down": "gate_bias" in given, "gate_b_up": "gate_up_bias" in given}
        named |= {"logits": kind == "large_full", "middleY": kind == "middleY", "z": save or small, "zg": save, "total": kept, "kept": save or small}
        for again in (False, True) if small else (False,):
            expands = again or not small
            of_expands = {name: named[name] and expands for name in ("logits", "middleY")}
            yield launch("gated_forward_kernel", {**named, **of_expands, "projects": not again, "again": again, "expands": expands}, **tiles)
    if save:
        yield from prologue([(rows, r, r, 2) for r in padded])

    # Backward. The gate's bottleneck, whose input is x; then what is asked of each.
    if not needs - {"residual"}:
        return
    wanted = {"": {"dx": "x" in needs if gated is None else "h" in needs, "scale": "scale" in needs, "gate": gated is None and "gate" in needs}, "gate_": {"dx": "x" in needs}}
    for part, names in (("", ("w_down", "b_down", "w_up", "b_up")), ("gate_", ("gate_weight", "gate_bias", "gate_up_weight", "gate_up_bias"))):
        wanted[part] |= {name: there in needs for name, there in zip(("w_down", "b_down", "w_up", "b_up"), names, strict=True)}
    yield from prologue(weights(lambda part: wanted[part]["dx"]) + [(rows, r, up_to(8, r), 2) for r in padded])
    problems = [part for part in ranks if any(wanted[part].values())]
    tails: list[Launch] = []
    if gated is not None:
        weight, bias = (not large and kind != "large_full" and name in needs for name in ("gate_weight", "gate_bias"))
        columns = (2 if small else 1) * width
        d_logits = "gate_" in problems if large else kind == "large_full" and bool(needs & {"x", "gate_weight", "gate_bias"})
        inner = "" in problems
        for first in (True, False) if small else (False,):
            sums = (weight or bias) and not first
            total = (sums and (row or gated.combine != "add")) or (gated.combine != "add" and (d_logits or kind == "middleX" or first))
            named = {**biases, "gate_b_up": "gate_up_bias" in given, "dual": large, "row": row, "small": small, "logits": kind == "large_full", "middleY": kind == "middleY"}
            named |= {"expands": total and not kept, "total": total and kept, "saved": kept, "unsaved": not kept, "first": first, "second": small and not first, "sums": sums}
            named |= {"d_total": inner and not first, "d_logits": d_logits, "dx": row and "x" in needs and not first}
            yield launch("gates_kernel", named, **tiles, columns=columns + row)
        if weight or bias:
            tails.append(launch("reduce_kernel", {"sums": True}, False, count=tiles["tiles"], columns=columns + bias, stored=columns * weight + bias))

    parts = {"slabs": -(-width // 64), "splits": splits(rows, width), **row_tiles(rows, bucket(widest))}
    rows_launches, slab_launches, reduce_launches = [], [], []
    for part in problems:
        w, r = wanted[part], ranks[part]
        own = {**parts, "R": r, "S": up_to(8, r)}
        b_up = "gate_up_bias" in given if part else biases["b_up"]
        gate, scale = (gated is None and name in given for name in ("gate", "scale"))
        bracket = bool(w.get("gate") or w.get("scale"))
        p, s = w["w_up"] or bracket, w["b_up"] or (bracket and b_up)
        add = w["dx"] and not part and (gated is not None or spec.options().get("residual") == "input")
        d_z, dz = w["dx"] or w["w_down"] or w["b_down"], w["dx"] or w["w_down"]
        rows_launches.append(({"scale": scale, "d_z": d_z, "gate": gate, "a": p, "dz": dz, "d_b_down": w["b_down"]}, own, d_z or p))
        slab_launches.append(({"dy": p or s or add, "q": w["w_down"], "p": p, "dz": dz, "dx": w["dx"], "s": s}, own, p or dz or w["b_up"]))
        up = w["w_up"] or w["b_up"] or bracket
        stored = {f"d_{name}": w.get(name) for name in ("w_down", "w_up", "b_up", "gate", "scale")}
        if up or w["w_down"]:
            reduce_launches.append(({"up": up, "scale": scale, "gate": gate, "p": p, "s": s, "b_up": b_up, "q": w["w_down"], **stored}, own))
        if w["b_down"]:
            tails.append(launch("reduce_kernel", {"sums": True}, False, count=parts["tiles"], columns=r, stored=r))
    if any(needed for *_, needed in rows_launches):
        yield from (launch("rows_kernel", named, i == 0, **values) for i, (named, values, _) in enumerate(rows_launches))
    if any(needed for *_, needed in slab_launches):
        yield from (launch("slab_kernel", named, i == 0, **values) for i, (named, values, _) in enumerate(slab_launches))
    one = [*(launch("reduce_kernel", named, False, **values) for named, values in reduce_launches), *tails]
    yield from (part._replace(counts=i == 0) for i, part in enumerate(one))
    if wanted[""]["scale"]:
        yield launch("reduce_kernel", {"sums": True}, count=width, columns=1, stored=1)


# ---- Compacter's, with the tiles of fastadapt/ops/_cost.py


def phm_call(spec: PHM) -> Call:
    options = (("division", spec.division), ("factor_rank", spec.factor_rank))
    return Call("phm_bottleneck", "cpu", spec.dtype, spec.param_dtype or spec.dtype, torch.Size(spec.lead).numel(), spec.width, spec.rank, options)


def phm_launches(spec: PHM, needs: frozenset[str]) -> Iterator[Launch]:
    given = set(spec.shapes())
    rows, width, rank, n, k, tokens = torch.Size(spec.lead).numel(), spec.width, spec.rank, spec.division, spec.factor_rank, _cost.cuda_phm_tokens(phm_call(spec))
    tiles = -(-rows // tokens)
    splits = _cost.cuda_phm_splits(rows, tokens)
    _, slots, turns = _cost.cuda_phm_owners(n, width // n, tokens)
    added = spec.options().get("residual") == "input"
    base = {"N": rows, "D": width, "R": rank, "P": 4 if spec.param_dtype == torch.float32 else 2, "F": 2 * k * (width + rank) + 2 * n**3}
    base |= {"tiles": tiles, "splits": splits, "slots": slots, "groups": -(-up_to(4, n * k) // 8), "quads": -(-n * k // 4)}

    def launch(kernel: str, named: dict[str, Any], counts: bool = True, **values: int) -> Launch:
        return Launch(f"phm_{kernel}_kernel", frozenset(name for name, there in named.items() if there), {**base, **values}, counts)

    yield launch("forward", {"b_down": "b_down" in given, "b_up": "b_up" in given, "added": added, "other": "residual" in given, "z": bool(needs)})
    if not needs - {"residual"}:
        return
    thin_turns = _cost.cuda_phm_owners(n, rank // n, tokens)[2]
    numbers = {"rule": (n**3, 1), "left_down": (k * width, turns), "right_down": (k * rank, thin_turns), "b_down": (rank, 1)}
    numbers |= {"left_up": (k * rank, thin_turns), "right_up": (k * width, turns), "b_up": (width, 1)}
    gradients = [numbers.get(name) or numbers["rule"] for name in sorted(needs - {"x", "residual"})]
    dx, down = "x" in needs, bool(needs & {"x", "rule_down", "left_down", "right_down", "b_down"})
    named = {"down": down, "dy": down or needs & {"rule_up", "left_up"}, "d_right_up": "right_up" in needs, "d_b_up": "b_up" in needs, "alone": "right_up" not in needs}
    named |= {"x": needs & {"rule_down", "right_down"}, "d_left_down": "left_down" in needs, "dx": dx, "added": added}
    yield launch("rows", named)
    for i, (count, times) in enumerate(gradients):
        # The common lines are those of the launch above.
        yield launch("rows", {"gradient": True}, False, numbers=count, turns=times)._replace(only=frozenset({"gradient"}))
        yield launch("reduce", {"gradient": True}, i == 0, numbers=count)


# ---- of several tasks


def routed_launches(spec: Routed, needs: frozenset[str]) -> Iterator[Launch]:
    shapes, ids = spec.shapes(), spec.task_ids()
    given, rows, width, rank = set(shapes), torch.Size(spec.lead).numel(), spec.width, spec.rank
    banks = {f"{name.removeprefix('w_')}s": shape[0] for name, shape in shapes.items() if name not in spec.activations}
    tasks = max(banks.values())
    stride, cast, save = up_to(8, rank), spec.param_dtype not in (None, spec.dtype), bool(needs)
    of_task = torch.bincount(torch.where(ids < 0, tasks, ids), minlength=tasks + 1).mul(rows // len(ids)).tolist()
    own_bucket = bucket(rank, gated=True)
    threads = row_tiles(rows, own_bucket)["threads"]
    base = {"N": rows, "O": rows - of_task[-1], "D": width, "R": rank, "S": stride, "G": tasks, "I": len(ids), "P": 4 if spec.param_dtype == torch.float32 else 2, **banks}
    base |= {"threads": threads, "depth": 64 if own_bucket <= 96 else 32, "slabs": -(-width // 64), "block": 64 if own_bucket == 32 else 32}

    def pieces(count: Callable[[int], int], most: int) -> dict[str, int]:
        """What the blocks of a grid of ``most`` find, where each segment has ``count(rows)`` pieces."""
        found = [count(n) for n in of_task]
        scanned = sum(n * (task + 1) for task, n in enumerate(found)) + (most - sum(found)) * (tasks + 1)
        return {"all": sum(found), "own": sum(found[:-1]), "begins": scanned + 3 * sum(found)}

    def launch(kernel: str, named: dict[str, Any], counts: bool = True, **values: int) -> Launch:
        return Launch(kernel, frozenset(name for name, there in named.items() if there), {**base, **values}, counts)

    def prologue(copies: list[tuple[int, int, int, int]], routing: bool = True) -> Iterator[Launch]:
        if routing:
            yield launch("routed_prologue_kernel", {"routing": True})
        for i, (n, columns, to_stride, size) in enumerate(copies):
            kernel = "routed_prologue_kernel" if routing else "prologue_kernel"
            yield launch(kernel, {"copy": True}, not routing and i == 0, rows=n, columns=columns, to_stride=to_stride, B=size)

    def weights(down: bool) -> list[tuple[int, int, int, int]]:
        out = [(banks["downs"] * rank, width, width, base["P"])] if cast and down else []
        return out + ([(banks["ups"] * width, rank, stride, base["P"])] if cast or rank % 8 else [])

    least = min(rows, tasks + 1)
    tiles = pieces(lambda n: -(-n // (threads // 2)), rows // (threads // 2) + least)
    of_rows = {**tiles, "tiles": tiles["all"]}
    yield from prologue(weights(True))
    named = {"b_down": "b_down" in given, "b_up": "b_up" in given, "added": spec.options().get("residual") == "input", "other": "residual" in given, "z": save}
    yield launch("routed_forward_kernel", named, **of_rows)
    if save and rank % 8:
        yield from prologue([(rows, rank, rank, 2)], False)
    if not needs - {"residual"}:
        return
    dx, down, b_down, up, b_up = (name in needs for name in ("x", "w_down", "b_down", "w_up", "b_up"))
    yield from prologue(weights(dx) + ([(rows, rank, stride, 2)] if rank % 8 else []))
    if dx or down or b_down or up:
        yield launch("routed_rows_kernel", {"d_z": dx or down or b_down, "a": up, "dz": dx or down, "d_b_down": b_down}, **of_rows)
    of_splits = pieces(lambda n: splits(n, width), min(rows // 256 + least, (tasks + 1) * -(-192 // base["slabs"])))
    add = dx and spec.options().get("residual") == "input"
    if dx or down or up or b_up:
        named = {"dy": up or b_up or add, "q": down, "p": up, "dz": dx or down, "dx": dx, "s": b_up}
        yield launch("routed_slab_kernel", named, **of_splits, splits=of_splits["all"])
    # A block asks for its part of each problem and sum until it has found its own: two numbers of a task's, one of what is shared.
    begins = asked = 0
    for shared in (False, True) if down or up or b_up else ():
        own = {name for name, there in (("downs", down), ("ups", up), ("b_ups", b_up)) if there and shared == (banks[name] == 1)}
        blocks = (-(-width // 8) if own & {"ups", "b_ups"} else 0) + (-(-rank * width // 1024) if "downs" in own else 0)
        asked += 1 if shared else 2
        begins += asked * blocks * (1 if shared else tasks)
    if b_down:
        begins += (asked + (1 if banks["b_downs"] == 1 else 2)) * -(-rank // 32) * banks["b_downs"]
    if down or up or b_up or b_down:
        named = {"p": up, "s": b_up, "q": down, "d_w_down": down, "d_w_up": up, "d_b_up": b_up, "sums": b_down}
        yield launch("routed_reduce_kernel", named, **{**of_splits, "begins": begins}, own_tiles=tiles["own"])


# ---- LoRA's


def lora_launches(spec: Lora, needs: frozenset[str]) -> Iterator[Launch]:
    rows, into, out, rank = torch.Size(spec.lead).numel(), spec.width, spec.out, spec.rank
    cast, save, stride = spec.param_dtype not in (None, spec.dtype), bool(needs), up_to(8, rank)
    base = {"N": rows, "D": out, "I": into, "R": rank, "S": stride, "P": 4 if spec.param_dtype == torch.float32 else 2, **row_tiles(rows, bucket(rank))}
    base |= {"slabs": -(-out // 64), "x_slabs": -(-into // 64), "larger": -(-max(into, out) // 64), "splits": splits(rows, max(into, out))}

    def launch(kernel: str, named: dict[str, Any], counts: bool = True, **values: int) -> Launch:
        return Launch(kernel, frozenset(name for name, there in named.items() if there), {**base, **values}, counts)

    def prologue(down: bool = False, up: bool = False, z: bool = False, to_stride: int = stride) -> Iterator[Launch]:
        copies = [(rank, into, into, base["P"])] if down and cast else []
        copies += [(out, rank, stride, base["P"])] if up and (cast or rank % 8) else []
        copies += [(rows, rank, to_stride, 2)] if z and rank % 8 else []
        for i, (n, columns, to, size) in enumerate(copies):
            yield launch("prologue_kernel", {"copy": True}, i == 0, rows=n, columns=columns, to_stride=to, B=size)

    drops = spec.dropout > 0
    yield from prologue(down=True, up=True)
    yield launch("lora_forward_kernel", {"b_up": spec.biases == "up", "drops": drops, "z": save})
    yield from prologue(z=save, to_stride=rank)
    dx, down, up, b_up = (name in needs for name in ("x", "w_down", "w_up", "b_up"))
    if not (dx or down or up or b_up):
        return
    yield from prologue(down=dx, up=dx or down, z=dx or down or up)
    if dx or down:
        yield launch("rows_kernel", {"d_z": True, "dz": True})
    yield launch("lora_slab_kernel", {"dy": up or b_up, "q": down, "p": up, "dz": dx or down, "dx": dx, "drops": drops, "s": b_up})
    if down or up or b_up:
        yield launch("lora_reduce_kernel", {"p": up, "s": b_up, "q": down, "d_w_down": down, "d_w_up": up, "d_b_up": b_up})


# ---- Dropout, sum and norm


def norm_launches(spec: Norm, needs: frozenset[str]) -> Iterator[Launch]:
    given, rows, width = set(spec.shapes()), torch.Size(spec.lead).numel(), spec.width
    lanes, splits, normed, drops = _cost.cuda_norm_lanes(width), _cost.cuda_norm_splits(rows, width), spec.norm is not None, spec.dropout > 0
    base = {"N": rows, "D": width, "A": spec.dtype.itemsize, "V": spec.out_dtype.itemsize, "P": (spec.param_dtype or spec.out_dtype).itemsize, "lanes": lanes}

    def launch(kernel: str, named: dict[str, Any], **values: int) -> Launch:
        return Launch(f"norm_{kernel}_kernel", frozenset(name for name, there in named.items() if there), {**base, **values})

    save = bool(needs) or spec.returns != "y"
    named = {name: name in given for name in ("residual", "weight", "bias")} | {"drops": drops, "y": normed, "v": not normed or (save and ("residual" in given or drops))}
    yield launch("forward", {**named, "mean": save and spec.norm == "layer", "rstd": save and normed})

    dy, same = normed and spec.returns != "sum", not drops and spec.out_dtype == spec.dtype
    dx = "x" in needs and not (same and (not dy or "residual" in needs))
    dresidual, d_weight, d_bias = (dy and name in needs for name in ("residual", "weight", "bias"))
    if not (dx or dresidual or d_weight or d_bias):
        return
    of_row, sums = dx or dresidual, {"splits": splits, "blocks": splits, "threads": max(256, lanes)} if d_weight or d_bias else {"blocks": rows, "threads": lanes}
    saved = dy and (of_row or d_weight)
    named = {"dy": dy, "dv": of_row and not (dy and spec.returns == "y"), "saved": saved, "mean": saved and spec.norm == "layer", "rstd": saved}
    named |= {"weight": dy and of_row and "weight" in given, "drops": drops, "dx": dx, "dresidual": dresidual, "d_weight": d_weight, "d_bias": d_bias}
    yield launch("rows", named, **sums)
    if d_weight or d_bias:
        yield launch("reduce", {"d_weight": d_weight, "d_bias": d_bias}, **sums)


# ---- The calls


def over(dtypes: tuple[torch.dtype, torch.dtype], kind: type[Spec] = Bottleneck, **options: Any) -> Spec:
    return kind(dtype=dtypes[0], param_dtype=dtypes[1], **options)


# Rows of part of a tile, of several and of several splits; widths of part of a slab; every bucket; ranks that 8 divides or not.
PLAIN = [
    over(BF16, lead=(65,), width=64, rank=16),
    over(MIXED, lead=(37,), width=72, rank=7, residual="other", scale="tensor", gate=True),
    over(FP16, lead=(130,), width=200, rank=64, residual=None, gate=True, scale="tensor"),
    over(FP16_MIXED, lead=(129,), width=8, rank=96, biases="none"),
    over(BF16, lead=(600,), width=72, rank=100, scale="tensor", biases="up"),
    over(MIXED, lead=(300,), width=136, rank=170, gate=True, biases="down"),
    over(BF16, lead=(1,), width=40, rank=250),
]
GATED = [
    *(
        over(d, Gated, lead=lead, width=72, rank=r, gate_rank=q, granularity=g, combine=c, save_gate=s)
        for g in GRANULARITIES
        for d, lead, r, q, c, s in (
            (BF16, (2, 33), 16, 24, "multiply", True),
            (MIXED, (3, 50), 7, 9, "add", False),
            (FP16, (5, 9), 96, 40, "multiply", False),
            (FP16_MIXED, (2, 70), 40, 130, "add", True),
        )
    ),
    *(over(BF16, Gated, lead=(3, 100), width=136, rank=190, gate_rank=201, granularity=g, save_gate=False, biases="none", gate_bias=False) for g in ("large", "middleX", "small")),
    *(over(MIXED, Gated, lead=(280, 1), width=64, rank=33, gate_rank=256, granularity=g, save_gate=True) for g in ("large", "middleY")),
]
# Tiles of part of the tokens, of fewer than 32 and more than one a split; rows of more vectors than a block has threads; pairs that 4 and 8 divide or not; ragged parts.
COMPACTER = [
    over(BF16, PHM, lead=(70,), width=64, rank=12),
    over(MIXED, PHM, lead=(37,), width=96, rank=24, residual="other", factor_rank=2),
    over(FP16, PHM, lead=(40,), width=36, rank=9, residual=None, division=3, factor_rank=3, biases="none"),
    over(FP16_MIXED, PHM, lead=(9,), width=2144, rank=32, division=1, biases="up"),
    over(BF16, PHM, lead=(20,), width=4, rank=4160, factor_rank=1, biases="down"),
    over(BF16, PHM, lead=(11,), width=128, rank=32, division=16, factor_rank=2),
    over(BF16, PHM, lead=(257 * 32,), width=32, rank=4),
]
ROUTED = [
    over(BF16, Routed, lead=(9, 17), width=72, rank=16, outside=True, residual="other"),
    over(MIXED, Routed, lead=(9, 17), width=136, rank=7, tasks=4, shared="up"),
    over(FP16, Routed, lead=(700,), width=200, rank=96, tasks=2, ids="row", outside=True, residual=None, biases="up"),
    over(FP16_MIXED, Routed, lead=(3, 100), width=64, rank=170, tasks=3, shared="down"),
    over(BF16, Routed, lead=(1,), width=40, rank=9, tasks=20, biases="none"),
    over(MIXED, Routed, lead=(65,), width=64, rank=250, tasks=1, biases="down"),
]
LORA = [
    over(BF16, Lora, lead=(70,), width=72, out=200, rank=16, dropout=0.5),
    over(MIXED, Lora, lead=(600,), width=328, out=64, rank=7, biases="up", dropout=0.1),
    over(FP16, Lora, lead=(1,), width=64, out=40, rank=96),
    over(FP16_MIXED, Lora, lead=(130,), width=64, out=264, rank=130, biases="up"),
]
# Rows of part of a block's, of several and of several a split; widths of whole vectors and ragged, of a narrow and of a wide block.
NORMS = [
    over(BF16, Norm, lead=(70,), width=72, dropout=0.3, returns="both"),
    over(MIXED, Norm, lead=(9, 3), width=1030, residual="wide", norm="rms", dropout=0.1, biases="weight"),
    over(FP16, Norm, lead=(1030,), width=17, residual=None, biases="both"),
    Norm(lead=(300,), width=1100, norm="rms", returns="both"),
    over(FP16_MIXED, Norm, lead=(37,), width=64, residual=None, biases="none", dropout=0.5),
    over(BF16, Norm, lead=(37,), width=64, norm=None, biases="none", dropout=0.5),
    Norm(lead=(37,), width=64, norm=None, biases="none"),
    over(MIXED, Norm, lead=(20,), width=64, residual="wide", biases="none", returns="sum"),
]
FEW = [PLAIN[1], PLAIN[4], COMPACTER[1], COMPACTER[2], *(replace(spec, lead=(3, 23)) for spec in GATED if spec.rank in (7, 96)), *ROUTED[:2], *LORA[:2], *NORMS[:4]]


def cases() -> list[Any]:
    """Every call with all gradients, and some of them with none, one, or all but one."""
    out = [(spec, frozenset(spec.shapes())) for spec in [*PLAIN, *GATED, *COMPACTER, *ROUTED, *LORA, *NORMS]]
    for spec in FEW:
        out += [
            (spec, frozenset()),
            *((spec, frozenset({name})) for name in spec.shapes()),
            *((spec, frozenset(spec.shapes()) - {name}) for name in ("w_up", "w_down", "right_up", "left_up", "weight") if name in spec.shapes()),
        ]
    return [pytest.param(spec, needs, id=f"{spec.op}-{spec}-{','.join(sorted(needs)) if len(needs) < 2 else len(needs)}") for spec, needs in out]


def assert_bytes(spec: Spec, needs: frozenset[str], machine: emulator.Machine) -> None:
    tensors, dy = spec.draw(0), spec.cotangent(0)
    machine.stats(reset=True)
    checks.fused(spec, "emulated-cuda", tensors, dy, needs=tuple(name for name in tensors if name in needs))
    found = {
        kernel.partition("<")[0]: (counted["launches"], counted["cp_async_bytes"] + counted["global_load_bytes"], counted["global_store_bytes"])
        for kernel, counted in machine.stats(reset=False).items()
    }
    expected: dict[str, Counter[str]] = {}
    for launch in launches(spec, needs):
        total = expected.setdefault(launch.kernel, Counter())
        total += Counter(launches=int(launch.counts), reads=launch.bytes("reads"), writes=launch.bytes("writes"))
    assert found == {kernel: (total["launches"], total["reads"], total["writes"]) for kernel, total in expected.items()}


@pytest.mark.parametrize(("spec", "needs"), cases())
def test_bytes_are_those_of_the_tables(spec: Spec, needs: frozenset[str], machine: emulator.Machine) -> None:
    assert_bytes(spec, needs, machine)


def test_every_line_of_every_table_is_met() -> None:
    assert {line.kernel for line in lines()} == set(KERNELS)
    met = {line for case in cases() for launch in launches(*case.values) for line in launch.lines()}
    assert [line for line in lines() if line not in met] == []


def test_the_compiled_limits_of_compacter_are_those_of_the_model(emulated: None) -> None:
    """On both sides of where the factors, or a token's products, fill a block's shared memory."""
    shapes = [(n, k, n * wide, n * thin) for n in (1, 2, 4, 7, 12, 16) for k in (1, 3, 8) for wide in (1, 24, 192, 1024, 3000) for thin in (1, 24, 96, 2000)]
    shapes += [(17, 1, 136, 17), (4, 9, 64, 8)]
    taken = {True: 0, False: 0}
    for n, k, width, rank in shapes:
        call = phm_call(PHM(lead=(1,), width=width, rank=rank, dtype=torch.bfloat16, division=n, factor_rank=k))
        why = torch.ops.fastadapt_cuda_emulated.phm_why_not(1, 1, width, rank, n, k)
        assert _cost.cuda_limits(call) == ([why] if why else []), call
        taken[not why] += 1
    assert min(taken.values()) > 50


def test_the_compiled_limits_of_norms_are_those_of_the_model(emulated: None) -> None:
    types = {torch.float32: 0, torch.bfloat16: 1, torch.half: 2}
    for dtype, number in types.items():
        for width in (0, 1, 1024, 1025, 8192, 8193):
            why = torch.ops.fastadapt_cuda_emulated.norm_why_not(number, number, number, width)
            assert _cost.cuda_limits(Call("dropout_add_norm", "cuda", dtype, dtype, 1, width, 0)) == ([why] if why else [])
            assert bool(why) == (width in (0, 8193))
