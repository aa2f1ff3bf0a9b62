"""Mutants of the CPU kernels: `python -m tests.cpu_mutants [--most N] [--jobs N]` writes tests/data/cpu_mutants.json.

Every code line of csrc/cpu is searched for the patterns below; each match is one mutant: the sources are copied, changed in that place, compiled for AVX2 (fp32, and bf16 over fp32
parameters) and checked against fp64. A mutant is killed by the compiler, by a wrong result, or by a crash. Survivors must be in EXPLAINED.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
OUT = ROOT / "tests" / "data" / "cpu_mutants.json"
FILES = ("csrc/cpu/tile.h", "csrc/cpu/bottleneck.cpp", "csrc/cpu/gated_bottleneck.cpp")
PATTERNS = {  # kind: (pattern, replacement)
    "row bound": (r"i < m;", "i < m - 1;"),
    "first row": (r"int64_t i = 0; i < m;", "int64_t i = 1; i < m;"),
    "sign": (r" \+ Vec::loadu\(", " - Vec::loadu("),
    "padding": (r"^\s*std::fill\(.*;$", ";"),
    "padding after conversion": (r", std::fill\(dst \+ n, dst \+ to, 0\.f\);", ";"),
    "bound": (r"std::min\(", "std::max("),
    "constant": (r"0\.044715f|0\.134145f|0\.70710678118654752f|0\.3989422804014327f", "0.03f"),
    "first tile": (r", add, ", ", true, "),
    "later tile": (r", add, ", ", false, "),
    "scale": (r"p\.(adapter_|input_)?scale\b(?!_)", "1.f"),
    "form": (r"p\.add \?", "!p.add ?"),
    "condition": (r"if \(p\.(add_input|residual|gate|scale_tensor|dx|dh)\)", r"if (!p.\1)"),
    "granularity": (r"p\.kind == kSmall", "p.kind == kMiddleX"),
    "row offset": (r"\(row \+ i\)", "(row)"),
    "column offset": (r"([+] c\b)(?= [+]|,|\))", "+ 0"),
    "rounding": (r"narrow\(row \+ j0, rounded, n\), widen\(rounded, row \+ j0, n\);", ";"),
    "parameter rounding": (r"narrow\(dst \+ i, rounded, .*;$", ";"),
    "derivative": (r"g\.rest|\(Vec\(1\.f\) - gate\)", "Vec(1.f)"),
    "sum order or count": (r"c < chunks", "c < chunks - 1"),
    "gate weights": (r"w \+= p\.width;", ";"),
}
EXPLAINED: dict[str, str] = {
    "padding: std::fill(dst + n, dst + to, 0.f);": "operands are padded with zeros on the other side of each product, and what lies behind the width is not stored",
}

CHECK = """
import itertools, sys
from pathlib import Path
import torch
from fastadapt.ops import _cpu
_cpu._FOLDER = Path(sys.argv[1])
from fastadapt import backend, functional as F
from tests import eager, tolerance
torch.set_num_threads(1)
g = torch.Generator().manual_seed(0)
def make(*s, scale=1.0): return torch.randn(*s, generator=g) * scale
def check(ours, rival, tensors, a, p, frozen=()):
    cast = [None if t is None else t.to(a if i < 2 else p) for i, t in enumerate(tensors)]
    runs = {}
    for name, f, dtype in (("ours", ours, None), ("eager", rival, None), ("exact", rival, torch.float64)):
        leaves = [None if t is None else (t if dtype is None else t.to(a).to(dtype)).detach().requires_grad_(i not in frozen) for i, t in enumerate(cast)]
        with backend.use("cpu"):
            y = f(*leaves)
        dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(7)).to(a).to(y.dtype)
        wanted = [t for i, t in enumerate(leaves) if t is not None and i not in frozen]
        runs[name] = [y, *torch.autograd.grad(y, wanted, dy)]
        assert name != "ours" or torch.equal(y.detach(), f_nograd(f, leaves)), "no_grad differs"
    for i, (o, e, x) in enumerate(zip(*(runs[k] for k in ("ours", "eager", "exact")))):
        if o.numel() >= tolerance.SMALL or a == torch.float32:
            slack = 8 if o.numel() >= tolerance.SMALL else 30  # one seed: a detector of mutants, not the rule
            assert tolerance.relative_error(o, x) <= slack * tolerance.limit_of(tolerance.relative_error(e, x), a, gradient=i > 0), i
def f_nograd(f, leaves):
    with torch.no_grad(), backend.use("cpu"): return f(*leaves)
TYPES = ((torch.float32, torch.float32), (torch.bfloat16, torch.float32))
SHAPES = ((65, 33, 7), (9, 160, 40), (620, 72, 20), (1, 72, 8), (65, 72, 96))
for (t, d, r), (a, p), act in zip(SHAPES, itertools.cycle(TYPES), ("gelu_new", "gelu", "relu", "silu", "identity")):
    x, res, wd, wu, bd, bu, gate, s = make(t, d), make(t, d), make(r, d, scale=0.2), make(d, r, scale=0.2), make(r), make(d), make(d), make(1)
    for acts in ((act,), ("gelu_new", "gelu", "silu", "relu"))[t == 65]:
        def call(module, **k): return lambda x, res, wd, wu, bd, bu, gate, s: module.bottleneck(x, wd, wu, bd, bu, activation=acts, gate=gate, scale=s, **k)
        check(call(F), call(eager), [x, None, wd, wu, bd, bu, gate, s], a, p)
        def parallel(module): return lambda x, res, wd, wu, bd, bu: module.bottleneck(x, wd, wu, bd, bu, residual=res, scale=0.7)
        check(parallel(F), parallel(eager), [x, res, wd, wu, bd, bu], a, p)
        def bare(module): return lambda x, res, wd, wu: module.bottleneck(x, wd, wu, residual=None)
        check(bare(F), bare(eager), [x, None, wd, wu], a, p, frozen=(0,))
for (b, l, d, r, q), (a, p) in itertools.product(((2, 33, 33, 7, 5), (1, 9, 160, 40, 8), (2, 310, 72, 20, 36)), TYPES):
    for kind, combine, save in itertools.product(("large", "large_full", "middleX", "middleY", "small"), ("multiply", "add"), (False, True)):
        if (d == 160 and save) or (l == 310 and combine == "add" and not save): continue
        gates = {"large": {"gate_weight": (q, d), "gate_bias": (q,), "gate_up_weight": (d, q), "gate_up_bias": (d,)},
                 "large_full": {"gate_weight": (d, d), "gate_bias": (d,)}, "middleX": {"gate_weight": (d,), "gate_bias": (1,)},
                 "middleY": {"gate_weight": (d,)}, "small": {"gate_weight": (2 * d,), "gate_bias": (1,)}}[kind]
        options = {"granularity": kind, "combine": combine, "save_gate": save, "input_scale": 0.7, "adapter_scale": 1.3, "scale": 0.6}
        def call(module): return lambda h, x, wd, wu, bd, bu, *gs: module.gated_bottleneck(h, x, wd, wu, bd, bu, **options, **dict(zip(gates, gs)))
        tensors = [make(b, l, d), None if kind == "middleY" else make(b, l, d), make(r, d, scale=0.2), make(d, r, scale=0.2), make(r), make(d)]
        tensors += [make(*s, scale=0.2) for s in gates.values()]
        check(call(F), call(eager), tensors, a, p)
        if l == 33: check(call(F), call(eager), tensors, a, p, frozen=(0, 1))
print("passed")
"""


class Mutant(NamedTuple):
    file: str
    line: int
    kind: str
    before: str
    after: str


def mutants() -> list[Mutant]:
    found = []
    for file in FILES:
        for number, text in enumerate((ROOT / file).read_text().splitlines(), 1):
            if text.lstrip().startswith(("//", "#")):
                continue
            for kind, (pattern, replacement) in PATTERNS.items():
                for match in re.finditer(pattern, text):
                    changed = text[: match.start()] + match.expand(replacement) + text[match.end() :]
                    found.append(Mutant(file, number, kind, text.strip(), changed.strip()))
    return found


def compiler() -> tuple[list[str], list[str]]:
    from torch.utils.cpp_extension import include_paths, library_paths

    flags = "-O1 -std=c++20 -fPIC -fvisibility=hidden -mavx2 -mfma -mf16c -DCPU_CAPABILITY=AVX2 -DCPU_CAPABILITY_AVX2 -DFASTADAPT_FEW_TYPES".split()
    return ["g++", *flags, *(f"-isystem{p}" for p in include_paths())], [*(f"-L{p}" for p in library_paths()), "-lc10", "-ltorch_cpu"]


def build(folder: Path, sources: list[str]) -> str | None:
    """Compiles the named kernel files of a copy of csrc and links them with the rest of the healthy build; the error, if any."""
    compile_, link = compiler()
    for source in sources:
        done = subprocess.run([*compile_, "-c", source, "-o", Path(source).stem + ".o"], cwd=folder, capture_output=True, text=True)
        if done.returncode:
            return "compiler"
    objects = ["ops.o", "bottleneck.o", "gated_bottleneck.o"]
    subprocess.run(["g++", "-shared", "-fopenmp", *objects, "-o", "_cpu_avx2.so", *link], cwd=folder, check=True, capture_output=True)
    return None


def check(folder: Path) -> str | None:
    """What killed the mutant, or None."""
    try:
        done = subprocess.run([sys.executable, "-c", CHECK, str(folder)], cwd=ROOT, capture_output=True, text=True, timeout=300, env={"ATEN_CPU_CAPABILITY": "avx2", "PATH": ""})
    except subprocess.TimeoutExpired:
        return "time-out"
    if done.returncode == 0:
        return None
    return "wrong result" if "AssertionError" in done.stderr else "crash" if done.returncode < 0 else "error: " + done.stderr.strip().splitlines()[-1][:120]


def healthy(folder: Path) -> None:
    shutil.copytree(ROOT / "csrc", folder / "csrc")
    compile_, _ = compiler()
    subprocess.run([*compile_, "-fopenmp", "-c", "csrc/cpu_ops.cpp", "-o", "ops.o"], cwd=folder, check=True)
    assert build(folder, list(FILES[1:])) is None
    shutil.copy(ROOT / "fastadapt" / "_cpu_build.json", folder)
    verdict = check(folder)
    assert verdict is None, f"the unchanged kernels fail the check: {verdict}"


def run(mutant: Mutant, base: Path) -> str | None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        shutil.copytree(base, folder, dirs_exist_ok=True)
        path = folder / mutant.file
        lines = path.read_text().splitlines()
        lines[mutant.line - 1] = mutant.after
        path.write_text("\n".join(lines) + "\n")
        return build(folder, list(FILES[1:]) if mutant.file.endswith(".h") else [mutant.file]) or check(folder)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--most", type=int, default=10_000, help="at most this many, evenly spread over all")
    parser.add_argument("--jobs", type=int, default=2)
    args = parser.parse_args()
    every = mutants()
    chosen = every[:: max(1, -(-len(every) // args.most))]
    with tempfile.TemporaryDirectory() as name:
        base = Path(name)
        healthy(base)
        with ThreadPoolExecutor(args.jobs) as pool:
            verdicts = list(pool.map(lambda mutant: run(mutant, base), chosen))
    rows = [{**mutant._asdict(), "killed_by": verdict} for mutant, verdict in zip(chosen, verdicts, strict=True)]
    survivors = [row for row in rows if row["killed_by"] is None]
    for row in survivors:
        row["explanation"] = EXPLAINED.get(f"{row['kind']}: {row['before']}")
        print(f"survived: {row['file']}:{row['line']} {row['kind']}: {row['after']}  [{row['explanation'] or 'NOT EXPLAINED'}]")
    OUT.write_text(json.dumps({"possible": len(every), "run": len(rows), "killed": len(rows) - len(survivors), "mutants": rows}, indent=1) + "\n")
    print(f"{len(rows) - len(survivors)} of {len(rows)} mutants killed ({len(every)} possible)")
    return int(any(row["explanation"] is None for row in survivors))


if __name__ == "__main__":
    raise SystemExit(main())
