"""The command line: ``fastadapt <command>``, also ``python -m fastadapt.cli``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path


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
    run(options.out, seed=options.seed, steps=options.steps)
    return 0


def _steps(text: str) -> int:
    steps = int(text)
    if steps < 4 or steps % 4:
        raise argparse.ArgumentTypeError(f"must be a positive multiple of 4, the number of tasks, not {steps}")
    return steps


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, not {number}")
    return number


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="fastadapt", description="Fused adapter layers for tuning vision-and-language models.")
    commands = top.add_subparsers(dest="command", required=True, metavar="command")
    demo = commands.add_parser("demo", help="tune a small vision-and-language model on four tasks with three methods", formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    demo.add_argument("--out", type=Path, default=Path("demo"), help="folder for demo.json, demo.png and the saved adapter")
    demo.add_argument("--seed", type=int, default=0, help="of data, order and starting values")
    demo.add_argument("--steps", type=_steps, default=400, help="training steps of each method, a multiple of 4")
    demo.add_argument("--threads", type=_positive, default=1, help="one is fastest for so small a model as soon as anything else runs")
    demo.set_defaults(run=_demo)
    return top


def main(argv: Sequence[str] | None = None) -> int:
    options = parser().parse_args(argv)
    return options.run(options)


if __name__ == "__main__":
    sys.exit(main())
