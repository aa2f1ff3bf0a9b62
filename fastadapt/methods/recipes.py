"""How the papers trained: hyper-parameters of their scripts, per method and host."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A published training run. What it does not set is as its script leaves it.

    Args:
        learning_rate: peak, after a linear warm-up; then linear to 0.
        epochs: passes over all tasks.
        batch_size: of the VQA loader; gqa has 100/60 of it, nlvr 20/60, caption 50/60 (VL-Adapter's rule).
        warmup_ratio: share of the steps.
        weight_decay: of AdamW, see `fastadapt.training.parameter_groups`.
        clip: norm at which gradients are clipped.
        task_prompts: texts start with `task_prompt`.
    """

    learning_rate: float
    epochs: int = 20
    batch_size: int = 500
    warmup_ratio: float = 0.1
    weight_decay: float = 0.01
    clip: float = 5.0
    task_prompts: bool = True


# Learning rates of VL-Adapter's and VL-PET's scripts by host and kind of tasks, adapters shared by all tasks. VL-Adapter's scripts give both hosts one rate.
_RATES: dict[tuple[str, str], dict[str, float]] = {
    ("bart", "image"): {"full": 1e-4, "vl_adapter": 1e-3, "hyperformer": 1e-3, "compacter": 1e-3, "lora": 1e-3, "prompt": 1e-3, "bitfit": 1e-3, "vlpet": 1e-3},
    ("t5", "image"): {"full": 1e-4, "vl_adapter": 1e-3, "hyperformer": 1e-3, "compacter": 1e-3, "lora": 1e-3, "prompt": 1e-3, "vlpet": 3e-4},
    ("bart", "video"): {"full": 3e-5, "vl_adapter": 3e-4, "lora": 3e-4, "prompt": 3e-4, "vlpet": 7e-4},
    ("t5", "video"): {"full": 3e-5, "vl_adapter": 3e-4, "lora": 3e-4, "prompt": 3e-4},
}
_BATCH = {("bart", "image"): 500, ("t5", "image"): 300, ("bart", "video"): 50, ("t5", "video"): 30}


def recipe(method: str, host: str, kind: str = "image") -> Recipe:
    """The published run of a method on "bart" (VL-BART) or "t5" (VL-T5), for "image" or "video" tasks (the scripts of VL-Adapter and VL-PET). The batch of LoRA and
    prompts on T5's video tasks is 30 as the others', not the scripts' 300, which would not have fit.

    Raises:
        ValueError: no run of that kind was published.
    """
    rates = _RATES.get((host, kind))
    if rates is None:
        raise ValueError(f"host, kind: nothing is published for {host!r} and {kind!r}; known: {', '.join(' '.join(key) for key in _RATES)}")
    if method not in rates:
        raise ValueError(f"method: no run of {method!r} on {host} with {kind} tasks was published; known: {', '.join(rates)}")
    # Several adapters or a hypernetwork tell tasks apart without prompts; full fine-tuning of the image tasks had none either.
    prompts = method != "hyperformer" and (method, kind) != ("full", "image")
    epochs = 7 if kind == "video" and method != "vlpet" else 20
    return Recipe(learning_rate=rates[method], epochs=epochs, batch_size=_BATCH[host, kind], task_prompts=prompts)
