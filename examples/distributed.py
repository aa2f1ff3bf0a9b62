"""Several processes, tasks mixed in each batch: `torchrun --nproc-per-node 2 examples/distributed.py [ddp | fsdp2]`.

Every process takes its share of a batch. Each sample runs through its own task's adapters (`handle.route`), so every parameter gets a gradient in every process,
zero where a task is absent, and DDP needs no ``find_unused_parameters``.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from transformers import BartConfig, BartForConditionalGeneration

import fastadapt

TASKS = ("vqa", "gqa", "caption")


def main(mode: str = "ddp", steps: int = 10) -> None:
    dist.init_process_group()  # gloo on CPUs, nccl on GPUs
    rank, world = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(0)  # the same weights everywhere
    sizes = {f"{side}_{name}": n for side in ("encoder", "decoder") for name, n in (("layers", 2), ("attention_heads", 4), ("ffn_dim", 128))}
    model = BartForConditionalGeneration(BartConfig(vocab_size=99, d_model=64, **sizes, dropout=0.0))
    # Patch first, then wrap.
    handle = fastadapt.patch(model, "vl_adapter", tasks=TASKS, sharing="multiple", reduction_factor=4)
    if mode == "fsdp2":
        for layer in (*model.model.encoder.layers, *model.model.decoder.layers, model):
            fully_shard(layer)
    wrapped = torch.nn.parallel.DistributedDataParallel(model) if mode == "ddp" else model
    optimizer = torch.optim.AdamW(handle.trainable_parameters(), lr=3e-3)
    inputs, labels = torch.randint(3, 98, (8, 12)), torch.randint(3, 98, (8, 5))
    tasks = ["vqa", "gqa"] * 2 + ["caption"] * 4  # the second of two processes has captions alone
    mine = slice(rank * 8 // world, (rank + 1) * 8 // world)
    for step in range(steps):
        with handle.route(tasks[mine]):
            loss = wrapped(input_ids=inputs[mine], labels=labels[mine]).loss
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        mean = loss.detach()
        dist.all_reduce(mean)
        if rank == 0 and step in (0, steps - 1):
            print(f"{mode}, {world} processes: step {step}, loss {mean.item() / world:.3f}")
    with tempfile.TemporaryDirectory() as folder:
        if mode == "fsdp2" or rank == 0:  # shards are gathered by all processes, and the first one writes
            handle.save(Path(folder) / "adapters")
        if rank == 0:
            print("saved", sorted(path.name for path in (Path(folder) / "adapters").iterdir()))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:2])
