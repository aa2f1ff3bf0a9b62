"""`fastadapt.fuse` on AdapterHub's own library; a program, since that needs an older transformers than the tests do. Run by test_adapterhub.py in an environment of its own.

Takes a folder with files of fastadapt (see `test_the_library_itself`), prints one line a case and exits with 1 if one is wrong. Imports nothing of the tests, which need the newer
transformers.
"""

from __future__ import annotations

import copy
import json
import math
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import adapters
import adapters.composition as ac
import torch
from adapters import (
    AdapterPlusConfig,
    CompacterConfig,
    CompacterPlusPlusConfig,
    DoubleSeqBnConfig,
    LoRAConfig,
    ParBnConfig,
    SeqBnConfig,
)
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import BartConfig, BartForConditionalGeneration, BertConfig, BertForMaskedLM, T5Config, T5ForConditionalGeneration

import fastadapt
from fastadapt import backend

CONFIGS: dict[str, tuple[Callable[[], Any], str]] = {
    "seq_bn": (lambda: SeqBnConfig(reduction_factor=4), "bottleneck"),
    "double_seq_bn": (lambda: DoubleSeqBnConfig(reduction_factor=4), "bottleneck"),
    "par_bn": (lambda: ParBnConfig(reduction_factor=2, scaling=4.0), "bottleneck"),
    "scaled_par_bn": (lambda: ParBnConfig(reduction_factor=2, scaling="learned"), "bottleneck"),
    "adapter_plus": (lambda: AdapterPlusConfig(reduction_factor=4, stochastic_depth=0.0), "bottleneck"),
    "layer_norms": (lambda: SeqBnConfig(reduction_factor=4, ln_before=True, ln_after=True, non_linearity="gelu"), "bottleneck"),
    "layer_norm_after_residual": (lambda: SeqBnConfig(reduction_factor=4, ln_after=True, adapter_residual_before_ln=True, non_linearity="silu"), "bottleneck"),
    "gating": (lambda: SeqBnConfig(reduction_factor=4, use_gating=True, non_linearity="gelu_new"), "bottleneck"),
    "compacter": (lambda: CompacterConfig(reduction_factor=4, phm_dim=4), "phm_bottleneck"),
    "compacter_full_w": (lambda: CompacterPlusPlusConfig(reduction_factor=4, phm_dim=2, factorized_phm_W=False, shared_phm_rule=False), "bottleneck"),
    "compacter_shared_w": (lambda: CompacterConfig(reduction_factor=4, phm_dim=4, shared_W_phm=True), "phm_bottleneck"),
}


def host(family: str) -> nn.Module:
    torch.manual_seed(0)
    if family == "bert":
        model: Any = BertForMaskedLM(
            BertConfig(vocab_size=99, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
        )
    elif family == "bart":
        sizes: dict[str, Any] = {f"{side}_{name}": value for side in ("encoder", "decoder") for name, value in (("layers", 2), ("attention_heads", 4), ("ffn_dim", 64))}
        model = BartForConditionalGeneration(BartConfig(vocab_size=99, d_model=32, **sizes, max_position_embeddings=64, dropout=0.0, attention_dropout=0.0))
    else:
        model = T5ForConditionalGeneration(T5Config(vocab_size=99, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, decoder_start_token_id=0, dropout_rate=0.0))
    adapters.init(model)
    return model


def inputs(family: str, seed: int, batch: int = 4) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 90, (batch, 9), generator=generator)
    return {"input_ids": ids, "labels": ids if family == "bert" else torch.randint(3, 90, (batch, 5), generator=generator)}


def forwards() -> int:
    return sum(n for (op, direction, _), n in backend.ran().items() if direction == "forward" and op != "dropout_add_norm")


def gradients(model: nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    model.zero_grad()
    out = model(**batch)
    out.loss.backward()
    return {"logits": out.logits.detach(), **{name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}}


def scramble(model: nn.Module) -> None:
    """Adapters away from their starting values, some of which are zero."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.1 * torch.randn(p.shape, generator=generator))


def distance(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    assert a.keys() == b.keys() and len(a) > 1, a.keys() ^ b.keys()
    return max(((a[k] - b[k]).norm() / b[k].norm().clamp_min(1e-12)).item() for k in a)


def curve(model: nn.Module, family: str) -> list[float]:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3)
    losses = []
    for step in range(20):
        loss = model(**inputs(family, step % 2)).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def check(name: str, right: bool, **found: Any) -> bool:
    print(json.dumps({"case": name, "right": right, **found}), flush=True)
    return right


def one_config(family: str, name: str) -> bool:
    make, op = CONFIGS[name]
    own: Any = host(family)
    own.add_adapter("a", config=make())
    own.train_adapter("a")
    scramble(own)
    fused = copy.deepcopy(own)
    keys = list(fused.state_dict())
    report = fastadapt.fuse(fused)
    exact = copy.deepcopy(own).double()
    before = forwards()
    gradients(fused, inputs(family, 7))
    ran = forwards() - before
    # A scalar's gradient is one number: by itself its error says nothing of the size of errors.
    found = [[gradients(model, inputs(family, seed)) for model in (fused, own, exact)] for seed in range(7, 15)]
    mean_square = [math.sqrt(sum(distance(of[i], {k: t.float() for k, t in of[2].items()}) ** 2 for of in found) / len(found)) for i in range(2)]
    apart, limit = mean_square[0], 3 * max(mean_square[1], 2e-7)
    fused.train(), own.train()
    losses, expected = curve(fused, family), curve(own, family)
    lost = max(abs(a - b) / abs(b) for a, b in zip(losses, expected))
    with tempfile.TemporaryDirectory() as folder:
        fused.save_adapter(folder, "a")
        # The library's own reading is the measure: it does not bring a T5's shared Compacter rule back.
        logits = []
        for fusing in (False, True):
            torch.manual_seed(9)
            again: Any = host(family)
            again.load_adapter(folder, load_as="b", set_active=True)
            again.eval()
            if fusing:
                fastadapt.fuse(again)
            with torch.no_grad():
                logits.append(again(**inputs(family, 3)).logits)
        loaded = ((logits[1] - logits[0]).norm() / logits[0].norm()).item() < 1e-6
    fastadapt.unfuse(fused)
    unfused = [type(m) for m in fused.modules()] == [type(m) for m in own.modules()] and list(fused.state_dict()) == keys
    # A decoder's cross-attention has no adapters of its own config in every family, so only "each site ran once" is asked.
    trained = expected[0] - expected[-2]  # of one batch
    right = apart <= limit and lost <= 1e-5 and loaded and unfused and ran == len(report.fused) > 0 and {s.op for s in report.fused} == {op}
    return check(
        f"{family} {name}", right, fused=len(report.fused), left=len(report.left), ran=ran, error=apart, limit=limit, losses=lost, trained=trained, loaded=loaded, unfused=unfused
    )


def compositions(family: str) -> bool:
    own: Any = host(family)
    for name in ("a", "b"):
        own.add_adapter(name, config=SeqBnConfig(reduction_factor=4))
    own.add_adapter("lora", config=LoRAConfig(r=4))
    own.add_adapter_fusion(["a", "b"])
    own.train_adapter(["a", "b"])
    scramble(own)
    fused = copy.deepcopy(own)
    report = fastadapt.fuse(fused)
    right = {s.kind for s in report.left} == {"AdapterHub's LoRALinearTorch"}
    setups = {
        "stack": ac.Stack("a", "b"),
        "fuse": ac.Fuse("a", "b"),
        "parallel": ac.Parallel("a", "b"),
        "batch_split": ac.BatchSplit("a", "b", batch_sizes=[1, 3]),
        "average": ac.Average("a", "b", weights=[0.3, 0.7]),
        "split": ac.Split("a", "b", splits=[4, 5]),
    }
    if family != "bert":
        del setups["split"], setups["parallel"]
    for name, setup in setups.items():
        for model in (own, fused):
            model.active_adapters = setup
        before = forwards()
        with torch.no_grad():
            x = inputs(family, 5)
            del x["labels"]
            if family != "bert":
                x["decoder_input_ids"] = x["input_ids"]
            got, want = fused(**x).logits, own(**x).logits
        ran = forwards() - before
        apart = ((got - want).norm() / want.norm()).item()
        right &= check(f"{family} {name}", apart < 1e-6 and ran == 2 * len(report.fused), error=apart, ran=ran)
    fused.add_adapter("late", config=ParBnConfig())
    fused.set_active_adapters("late")
    before = forwards()
    with torch.no_grad():
        fused(**inputs(family, 5))
    right &= check(f"{family} added later", forwards() > before)
    fused.set_active_adapters(None)
    own.set_active_adapters(None)
    before = forwards()
    with torch.no_grad():
        same = torch.equal(fused(**inputs(family, 5)).logits, own(**inputs(family, 5)).logits)
    return right & check(f"{family} switched off", same and forwards() == before)


# Made with the library's own names where it has one; a T5's shared tensors are in no file of its.
KINDS: dict[str, Callable[[str], Any]] = {
    "double_seq_bn": lambda family: DoubleSeqBnConfig(reduction_factor=6),
    "seq_bn": lambda family: SeqBnConfig(reduction_factor=6),
    "par_bn": lambda family: ParBnConfig(),
    "compacter": lambda family: CompacterConfig(reduction_factor=4, shared_phm_rule=family == "bart"),
    "compacter++": lambda family: CompacterPlusPlusConfig(reduction_factor=4, shared_phm_rule=family == "bart"),
    "compacter_full_w": lambda family: CompacterConfig(reduction_factor=4, factorized_phm_W=False, factorized_phm_rule=True, shared_phm_rule=False),
    "compacter_shared_w": lambda family: CompacterConfig(reduction_factor=4, shared_phm_rule=family == "bart", shared_W_phm=family == "bart"),
}


def files(folder: Path) -> list[bool]:
    """Reads what `interop.to_adapterhub` wrote, and leaves its own files and logits, for a BART and a T5."""
    right = []
    for family in ("bart", "t5"):
        base = load_file(folder / family / "base.safetensors")
        for kind, make in KINDS.items():
            here = folder / family / kind
            model: Any = host(family)
            model.load_state_dict(base, strict=False)
            info: dict[str, Any] = {}
            model.load_adapter(str(here / "ours"), load_as="x", set_active=True, loading_info=info)
            model.eval()
            wanted = load_file(here / "wanted.safetensors")
            with torch.no_grad():
                apart = distance({"logits": model(**inputs(family, 3)).logits, "same": torch.ones(1)}, {**wanted, "same": torch.ones(1)})
            read = not info["missing_keys"] and not info["unexpected_keys"]
            right.append(check(f"{family} reads fastadapt's {kind}", apart < 1e-6 and read, error=apart))
            model = host(family)
            model.load_state_dict(base, strict=False)
            model.add_adapter("a", config=make(family))
            model.train_adapter("a")
            scramble(model)
            model.eval()
            model.save_adapter(str(here / "theirs"), "a")
            with torch.no_grad():
                save_file({"logits": model(**inputs(family, 3)).logits}, here / "theirs.safetensors")
    return right


def main() -> int:
    right = [one_config(family, name) for family in ("bert", "bart", "t5") for name in CONFIGS]
    right += [compositions(family) for family in ("bert", "bart", "t5")]
    right += files(Path(sys.argv[1]))
    print(json.dumps({"cases": len(right), "right": sum(right)}))
    return 0 if all(right) else 1


if __name__ == "__main__":
    sys.exit(main())
