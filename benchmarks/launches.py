"""Operations, kernels and bytes of each site, forward and backward, of the authors' eager code and of fastadapt. ``python -m benchmarks.launches [--json FILE]``

Eager's operations, and the library's on CPU, are counted as torch dispatches them (views and allocations aside), with the bytes of their operands. GPU kernels and their traffic
are modelled (`fastadapt.ops._cost`): tests hold Triton's launches to those it makes, and the bytes to the kernels' formulas. Bytes are in units of T d elements of the
activations: one reading or writing of all rows. Saved: bytes a row that autograd keeps for backward beyond the inputs of the call.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fastadapt import backend, functional
from fastadapt.ops import _cost
from tests import eager
from tests.ops.specs import MIXED, PHM, Bottleneck, Gated, Lora, Norm, Routed, Spec

_FREE = {"view", "t", "transpose", "expand", "slice", "detach", "_unsafe_view", "unsqueeze", "select", "split", "alias", "as_strided", "permute", "promote_types", "new_empty"}
ARCH = 80


class Counted(TorchDispatchMode):
    """Counts operations that launch, and the bytes of their operands."""

    def __init__(self) -> None:
        super().__init__()
        self.launches, self.bytes = 0, 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        tensors = [t for t in torch.utils._pytree.tree_leaves((args, kwargs, out)) if isinstance(t, torch.Tensor)]
        if function.overloadpacket.__name__ not in _FREE and sum(t.numel() for t in tensors):
            self.launches += 1
            self.bytes += sum(t.numel() * t.element_size() for t in tensors)
        return out


@dataclass(frozen=True)
class Row:
    """One site. Counts are (forward, backward)."""

    site: str
    op: str
    rows: int
    width: int
    rank: int
    eager_operations: tuple[int, int]
    eager_traffic: tuple[float, float]
    eager_saved: float
    operations: tuple[int, int]
    saved: float
    triton_kernels: tuple[int, int]
    cuda_kernels: tuple[int, int]
    cuda_traffic: tuple[float, float]

    def __str__(self) -> str:
        def pair(numbers: tuple[float, float], form: str = "d") -> str:
            return f"{numbers[0]:{form}} + {numbers[1]:{form}}"

        return (
            f"{self.site:34s} {pair(self.eager_operations):>8s} ops {pair(self.eager_traffic, '.1f'):>13s} {self.eager_saved:6.0f} B | {pair(self.operations):>6s} ops"
            f" {self.saved:5.0f} B | triton {pair(self.triton_kernels)}, cuda {pair(self.cuda_kernels)} kernels {pair(self.cuda_traffic, '.1f')}"
        )


def sites(rows: int = 4096, width: int = 768) -> dict[str, Spec]:
    """The sites of the papers, fp32 parameters over bf16 activations."""
    common: dict[str, Any] = {"lead": (rows // 64, 64), "width": width, "dtype": MIXED[0], "param_dtype": MIXED[1]}
    gated = {**common, "rank": 96}
    return {
        "VL-Adapter": Bottleneck(**common, rank=96),
        "value-parallel adapter": Bottleneck(**common, rank=96, residual="other"),
        **{f"VL-PET, {g}": Gated(**gated, granularity=g, **({"gate_rank": 96} if g == "large" else {})) for g in ("large", "middleX", "middleY", "small")},
        "Compacter (n = 4, rank 1)": PHM(**common, rank=96),
        "LoRA, dropout": Lora(**{**common, "rank": 16}, out=width, scale=2.0, dropout=0.1),
        "post-norm, dropout": Norm(**common, dropout=0.1),
        "VL-Adapter, 4 tasks in one batch": Routed(**common, rank=96, tasks=4),
    }


def measured(run: Callable[[dict[str, Tensor]], Tensor], tensors: dict[str, Tensor], dy: Tensor) -> tuple[list[Counted], int]:
    """What forward and backward dispatch, and the bytes saved between them that are no argument's."""
    leaves = {name: t.detach().requires_grad_() for name, t in tensors.items()}
    own = {t.untyped_storage().data_ptr() for t in leaves.values()}
    saved: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        if (storage := t.untyped_storage()).data_ptr() not in own:
            saved[storage.data_ptr()] = storage.nbytes()
        return t

    counts = [Counted(), Counted()]
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t), counts[0]:
        y = run(leaves)
    with counts[1]:
        torch.autograd.grad(y, list(leaves.values()), dy)
    return counts, sum(saved.values())


def published(spec: Spec, t: dict[str, Tensor]) -> Tensor:
    """The site as its authors have it: VL-PET's heads as modules of their own, LoRA as PEFT's layer with torch's dropout."""
    if isinstance(spec, Lora):
        x = F.dropout(t["x"], spec.dropout)
        return t["y"] + F.linear(F.linear(x, t["w_down"].to(x.dtype)), t["w_up"].to(x.dtype)) * spec.scale
    if isinstance(spec, Norm):  # with torch's dropout
        return eager.dropout_add_norm(**t, **spec.options())  # type: ignore[return-value]
    heads = 4 if isinstance(spec, Gated) else 1
    split = {name: [p.contiguous() for p in t[name].chunk(heads)] for name in ("w_down", "b_down") if heads > 1 and name in t}
    return spec.call(eager, {**t, **split})  # type: ignore[dict-item, arg-type]


def row(site: str, spec: Spec) -> Row:
    """Counts of one site."""
    tensors, dy = spec.draw(0), spec.cotangent(0)

    def ours(t: dict[str, Tensor]) -> Tensor:
        return spec.call(functional, t)  # type: ignore[arg-type]

    rows = torch.Size(spec.lead).numel()
    unit = rows * spec.width * spec.dtype.itemsize
    theirs, kept = measured(lambda t: published(spec, t), tensors, dy)
    with backend.use("cpu"):
        own, saved = measured(ours, tensors, dy)
    kernels = {name: model(spec, name) for name in ("triton", "cuda")}
    counts = {name: (_launches(m.forward), _launches(m.backward)) for name, m in kernels.items()}
    traffic = tuple(sum(k.hbm for k in part) / unit for part in (kernels["cuda"].forward, kernels["cuda"].backward))
    return Row(
        site, spec.op, rows, spec.width, spec.rank, (theirs[0].launches, theirs[1].launches), (theirs[0].bytes / unit, theirs[1].bytes / unit), kept / rows,
        (own[0].launches, own[1].launches), saved / rows, counts["triton"], counts["cuda"], traffic,  # type: ignore[arg-type]
    )  # fmt: skip


def _launches(kernels: list[_cost.Kernel]) -> int:
    return sum(kernel.launches for kernel in kernels)


def model(spec: Spec, name: str) -> _cost.Model:
    """The cost model of the site's call on a GPU."""
    options: dict[str, Any] = {}
    if isinstance(spec, Gated):
        kind = "logits" if spec.granularity == "large_full" else spec.granularity
        options = {"gate_rank": spec.gate_rank if spec.granularity == "large" else 0, "granularity": kind}
    elif isinstance(spec, PHM):
        options = {"division": spec.division, "factor_rank": spec.factor_rank}
    elif isinstance(spec, Routed):
        options = {"tasks": spec.tasks}
    elif isinstance(spec, Lora):
        options = {"dropout": spec.dropout > 0, "out_width": spec.out}
    elif isinstance(spec, Norm):
        options = {"dropout": spec.dropout > 0, "norm": spec.norm or "none", "wide": spec.out_dtype != spec.dtype}
    rows = torch.Size(spec.lead).numel()
    call = backend.Call(spec.op, "cuda", spec.dtype, spec.param_dtype or spec.dtype, rows, spec.width, spec.rank, tuple(options.items()), ARCH)
    return backend._plans[spec.op].models[name](call)


HEADER = "site                               eager: operations, traffic in T d, saved a row | fastadapt on cpu | on a GPU (kernels; traffic as modelled)"


def listed(args: argparse.Namespace) -> Iterator[str]:
    """A line for every site."""
    yield from sites()


def run(args: argparse.Namespace) -> Iterator[list[Row]]:
    """Every site, printing as it goes; nothing is timed, so the quick list is the same."""
    print(HEADER)
    for site, spec in sites().items():
        found = row(site, spec)
        print(found, flush=True)
        yield [found]


def main() -> None:
    parser = argparse.ArgumentParser(description="Operations, kernels and bytes of each site.")
    parser.add_argument("--rows", type=int, default=4096)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--json", help="write the rows to this file")
    args = parser.parse_args()
    found = [row(site, spec) for site, spec in sites(args.rows, args.width).items()]
    print(HEADER)
    print(*found, sep="\n")
    if args.json:
        with open(args.json, "w") as file:
            json.dump([asdict(r) for r in found], file, indent=1)


if __name__ == "__main__":
    main()
