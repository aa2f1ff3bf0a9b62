"""Hugging Face's ``Trainer`` with tasks mixed in every batch and checkpoints that hold the adapters alone: `python examples/trainer.py OUTPUT`."""

from __future__ import annotations

import sys
from typing import Any

import torch
from transformers import T5Config, T5ForConditionalGeneration, TrainingArguments, default_data_collator

import fastadapt
from fastadapt.training import AdapterCheckpoint, AdapterTrainer

TASKS = ("vqa", "gqa")


class MultiTaskTrainer(AdapterTrainer):
    """Hands each sample's task to the adapters. With gradient checkpointing, backward would have to be inside as well: override ``training_step`` then."""

    def compute_loss(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        with self._handle().route(inputs.pop("task")):
            return super().compute_loss(model, inputs, *args, **kwargs)


def main(output: str) -> None:
    torch.manual_seed(0)
    model = T5ForConditionalGeneration(T5Config(vocab_size=99, d_model=64, d_kv=16, d_ff=128, num_layers=2, num_heads=4, decoder_start_token_id=0))
    handle = fastadapt.patch(model, "vl_adapter", tasks=TASKS, sharing="multiple", reduction_factor=4)
    data = [{"input_ids": torch.randint(3, 98, (12,)), "labels": torch.randint(3, 98, (5,)), "task": i % 2} for i in range(32)]  # a task's place in TASKS
    args = TrainingArguments(
        output, max_steps=20, per_device_train_batch_size=8, learning_rate=3e-3, logging_steps=10, save_steps=10, remove_unused_columns=False, report_to="none", use_cpu=True
    )
    trainer = MultiTaskTrainer(model, args, train_dataset=data, data_collator=default_data_collator, callbacks=[AdapterCheckpoint(handle)])
    trainer.train()
    fresh = T5ForConditionalGeneration(model.config)
    fresh.load_state_dict({name: t for name, t in model.state_dict().items() if name in fresh.state_dict()})
    again = fastadapt.load(fresh, output)
    print(f"{trainer.state.global_step} steps, loss {trainer.state.log_history[-1]['train_loss']:.3f}; loaded again: {len(again.sites)} sites")


if __name__ == "__main__":
    main(sys.argv[1] if sys.argv[1:] else "out/trainer")
