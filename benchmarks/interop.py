"""Other people's layers before and after `fastadapt.fuse`: a two-plus-two-layer BART of width 768 with their adapters, and one layer of it by itself.

``python -m benchmarks.interop`` times PEFT's LoRA and AdapterHub's adapters, whichever is installed; AdapterHub needs an older transformers than fastadapt's hosts.
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import json
import statistics
from collections.abc import Callable, Iterator
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn

import fastadapt
from benchmarks.measure import Row, interleave, ratios
from tests import tolerance

WIDTH, LAYERS = 768, 2


def bart() -> Any:
    from transformers import BartConfig, BartForConditionalGeneration

    torch.manual_seed(0)
    sizes: dict[str, Any] = {f"{side}_{name}": value for side in ("encoder", "decoder") for name, value in (("layers", LAYERS), ("attention_heads", 12), ("ffn_dim", 3072))}
    return BartForConditionalGeneration(
        BartConfig(vocab_size=2000, d_model=WIDTH, **sizes, max_position_embeddings=256, dropout=0.0, attention_dropout=0.0, activation_dropout=0.0)
    )


def cases() -> Iterator[tuple[str, int, Callable[[], nn.Module], str]]:
    """Name, rank, how the library makes the model, and the path of one layer."""
    if importlib.util.find_spec("peft"):
        from peft import LoraConfig, get_peft_model

        for rank, dropout in ((16, 0.0), (16, 0.1), (128, 0.1)):

            def lora(rank: int = rank, dropout: float = dropout) -> nn.Module:
                targets = ["q_proj", "v_proj", "fc1", "fc2"]
                return get_peft_model(bart(), LoraConfig(target_modules=targets, r=rank, lora_alpha=32, lora_dropout=dropout, init_lora_weights=False))

            yield f"peft lora p={dropout}", rank, lora, "base_model.model.model.encoder.layers.0.self_attn.q_proj"
    if importlib.util.find_spec("adapters"):
        import adapters

        for name, reduction in (("double_seq_bn", 8), ("par_bn", 2), ("compacter", 8)):

            def hub(name: str = name, reduction: int = reduction) -> nn.Module:
                model = bart()
                adapters.init(model)
                model.add_adapter("a", config=adapters.AdapterConfig.load(name, reduction_factor=reduction))
                model.train_adapter("a")
                generator = torch.Generator().manual_seed(1)
                with torch.no_grad():
                    for p in model.parameters():
                        if p.requires_grad:
                            p.add_(0.02 * torch.randn(p.shape, generator=generator))
                return model

            # Compacter's shared rule is in the context of a whole model's forward.
            yield f"adapterhub {name}", WIDTH // reduction, hub, "" if name == "compacter" else "model.encoder.layers.0.output_adapters"


def trained(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def alone(layer: nn.Module, x: Tensor) -> Tensor:
    """One layer: PEFT's beside its projection, AdapterHub's between a sub-layer's output and its residual."""
    x = x.to(next(layer.parameters()).dtype)
    return (layer(x, x, None) if hasattr(layer, "adapters") else layer(x)).sum()


def measure(name: str, rank: int, rows: int, rounds: int, rival: nn.Module, ours: nn.Module, call: Callable[[nn.Module], Tensor], exact: bool) -> list[Row]:
    """Both in turn, forward and forward + backward. Without dropout the gradients must be as right as the library's own."""
    models = {"ours": ours, "eager": rival}

    def forward(model: nn.Module) -> Tensor:
        with torch.no_grad():
            return call(model)

    def step(model: nn.Module) -> tuple[Tensor, ...]:
        return torch.autograd.grad(call(model), trained(model), allow_unused=True)

    correct = True
    if exact:
        best = step(copy.deepcopy(rival).double())
        for got, want, eager in zip(step(ours), best, step(rival), strict=True):
            if want is not None:
                limit = tolerance.limit_of(tolerance.relative_error(eager, want), torch.float32, gradient=True)
                # A whole model's gradients cross many operations that are not ours; single numbers among them need the rule over seeds of the tests.
                correct &= want.numel() < tolerance.SMALL or tolerance.relative_error(got, want) <= limit
    found = []
    for direction, run in (("forward", forward), ("forward+backward", step)):
        times = interleave({key: (lambda run=run, model=model: run(model)) for key, model in models.items()}, rounds)  # type: ignore[misc]
        numbers = ratios(times["ours"], times["eager"])
        milliseconds = statistics.median(times["ours"]) * 1e3
        found.append(Row(name, "fuse", "unfused", "fp32", rows, WIDTH, rank, direction, torch.get_num_threads(), milliseconds, *numbers, correct, "cpu", "fp32"))
    return found


def main() -> None:
    """Times every installed library's adapters."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", help="write the rows to this file")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    ids = torch.randint(3, 2000, (options.batch, options.length), generator=torch.Generator().manual_seed(0))
    rows: list[Row] = []
    for name, rank, make, path in cases():
        rival = make().train()
        ours = copy.deepcopy(rival)
        print(fastadapt.fuse(ours))
        exact = "p=0.1" not in name
        rows += measure(f"{name}, model", rank, ids.numel(), options.rounds, rival, ours, lambda m: m(input_ids=ids, labels=ids).loss, exact)
        if path:
            x = torch.randn(options.batch, options.length, WIDTH, requires_grad=True)
            layers = rival.get_submodule(path), ours.get_submodule(path)
            rows += measure(f"{name}, layer", rank, ids.numel(), 3 * options.rounds, *layers, lambda m, x=x: alone(m, x), exact)  # type: ignore[misc]
        for row in rows[-4:] if path else rows[-2:]:
            print(row, flush=True)
    if options.json:
        with open(options.json, "w") as file:
            json.dump([asdict(row) for row in rows], file, indent=1)


if __name__ == "__main__":
    main()
