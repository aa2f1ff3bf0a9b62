"""One of several processes of `test_sharded_trainer.py`: `torchrun --nproc-per-node 2 -m tests.training.sharded_trainer OUT`.

`AdapterTrainer` under accelerate's FSDP2: a run, one that goes on from its first checkpoint, and one from the best. accelerate shards on accelerators only; it is told that these
processes have some, and all that follows is its own code on CPUs.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import TrainingArguments

from fastadapt import Handle, patch
from fastadapt.training import AdapterCheckpoint, AdapterTrainer
from tests.hosts.tiny import SMALL, randomize, tiny

BATCH, STEPS = 8, 4
FSDP = {"version": 2, "transformer_layer_cls_to_wrap": ["BartEncoderLayer", "BartDecoderLayer"]}
BEST = {"eval_strategy": "steps", "eval_steps": 2, "load_best_model_at_end": True, "metric_for_best_model": "loss", "greater_is_better": True}


def patched(seed: int = 0) -> Handle:
    """Untied, since accelerate cannot shard a table of three modules."""
    handle = patch(tiny("bart", tie_word_embeddings=False).double(), "vl_adapter", **SMALL["vl_adapter"])
    randomize(handle, seed)
    return handle


def data(n: int = 32) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [{name: torch.randint(3, 90, (length,), generator=generator) for name, length in (("input_ids", 7), ("labels", 4))} for _ in range(n)]


def arguments(directory: Path, processes: int, **options: Any) -> TrainingArguments:
    """A checkpoint after half of the steps; the loss is a mean (by tokens across devices a BART's, which knows nothing of it, would be multiplied by their number)."""
    common = {"max_steps": STEPS, "save_steps": STEPS // 2, "logging_steps": 1, "learning_rate": 1e-2, "use_cpu": True, "report_to": "none", "seed": 3, "disable_tqdm": True}
    common |= {"per_device_train_batch_size": BATCH // processes, "per_device_eval_batch_size": 2, "average_tokens_across_devices": False}
    return TrainingArguments(output_dir=str(directory), **{**common, **options})


def train(handle: Handle, args: TrainingArguments, resume: Path | None = None) -> list[float]:
    trainer = AdapterTrainer(handle.model, args, train_dataset=data(), eval_dataset=data(4), callbacks=[AdapterCheckpoint(handle)])
    trainer.train(resume_from_checkpoint=str(resume) if resume else None)
    trainer.save_model(str(Path(str(args.output_dir)) / "saved"))
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def main(out: Path) -> None:
    from accelerate import PartialState
    from accelerate.utils import DistributedType

    torch.set_num_threads(1)
    runs: list[tuple[str, int, Path | None, dict[str, Any]]] = [
        ("whole", 0, None, {}),
        ("resumed", 5, out / "whole" / f"checkpoint-{STEPS // 2}", {}),
        ("pieces", 0, None, {"fsdp_config": {**FSDP, "state_dict_type": "SHARDED_STATE_DICT"}}),
        ("best", 0, None, BEST),
    ]
    for name, seed, resume, options in runs:
        args = arguments(out / name, 2, **{"fsdp": True, "fsdp_config": FSDP, **options})
        assert args.parallel_mode.value == "distributed"
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_XPU
        handle = patched(seed)
        losses = train(handle, args, resume)
        assert all(hasattr(p, "full_tensor") for p in handle.model.parameters())
        torch.save(losses, out / f"{name}{args.process_index}.pt")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
