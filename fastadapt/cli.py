"""The command line: ``fastadapt <command>``, also ``python -m fastadapt.cli``."""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import math
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fastadapt._version import __version__


def _unwritable(folder: Path) -> str | None:
    """Why nothing can be written into the folder, which is made; None where it can."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        return str(error)
    return None


def _demo(options: argparse.Namespace) -> int:
    try:
        import matplotlib  # noqa: F401
        import sklearn  # noqa: F401
        import tqdm  # noqa: F401
        import transformers
    except ImportError as error:
        print(f"fastadapt demo: {error.name} is not installed; pip install 'fastadapt[demo]'", file=sys.stderr)
        return 1
    import torch

    from fastadapt.training.demo.run import run

    transformers.logging.set_verbosity_error()
    torch.set_num_threads(options.threads)
    if why := _unwritable(options.out):  # before the training, whose results go there
        print(f"fastadapt demo: --out {options.out}: cannot be written ({why})", file=sys.stderr)
        return 1
    run(options.out, seed=options.seed, steps=options.steps)
    return 0


# The options that not every op has, with their defaults.
_OPTIONS: dict[str, dict[str, Any]] = {
    "gated_bottleneck": {"granularity": "large", "gate_rank": None},
    "lora": {"out_width": None, "dropout": False},
    "phm_bottleneck": {"division": 4, "factor_rank": 1},
    "routed_bottleneck": {"tasks": 4},
    "dropout_add_norm": {"dropout": False, "norm": "layer", "wide": False},
}


def _explain(options: argparse.Namespace) -> int:
    import torch

    from fastadapt import backend

    dtype = backend.DTYPES[options.dtype]
    param_dtype = backend.DTYPES[options.param_dtype] if options.param_dtype else torch.float32 if dtype.itemsize < 4 else dtype
    if param_dtype not in (dtype, torch.float32):
        print(f"fastadapt explain: --param-dtype must be {options.dtype} or fp32, not {options.param_dtype}", file=sys.stderr)
        return 2
    own: dict[str, Any] = {}
    for op, names in _OPTIONS.items():
        given = {name: value for name in names if (value := getattr(options, name)) is not None}
        if op != options.op:
            given = {name: value for name, value in given.items() if name not in _OPTIONS.get(options.op, ())}
        if op == options.op:
            own = {name: default for name, default in names.items() if default is not None} | given
        elif given:
            flags = " and ".join("--" + name.replace("_", "-") for name in names)
            what = "are options" if len(names) > 1 else "is an option"
            print(f"fastadapt explain: {flags} {what} of {op}, not of {options.op}", file=sys.stderr)
            return 2
    if options.op == "gated_bottleneck":
        large = own["granularity"] == "large"
        if "gate_rank" in own and not large:
            print(f"fastadapt explain: --gate-rank is an option of granularity large, not of {own['granularity']}", file=sys.stderr)
            return 2
        own = {"gate_rank": own.get("gate_rank", options.rank) if large else 0, "granularity": "logits" if own["granularity"] == "large_full" else own["granularity"]}
    if (options.rank is None) != (options.op == "dropout_add_norm"):
        print(f"fastadapt explain: {options.op} {'needs --rank' if options.rank is None else 'has no --rank'}", file=sys.stderr)
        return 2
    if options.op == "lora":
        own.setdefault("out_width", options.width)
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        told = backend.explain(options.op, rows=options.rows, width=options.width, rank=options.rank or 0, dtype=dtype, param_dtype=param_dtype, device=device, **own)
    except backend.BackendError as error:  # FASTADAPT_BACKEND demands one
        print(f"fastadapt explain: {error}", file=sys.stderr)
        return 1
    except ValueError as error:  # sizes that the op does not take
        print(f"fastadapt explain: {error}", file=sys.stderr)
        return 2
    print(json.dumps(told.as_dict(), indent=1) if options.json else told)
    return 0


def _convert(options: argparse.Namespace) -> int:
    from fastadapt.interop import convert

    try:
        said = convert(options.source, options.destination, host=options.host, method=options.method, tasks=options.tasks, layout=options.layout, **dict(options.option))
    except (ValueError, TypeError) as error:
        print(f"fastadapt convert: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        print(f"fastadapt convert: destination: {options.destination!r} cannot be written ({error})", file=sys.stderr)
        return 1
    except ModuleNotFoundError as error:
        print(f"fastadapt convert: {error.name} is not installed; pip install 'fastadapt[hosts]'", file=sys.stderr)
        return 1
    print(said)
    return 0


SUITES = ("ops", "models", "memory", "launches", "roofline", "scaling")


def _bench(options: argparse.Namespace) -> int:
    """Runs the checkout's benchmarks: that around this package, or else the current folder."""
    for root in (Path(__file__).parents[1], Path.cwd()):
        if (root / "benchmarks" / "suites.py").exists() and (root / "tests" / "eager.py").exists():
            break
    else:
        why = "the benchmarks are not installed with the package, since their rivals are the tests' references"
        print(f"fastadapt bench: {why}; run it in the folder of a checkout of the repository", file=sys.stderr)
        return 1
    kept = [("--json", options.json, options.json.parent)] if options.json else []
    kept += [("--plots", options.plots, options.plots)] if options.plots else []
    for flag, path, folder in [] if options.list else kept:  # before what shall go there is measured
        if reason := "it is a folder" if flag == "--json" and path.is_dir() else _unwritable(folder):
            print(f"fastadapt bench: {flag} {path}: cannot be written ({reason})", file=sys.stderr)
            return 1
    sys.path.insert(0, str(root))
    try:
        return importlib.import_module("benchmarks.suites").run(list(dict.fromkeys(options.suite or SUITES)), options)
    except ModuleNotFoundError as error:
        print(f"fastadapt bench: {error.name} is not installed; pip install 'fastadapt[bench]'", file=sys.stderr)
        return 1
    finally:
        sys.path.remove(str(root))


def _option(text: str) -> tuple[str, object]:
    name, equals, value = text.partition("=")
    if not equals or not name.isidentifier():
        raise argparse.ArgumentTypeError(f"must be name=value, not {text!r}")
    if name in ("source", "destination", "host", "method", "tasks", "layout"):
        raise argparse.ArgumentTypeError(f"{name!r} is no option of a method but an argument of the command")
    if value.lower() in ("true", "false"):
        return name, value.lower() == "true"
    for read in (json.loads, int, float):  # the last two for what is a number but not in JSON, such as .5
        with contextlib.suppress(ValueError):
            return name, read(value)
    return name, value


def _op(text: str) -> str:
    from fastadapt import backend

    if text not in (known := sorted(backend._plans)):
        raise argparse.ArgumentTypeError(f"unknown op {text!r}: must be one of {', '.join(known)}")
    return text


def _device(text: str) -> str:
    from fastadapt import backend

    try:
        if text in ("cpu", "cuda") or backend.named_architecture(text):
            return text
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error).removeprefix("device: ")) from None
    raise argparse.ArgumentTypeError(f"unknown device {text!r}: must be cpu, cuda or an architecture such as sm_90")


def _whole(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be a whole number, not {text!r}") from None


def _steps(text: str) -> int:
    steps = _whole(text)
    if steps < 4 or steps % 4:
        raise argparse.ArgumentTypeError(f"must be a positive multiple of 4, the number of tasks, not {steps}")
    return steps


def _positive(text: str) -> int:
    number = _whole(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, not {number}")
    return number


def _seed(text: str) -> int:
    if not 0 <= (seed := _whole(text)) < 2**32:
        raise argparse.ArgumentTypeError(f"must be from 0 to 2^32 - 1, not {seed}")
    return seed


def _threads(text: str) -> int:
    # More than any machine has; torch starts them all at once, and a number without end is a crash in it.
    if (threads := _positive(text)) > 1024:
        raise argparse.ArgumentTypeError(f"must be at most 1024, not {threads}")
    return threads


def _seconds(text: str) -> float:
    try:
        if 0 < (seconds := float(text)) < math.inf:
            return seconds
    except ValueError:
        pass
    raise argparse.ArgumentTypeError(f"must be a positive number, not {text!r}")


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="fastadapt", description="Fused adapter layers for tuning vision-and-language models.")
    top.add_argument("--version", action="version", version=f"fastadapt {__version__}")
    commands = top.add_subparsers(dest="command", required=True, metavar="command")
    demo = commands.add_parser("demo", help="tune a small vision-and-language model on four tasks with three methods", formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    demo.add_argument("--out", type=Path, default=Path("demo"), help="folder for demo.json, demo.png and the saved adapter")
    demo.add_argument("--seed", type=_seed, default=0, help="of data, order and starting values")
    demo.add_argument("--steps", type=_steps, default=400, help="training steps of each method, a multiple of 4")
    demo.add_argument("--threads", type=_threads, default=1, help="one is fastest for so small a model as soon as anything else runs")
    demo.set_defaults(run=_demo)
    explain = commands.add_parser("explain", help="say which backend a call would run on, why, and on a CUDA device in what time")
    explain.add_argument("op", type=_op, help="bottleneck, dropout_add_norm, gated_bottleneck, lora, phm_bottleneck or routed_bottleneck")
    explain.add_argument("--rows", type=_positive, required=True, help="T, all leading dimensions together")
    explain.add_argument("--width", type=_positive, required=True, help="D")
    explain.add_argument("--rank", type=_positive, help="R, which all but dropout_add_norm have")
    explain.add_argument("--dtype", choices=("fp32", "bf16", "fp16", "fp64"), default="bf16", help="of the activations (default: bf16)")
    explain.add_argument("--param-dtype", choices=("fp32", "bf16", "fp16", "fp64"), help="of the parameters (default: fp32, and fp64 over fp64)")
    explain.add_argument("--device", type=_device, help="cpu, cuda, or an architecture such as sm_90, which need not be here (default: cuda where there is one, else cpu)")
    explain.add_argument("--granularity", choices=("large", "large_full", "middleX", "middleY", "small"), help="of gated_bottleneck (default: large)")
    explain.add_argument("--gate-rank", type=_positive, help="of granularity large (default: the rank)")
    explain.add_argument("--out-width", type=_positive, help="of lora: that of the projection's output (default: the width)")
    explain.add_argument("--dropout", action="store_true", default=None, help="of lora and dropout_add_norm: with dropout")
    explain.add_argument("--norm", choices=("layer", "rms", "none"), help="of dropout_add_norm (default: layer)")
    explain.add_argument("--wide", action="store_true", default=None, help="of dropout_add_norm: with a float32 residual")
    explain.add_argument("--division", type=_positive, help="n of phm_bottleneck (default: 4)")
    explain.add_argument("--factor-rank", type=_positive, help="k of phm_bottleneck (default: 1)")
    explain.add_argument("--tasks", type=_positive, help="of routed_bottleneck (default: 4)")
    explain.add_argument("--json", action="store_true", help="with every kernel's modelled time")
    explain.set_defaults(run=_explain)
    bench = commands.add_parser("bench", help="time the ops and whole models against eager code, torch.compile and PEFT, and count memory and launches; needs a checkout")
    bench.add_argument("--suite", choices=SUITES, nargs="+", help="(default: all)")
    bench.add_argument("--quick", action="store_true", help="short lists and few rounds: all suites in about two minutes on two cores that have nothing else to do")
    bench.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="(default: cpu)")
    bench.add_argument("--op", type=_op, help="of the suite ops, this op alone")
    for name in ("rows", "width", "rank"):
        bench.add_argument(f"--{name}", type=_positive, nargs="+", help=f"of the suite ops, what has this {name} alone")
    bench.add_argument("--dtype", choices=("fp32", "bf16", "fp16"), nargs="+", help="of the suite ops, these activations alone")
    bench.add_argument("--seconds", type=_seconds, help="for the rounds of one comparison (default: 6, with --quick 2)")
    bench.add_argument("--json", type=Path, metavar="FILE", help="write every row to this file, as they come")
    bench.add_argument("--list", action="store_true", help="print what would be measured, and measure nothing")
    bench.add_argument("--history", action="store_true", help="append the timings to benchmarks/data/history.csv, with versions, commit, device and date")
    bench.add_argument("--plots", type=Path, metavar="DIR", help="draw the rows into PNGs in this folder (needs matplotlib)")
    bench.set_defaults(run=_bench)
    convert = commands.add_parser(
        "convert", help="read a state dict of VL-Adapter, VL-PET or Compacter, or a directory of AdapterHub or PEFT, into an adapter directory, or write one"
    )
    convert.add_argument("source", help=".pth or .safetensors file, or an adapter directory of fastadapt, AdapterHub or PEFT")
    convert.add_argument("destination", help="adapter directory, or .pth or .safetensors file")
    convert.add_argument("--host", choices=("vlbart", "vlt5", "t5", "bart"), required=True, help="the base model")
    convert.add_argument("--method", help="as in fastadapt.patch; for a file only")
    convert.add_argument("--tasks", type=lambda text: text.split(","), default=[], help="the tasks' names, with commas, of a file; the one task that AdapterHub or PEFT shall read")
    convert.add_argument("--option", type=_option, action="append", default=[], metavar="NAME=VALUE", help="an option of the method: a JSON value or a word; for a file only")
    convert.add_argument("--layout", choices=("vl", "compacter", "adapterhub", "peft"), default="vl", help="whose keys, or whose directory to write (default: vl)")
    convert.set_defaults(run=_convert)
    return top


def main(argv: Sequence[str] | None = None) -> int:
    options = parser().parse_args(argv)
    try:
        code = options.run(options)
        sys.stdout.flush()
    except BrokenPipeError:  # whoever reads has read enough, as head does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes once more at its end
        return 1
    return code


if __name__ == "__main__":
    sys.exit(main())
