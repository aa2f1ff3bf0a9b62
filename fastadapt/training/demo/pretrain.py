"""Pretrains the demo's base on generic objectives and writes its weights: ``python -m fastadapt.training.demo.pretrain`` (one thread, about 10 minutes on an idle core)."""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from fastadapt.training.demo.base import WEIGHTS, fresh, save_base
from fastadapt.training.demo.digits import PATCH
from fastadapt.training.demo.fit import answers, exact, fit
from fastadapt.training.demo.tasks import OBJECTIVES, Batches, Examples, make_objective
from fastadapt.training.mixing import MultiTaskLoader

# What each objective gets of the steps.
SHARES = {"caption": 0.2, "region": 0.3, "infill": 0.3, "match": 0.2}


def jitter(feats: Tensor, seed: int) -> Tensor:
    """Every cell shifted by up to one pixel each way and scaled by 0.8 to 1.2: 1,366 scans alone are learned by heart. feats: (N, V, 64)."""
    generator = torch.Generator().manual_seed(seed)
    n, v, _ = feats.shape
    padded = F.pad(feats.reshape(n * v, PATCH, PATCH), (1, 1, 1, 1))
    windows = padded.unfold(1, PATCH, 1).unfold(2, PATCH, 1).reshape(n * v, 9, PATCH * PATCH)
    # Half of the cells stay where they are (window 4).
    choice = torch.where(torch.rand(n * v, generator=generator) < 0.5, 4, torch.randint(9, (n * v,), generator=generator))
    scale = 0.8 + 0.4 * torch.rand(n * v, 1, generator=generator)
    return (windows[torch.arange(n * v), choice] * scale).reshape(n, v, -1)


def jittered(examples: Examples, seed: int) -> Examples:
    return replace(examples, feats=jitter(examples.feats, seed))


def pretrain(steps: int, batch: int, lr: float, seed: int, out: Path, progress: bool = True) -> dict[str, float]:
    """Trains, writes the weights to ``out``, and returns exact-match scores of every objective on test scans and layouts, read back from the file."""
    model = fresh(seed)
    counts = {name: round(steps * share) for name, share in SHARES.items()}
    loaders = {name: Batches(jittered(make_objective(name, n * batch, "train", seed), seed), batch, seed) for name, n in counts.items()}
    fit(model, list(model.parameters()), MultiTaskLoader(loaders), sum(counts.values()), lr, name="pretrain", progress=progress)
    save_base(model, out)
    model.load_state_dict({name: tensor.half().float() for name, tensor in model.state_dict().items()})
    tests = {name: make_objective(name, 1000, "test", seed + 1) for name in OBJECTIVES}
    return {name: exact(answers(model, examples), examples.answers) for name, examples in tests.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--steps", type=int, default=2500)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=WEIGHTS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    start = time.perf_counter()
    scores = pretrain(options.steps, options.batch, options.lr, options.seed, options.out)
    print(json.dumps({"minutes": round((time.perf_counter() - start) / 60, 1), "bytes": options.out.stat().st_size, "scores": scores}, indent=2))


if __name__ == "__main__":
    main()
