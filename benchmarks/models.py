"""Whole training steps and generation of VL-BART, VL-T5, BLIP and a LLaVA-shaped model, each with the published methods. ``python -m benchmarks.models [--quick]``

Random weights, fp32, no dropout. Rivals: the frozen base without adapters, whose backward goes as far down as theirs; the method in the authors' eager code (`tests.eager`), and
under torch.compile, against ours under it; for LoRA, PEFT. AdapterHub is none: it cannot be installed beside the transformers that the hosts need. A step is forward, backward and
AdamW over the trained parameters; generation is greedy with a cache, and not compiled, since transformers' cache grows with every token. Also where the time of a step goes. One of
several threads has the quick list alone: nobody leaves cores idle under a whole model.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import functools
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import fastadapt
from benchmarks import measure
from fastadapt import functional
from tests import eager, tolerance

HEADS = 4  # of VL-PET's adapters, each a Linear of its own


class Sizes(NamedTuple):
    """Of a model and its batch; ``layers`` of each stack, ``visual`` tokens of an image, a square number."""

    name: str
    width: int
    layers: int
    heads: int
    vocabulary: int
    batch: int
    text: int
    visual: int
    answer: int

    @property
    def rows(self) -> int:
        """Of an encoder's layer."""
        return self.batch * (self.text + self.visual)


ONE = Sizes("1 layer", 768, 1, 12, 2000, 4, 20, 36, 10)
SMALL = ONE._replace(name="2 layers", layers=2)
BASE = Sizes("base", 768, 6, 12, 50265, 4, 20, 36, 10)
IMAGE = 5  # the token in whose places LLaVA's image features go
PATCH = 16


def vl_bart(s: Sizes) -> nn.Module:
    from fastadapt.hosts.vlbart import VLBart, VLBartConfig

    sides = {f"{side}_{name}": n for side in ("encoder", "decoder") for name, n in (("layers", s.layers), ("attention_heads", s.heads), ("ffn_dim", 4 * s.width))}
    return VLBart(VLBartConfig(vocab_size=s.vocabulary, d_model=s.width, **sides, dropout=0.0, n_boxes=None, forced_eos_token_id=None))


def vl_t5(s: Sizes) -> nn.Module:
    from fastadapt.hosts.vlbart import VLT5, VLT5Config

    sizes = {"d_kv": s.width // s.heads, "d_ff": 4 * s.width, "num_layers": s.layers, "num_heads": s.heads}
    return VLT5(VLT5Config(vocab_size=s.vocabulary, d_model=s.width, **sizes, dropout_rate=0.0, decoder_start_token_id=0, pad_token_id=0))


def blip(s: Sizes) -> nn.Module:
    from transformers import BlipConfig, BlipForQuestionAnswering

    stack = {"hidden_size": s.width, "intermediate_size": 4 * s.width, "num_hidden_layers": s.layers, "num_attention_heads": s.heads}
    still = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    text = {**stack, **still, "encoder_hidden_size": s.width, "vocab_size": s.vocabulary, "bos_token_id": 2, "sep_token_id": 3, "eos_token_id": 3, "pad_token_id": 0}
    return BlipForQuestionAnswering(BlipConfig(text_config=text, vision_config={**stack, "image_size": round(s.visual**0.5) * PATCH, "patch_size": PATCH}))


def llava(s: Sizes) -> nn.Module:
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    stack = {"hidden_size": s.width, "intermediate_size": 4 * s.width, "num_hidden_layers": s.layers, "num_attention_heads": s.heads}
    vision = CLIPVisionConfig(**stack, image_size=round(s.visual**0.5) * PATCH, patch_size=PATCH)
    return LlavaForConditionalGeneration(LlavaConfig(vision_config=vision, text_config=LlamaConfig(**stack, vocab_size=s.vocabulary), image_token_index=IMAGE))


def tokens(s: Sizes, length: int, seed: int) -> Tensor:
    return torch.randint(6, s.vocabulary, (s.batch, length), generator=torch.Generator().manual_seed(seed))


def words(ids: Tensor) -> dict[str, Any]:
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def regions(s: Sizes) -> dict[str, Any]:
    g = torch.Generator().manual_seed(0)
    features = torch.randn(s.batch, s.visual, 2048, generator=g), torch.rand(s.batch, s.visual, 4, generator=g)
    return {**words(tokens(s, s.text, 1)), "vis_inputs": features, "labels": tokens(s, s.answer, 2)}


def question(s: Sizes) -> dict[str, Any]:
    side = round(s.visual**0.5) * PATCH
    pixels = torch.randn(s.batch, 3, side, side, generator=torch.Generator().manual_seed(0))
    return {**words(tokens(s, s.text, 1)), "pixel_values": pixels, "labels": tokens(s, s.answer, 2)}


def conversation(s: Sizes) -> dict[str, Any]:
    ids = torch.cat([torch.full((s.batch, s.visual), IMAGE), tokens(s, s.text, 1)], 1)
    return {**question(s), **words(ids), "labels": ids.masked_fill(ids == IMAGE, -100)}


class Host(NamedTuple):
    make: Callable[[Sizes], nn.Module]
    batch: Callable[[Sizes], dict[str, Any]]
    methods: dict[str, Callable[[Sizes], dict[str, Any]]]
    """Options of `fastadapt.patch`: the published ranks at width 768."""
    projections: str = ""
    """Of PEFT's LoRA: query and value, by their paths."""


def _vlpet(rank: int) -> Callable[[Sizes], dict[str, Any]]:
    return lambda s: {"rank": rank * s.width // 768, "gate_rank": rank * s.width // 768, "value_rank": s.width // 8, "heads": HEADS}


def _lora(s: Sizes) -> dict[str, Any]:
    return {"rank": s.width // 48}


VL_ADAPTER: dict[str, Callable[[Sizes], dict[str, Any]]] = {"vl_adapter": lambda s: {"rank": s.width // 8}}
COMPACTER: dict[str, Callable[[Sizes], dict[str, Any]]] = {"compacter": lambda s: {"rank": s.width // 8, "division": 4, "phm_rank": 1, "shared_rule": True}}
UNIADAPTER: dict[str, Callable[[Sizes], dict[str, Any]]] = {"uniadapter": lambda s: {"rank": 2 * s.width // 3, "key_value_rank": s.width // 12}}
HOSTS = {
    "VL-BART": Host(vl_bart, regions, {**VL_ADAPTER, "vlpet": _vlpet(96), **COMPACTER, "lora": _lora}, r".*\.[qv]_proj"),
    "VL-T5": Host(vl_t5, regions, {**VL_ADAPTER, "vlpet": _vlpet(192), "lora": _lora}, r".*\.[qv]"),
    "BLIP": Host(blip, question, UNIADAPTER),
    "LLaVA": Host(llava, conversation, {"vl_adapter": lambda s: {"rank": s.width // 8, "towers": ["text", "projector"]}, "lora": _lora}, r".*\.language_model\..*\.[qv]_proj"),
}
QUICK = (("VL-BART", "vl_adapter"), ("VL-BART", "vlpet"), ("VL-T5", "vlpet"), ("BLIP", "uniadapter"), ("LLaVA", "lora"))


@contextlib.contextmanager
def authors() -> Iterator[None]:
    """Inside, every adapter layer runs the authors' operations: fastadapt's modules call `tests.eager` in the place of `fastadapt.functional`."""

    def gated(h: Tensor, x: Tensor | None, w_down: Tensor, w_up: Tensor, b_down: Tensor | None = None, b_up: Tensor | None = None, **options: Any) -> Tensor:
        return eager.gated_bottleneck(h, x, w_down.chunk(HEADS), w_up, None if b_down is None else b_down.chunk(HEADS), b_up, **options)

    theirs = {name: gated if name == "gated_bottleneck" else getattr(eager, name) for name in functional.__all__}
    ours = {name: getattr(functional, name) for name in theirs}
    try:
        vars(functional).update(theirs)
        yield
    finally:
        vars(functional).update(ours)


def trained(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def frozen_base(host: Host, s: Sizes) -> nn.Module:
    """The model without adapters, nothing trained, but with gradients from its inputs on, as adapters in the first layers need them. (LLaVA's are not in its vision tower.)"""
    torch.manual_seed(0)
    model: Any = host.make(s).requires_grad_(False)
    for name, module in model.named_modules():
        if isinstance(module, (nn.Embedding, nn.Conv2d)) and "vision_tower" not in name:  # of tokens, positions and patches
            module.register_forward_hook(lambda module, args, out: out.requires_grad_().clone() if torch.is_grad_enabled() else out)  # BLIP adds to it in place
    return model


def adapted(host: Host, method: str, s: Sizes) -> dict[str, nn.Module]:
    """The model under the names of who computes its adapters, all with the same weights, away from their starting values: "ours", and "eager" or, for LoRA, "peft"."""
    torch.manual_seed(0)
    if method != "lora":
        ours = host.make(s)
        handle = fastadapt.patch(ours, method, **host.methods[method](s))
        with torch.no_grad():
            for p in handle.trainable_parameters():
                p.add_(0.02 * torch.randn_like(p))
        return {"ours": ours, "eager": copy.deepcopy(ours)}
    from peft import LoraConfig, get_peft_model

    base: Any = host.make(s)
    theirs = get_peft_model(copy.deepcopy(base), LoraConfig(target_modules=host.projections, r=host.methods[method](s)["rank"], lora_alpha=32, init_lora_weights=False))
    with tempfile.TemporaryDirectory() as folder:
        theirs.save_pretrained(folder)
        fastadapt.interop.from_peft(base, folder)
    return {"ours": base, "peft": theirs}


def training_step(model: Callable[..., Any], inputs: dict[str, Any], optimizer: torch.optim.Optimizer | None) -> None:
    model(**inputs).loss.backward()
    if optimizer:
        optimizer.step()
        optimizer.zero_grad()


def generate(model: Any, inputs: dict[str, Any], count: int) -> Tensor:
    return model.generate(**{name: t for name, t in inputs.items() if name != "labels"}, max_new_tokens=count, min_new_tokens=count, do_sample=False, num_beams=1)


def gradients(model: nn.Module, inputs: dict[str, Any]) -> Tensor:
    """Loss and all gradients as one vector."""
    loss = model(**inputs).loss
    found = torch.autograd.grad(loss, trained(model), allow_unused=True)
    return torch.cat([loss.detach()[None], *(g.flatten() for g in found if g is not None)])


def to_double(inputs: Any) -> Any:
    return torch.utils._pytree.tree_map(lambda t: t.double() if isinstance(t, Tensor) and t.is_floating_point() else t, inputs)


def to_device(tree: Any, device: str) -> Any:
    return torch.utils._pytree.tree_map(lambda t: t.to(device) if isinstance(t, Tensor) else t, tree)


def wrong(models: dict[str, nn.Module], inputs: dict[str, Any]) -> str:
    """What the tests' rule has against the loss and the gradients of ours, or nothing. The exact ones are the rival's in fp64."""
    rival = next(name for name in models if name not in ("ours", "base"))
    got = gradients(models["ours"], inputs)
    with authors():
        same, exact = gradients(models[rival], inputs), gradients(copy.deepcopy(models[rival]).double(), to_double(inputs))
    error, limit = tolerance.relative_error(got, exact), tolerance.limit_of(tolerance.relative_error(same, exact), torch.float32, gradient=True)
    return "" if error <= limit else f"loss and gradients: error {error:.3g} > {limit:.3g}"


def wrong_tokens(models: dict[str, nn.Module], inputs: dict[str, Any], count: int) -> str:
    """Whether ours generates other tokens than its rival."""
    told = []
    for who, model in models.items():
        if who != "base":
            with authors() if who == "eager" else contextlib.nullcontext():
                told.append(generate(model.eval(), inputs, count))
            model.train()
    return "" if torch.equal(*told) else "generated other tokens"


COMPILED = "ours, compiled"


def compare(name: str, method: str, s: Sizes, args: argparse.Namespace, compiled: bool = True) -> list[measure.Row]:
    """Rows of one host with one method."""
    host, rows = HOSTS[name], []
    inputs = to_device(host.batch(s), args.device)
    models = {who: model.to(args.device).train() for who, model in {**adapted(host, method, s), "base": frozen_base(host, s)}.items()}
    rank = host.methods[method](s)["rank"]
    where = (torch.get_num_threads(), measure.machine(args.device))

    def row(rival: str, direction: str, ms: float | None, numbers: Any, correct: bool) -> measure.Row:
        return measure.Row(f"{name} {method}, {s.name}", backend, rival, "fp32", s.rows, s.width, rank, direction, where[0], ms, *numbers, correct, where[1], "fp32")

    backend = "cpu" if args.device == "cpu" else "auto"
    with fastadapt.backend.use(backend):
        reasons = {"training step": wrong(models, inputs), "generation": wrong_tokens(models, inputs, s.answer)}  # before the steps change each one's weights
        torch.compiler.reset()
        steps: dict[str, Callable[[], object]] = {}
        runs: dict[str, Any] = dict(models)
        if compiled:
            rival = next(who for who in models if who not in ("ours", "base"))
            for who, of in ((COMPILED, "ours"), ("compile", rival)):  # the whole model, its base included: compiled against compiled
                runs[who] = torch.compile(copy.deepcopy(models[of]), dynamic=False)
        for who, model in runs.items():
            optimizer = torch.optim.AdamW(trained(model), lr=1e-4) if who != "base" else None
            steps[who] = functools.partial(training_step, model, inputs, optimizer)
        writes = {who: functools.partial(generate, model, inputs, s.answer) for who, model in models.items()}
        for direction, candidates in (("training step", steps), ("generation", writes)):
            for model in models.values():
                model.train(direction != "generation")
            with torch.set_grad_enabled(direction != "generation"):
                timed = {who: f if who in ("ours", "base", COMPILED) else _as_authors(f) for who, f in candidates.items()}
                rivals = [who for who in candidates if who not in ("ours", COMPILED)]
                if reasons[direction]:
                    print(f"{name} {method}, {direction}: no speed is shown. {reasons[direction]}", file=sys.stderr)
                    rows += [row(rival, direction, None, (None, None, None), False) for rival in rivals]
                    continue
                times = measure.interleave(timed, args.rounds, args.device, args.seconds)
            for rival in rivals:
                own = times[COMPILED if rival == "compile" else "ours"]
                rows.append(row(rival, direction, statistics.median(own) * 1e3, measure.ratios(own, times[rival]), True))
    return rows


def _as_authors(f: Callable[[], object]) -> Callable[[], object]:
    def run() -> object:
        with authors():
            return f()

    return run


@dataclass(frozen=True)
class Shares:
    """Where the time of a training step goes, in milliseconds: differences between medians of interleaved runs. What is trained beside the adapters (norms, visual projection)
    counts with them. ``eager_...``: the same of the authors' code."""

    model: str
    method: str
    threads: int
    step: float
    base_forward: float
    base_backward: float
    adapters_forward: float
    adapters_backward: float
    optimizer: float
    eager_adapters_forward: float
    eager_adapters_backward: float
    device: str

    def __str__(self) -> str:
        parts = ("base_forward", "base_backward", "adapters_forward", "adapters_backward", "optimizer")
        shares = ", ".join(f"{name.replace('_', ' ')} {100 * getattr(self, name) / self.step:.0f} %" for name in parts)
        ours, theirs = self.adapters_forward + self.adapters_backward, self.eager_adapters_forward + self.eager_adapters_backward
        return f"{self.model} {self.method}, {self.threads} threads: step {self.step:.1f} ms: {shares}; adapters {ours:.1f} ms, in the authors' code {theirs:.1f} ms"


def shares(name: str, method: str, s: Sizes, args: argparse.Namespace) -> Shares:
    """Measures one table row."""
    host = HOSTS[name]
    inputs = to_device(host.batch(s), args.device)
    models = {who: model.to(args.device).train() for who, model in {**adapted(host, method, s), "base": frozen_base(host, s)}.items()}
    optimizer = torch.optim.AdamW(trained(models["ours"]), lr=1e-4)
    training_step(models["ours"], inputs, None)  # the optimiser's gradients

    def forward(model: nn.Module) -> object:
        return model(**inputs).loss

    candidates: dict[str, Callable[[], object]] = {"optimizer": optimizer.step}
    for who, model in models.items():
        for part, f in (("forward", functools.partial(forward, model)), ("both", functools.partial(training_step, model, inputs, None))):
            candidates[f"{who} {part}"] = f if who in ("ours", "base") else _as_authors(f)
    with fastadapt.backend.use("cpu" if args.device == "cpu" else "auto"):
        ms = {key: statistics.median(seconds) * 1e3 for key, seconds in measure.interleave(candidates, args.rounds, args.device, 2 * args.seconds).items()}
    base = ms["base forward"], ms["base both"] - ms["base forward"]
    adapters = {who: (ms[f"{who} forward"] - base[0], ms[f"{who} both"] - ms[f"{who} forward"] - base[1]) for who in ("ours", "eager")}
    step = ms["ours both"] + ms["optimizer"]
    return Shares(f"{name}, {s.name}", method, torch.get_num_threads(), step, *base, *adapters["ours"], ms["optimizer"], *adapters["eager"], measure.machine(args.device))


def selected(quick: bool) -> list[tuple[str, str, Sizes]]:
    """Host, method and sizes of every comparison of a list."""
    every = [(name, method, SMALL) for name, host in HOSTS.items() for method in host.methods]
    return [(*pair, ONE) for pair in QUICK] if quick else [*every, *(("VL-BART", method, BASE) for method in HOSTS["VL-BART"].methods)]


SHARED = ("vl_adapter", "vlpet")  # the methods on VL-BART of whose steps the shares are measured


def quick_lists(args: argparse.Namespace) -> Iterator[tuple[int, bool]]:
    """Numbers of threads, and whether they have the quick list."""
    return ((threads, args.quick or i > 0) for i, threads in enumerate(measure.threads_of(args)))


def listed(args: argparse.Namespace) -> Iterator[str]:
    """A line for every measurement: step and generation against all rivals, or the shares of a step."""
    for threads, quick in quick_lists(args):
        yield from (f"{name} {method}, {s.name}, {threads} threads" for name, method, s in selected(quick))
        yield from (f"VL-BART {method}, shares of a step, {threads} threads" for method in SHARED)


def run(args: argparse.Namespace) -> Iterator[list[Any]]:
    """Times the list, printing as it goes. Compiled are VL-PET on VL-BART in the quick list, and in the full one the quick list's pairs, of two layers: a minute for each."""
    for _, quick in quick_lists(args):
        for name, method, s in selected(quick):
            rows = compare(name, method, s, args, compiled=(name, method) == ("VL-BART", "vlpet") if quick else (name, method) in QUICK and s == SMALL)
            print(*rows, sep="\n", flush=True)
            yield rows
        for method in SHARED:
            found = shares("VL-BART", method, ONE if quick else BASE, args)
            print(found, flush=True)
            yield [found]


if __name__ == "__main__":
    from benchmarks.suites import main

    sys.exit(main("models"))
