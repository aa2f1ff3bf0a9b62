"""One of several processes of `test_distributed.py`: `torchrun --nproc-per-node 2 -m tests.training.distributed MODE OUT`.

For each of `RUNS`, trains a tiny model on its share of every batch and writes what came out: the losses and the adapter file, and that file again after reading it.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import distribute_tensor

import fastadapt
from fastadapt.patching import Handle, patch
from tests.hosts.tiny import randomize, tiny

TASKS = ("vqa", "gqa", "caption")
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "vl_adapter": ("vl_adapter", {"sharing": "multiple", "reduction_factor": 4}),
    "vlpet": ("vlpet", {"rank": 8, "heads": 4, "gate_rank": 6, "value_rank": 5}),
    "lora": ("lora", {"sharing": "multiple", "rank": 4, "dropout": 0.0}),
    "hyperformer": ("hyperformer", {"reduction_factor": 4, "task_dim": 8}),
}
FUSED = "PEFT's LoRA, fused"
RUNS = (*((method, torch.float64) for method in (*METHODS, FUSED)), ("vl_adapter", torch.float32), (FUSED, torch.float32))
SAMPLES = 4
# Of each step: the first process has the first half, which lacks a task of the other's; nobody captions.
MIX = (("vqa", "gqa", "gqa", "gqa"), ("gqa", "gqa", "vqa", "vqa"), ("vqa", "vqa", "gqa", "vqa"))


class Foreign:
    """A model with another library's adapters on fused ops, with the part of `Handle` that is used here."""

    def __init__(self, dtype: torch.dtype) -> None:
        from peft import LoraConfig, get_peft_model

        torch.manual_seed(1)
        self.model: Any = get_peft_model(tiny("bart"), LoraConfig(r=4, target_modules=["q_proj", "v_proj", "fc1"], init_lora_weights=False)).to(dtype).train()  # type: ignore[arg-type]
        assert len(fastadapt.fuse(self.model).fused) == 16
        self.model = self.model.base_model.model

    def trainable_parameters(self) -> list[nn.Parameter]:
        return [p for p in self.model.parameters() if p.requires_grad]

    def route(self, tasks: Sequence[str]) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def save(self, directory: Path) -> None:
        tensors = {name: p.full_tensor() if hasattr(p, "full_tensor") else p for name, p in self.model.named_parameters() if p.requires_grad}
        if not dist.is_initialized() or dist.get_rank() == 0:
            directory.mkdir(parents=True, exist_ok=True)
            save_file({name: t.detach().clone() for name, t in tensors.items()}, directory / "adapter_model.safetensors")

    def load(self, directory: Path) -> None:
        for name, tensor in load_file(directory / "adapter_model.safetensors").items():
            parameter = self.model.get_parameter(name)
            with torch.no_grad():
                parameter.copy_(distribute_tensor(tensor, parameter.device_mesh, parameter.placements) if hasattr(parameter, "full_tensor") else tensor)


def patched(method: str, dtype: torch.dtype) -> Handle | Foreign:
    if method == FUSED:
        return Foreign(dtype)
    name, options = METHODS[method]
    model = tiny("bart").to(dtype).train()
    handle = patch(model, name, tasks=TASKS, **options)
    randomize(handle)
    return handle


def batches() -> Iterator[tuple[dict[str, Tensor], Sequence[str]]]:
    """Of one padded length and as many labels a sample."""
    generator = torch.Generator().manual_seed(3)
    for tasks in MIX:
        ids, labels = (torch.randint(3, 90, (SAMPLES, n), generator=generator) for n in (9, 5))
        mask = torch.ones_like(ids)
        mask[1, 6:] = 0
        yield {"input_ids": ids, "attention_mask": mask, "labels": labels}, tasks


def wrap(model: nn.Module, mode: str) -> nn.Module:
    if mode == "ddp":
        return nn.parallel.DistributedDataParallel(model)
    if mode == "fsdp2":
        for layer in (*model.model.encoder.layers, *model.model.decoder.layers, model):  # type: ignore[union-attr]
            fully_shard(layer)  # type: ignore[arg-type]
    return model


def train(handle: Handle | Foreign, mode: str, share: slice) -> list[float]:
    """The losses of the whole batches."""
    model = wrap(handle.model, mode)
    optimizer = torch.optim.AdamW(handle.trainable_parameters(), lr=1e-2)
    out = []
    for inputs, tasks in batches():
        with handle.route(tasks[share]):
            loss = model(**{name: t[share] for name, t in inputs.items()}).loss
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        loss = loss.detach()
        if mode != "one":
            dist.all_reduce(loss)
            loss = loss / dist.get_world_size()
        out.append(loss.item())
    return out


def folder(out: Path, method: str, dtype: torch.dtype) -> Path:
    return out / f"{method}-{str(dtype).removeprefix('torch.')}"


def main(mode: str, out: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank, each = dist.get_rank(), SAMPLES // dist.get_world_size()
    writes = mode == "fsdp2" or rank == 0  # sharded parameters are gathered by all processes
    for method, dtype in RUNS:
        own = folder(out, method, dtype)
        handle = patched(method, dtype)
        losses = train(handle, mode, slice(rank * each, (rank + 1) * each))
        if writes:
            handle.save(own / "adapters")
        dist.barrier()
        with torch.no_grad():
            for parameter in handle.trainable_parameters():
                parameter.zero_()
            if isinstance(handle, Handle):
                # An evaluation: FSDP2 leaves the outermost module's parameters, here trained layer norms, whole after it.
                inputs, tasks = next(batches())
                with handle.route(tasks):
                    handle.model(**inputs)
        handle.load(own / "adapters")
        if writes:
            handle.save(own / "again")
        torch.save(losses, own / f"losses{rank}.pt")
    dist.barrier()  # or the first to end takes its connections from the other
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
