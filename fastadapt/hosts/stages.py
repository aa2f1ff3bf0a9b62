"""What a method does to a whole stack of layers: prompts before its input, weights generated for its layers.

A stage is a module that becomes a child of the stack (role "encoder.prompt", slot "prompt") and hooks around the forward of the stack's modules. A stack is a PreTrainedModel,
whose class cannot change without losing what transformers records under it, hence hooks here and adapted classes elsewhere. Hooks hold their module: a copy of the model, or a
pickled one, has its own.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(eq=False)
class Hook:
    """A hook before (``"pre"``, with keyword arguments) or behind (``"post"``) ``owner``'s forward, which does nothing while it is not ``enabled``."""

    owner: nn.Module
    kind: str
    enabled: bool = field(default=True, init=False)

    def install(self) -> None:
        """Puts the hook in."""
        if self.kind == "pre":
            self.owner.register_forward_pre_hook(self, with_kwargs=True)
        else:
            self.owner.register_forward_hook(self)

    def remove(self) -> None:
        """Takes it out again."""
        hooks = self.owner._forward_pre_hooks if self.kind == "pre" else self.owner._forward_hooks
        for key in [key for key, hook in hooks.items() if hook is self]:
            del hooks[key]
            self.owner._forward_pre_hooks_with_kwargs.pop(key, None)

    def __call__(self, owner: nn.Module, args: tuple[Any, ...], last: Any) -> Any:
        if not self.enabled:
            return None
        return ((), self.before(owner, _named(owner, args, last))) if self.kind == "pre" else self.behind(last)

    def before(self, owner: nn.Module, inputs: dict[str, Any]) -> dict[str, Any]:
        """The stack's arguments by name, changed."""
        raise NotImplementedError

    def behind(self, output: Any) -> Any:
        """The module's output, changed."""
        raise NotImplementedError


def _named(owner: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    return {**dict(zip(inspect.signature(owner.forward).parameters, args, strict=False)), **kwargs} if args else kwargs


@dataclass(eq=False)
class _Prepend(Hook):
    """The prompt before the embedded text; the mask grows with it."""

    prompt: Any = None

    def before(self, owner: Any, inputs: dict[str, Any]) -> dict[str, Any]:
        embeds = inputs.get("inputs_embeds")
        if embeds is None:
            embeds = owner.embed_tokens(inputs["input_ids"])
        prompt = _of_batch(self.prompt(), embeds)
        mask = inputs.get("attention_mask")
        return {**inputs, "input_ids": None, "inputs_embeds": torch.cat([prompt, embeds], 1), "attention_mask": _longer(mask, prompt.shape[1])}


@dataclass(eq=False)
class _NoPositions(Hook):
    """Learned positions of a prompted sequence: none for the prompt, and the text's start at 0."""

    prompt: Any = None

    def behind(self, output: Tensor) -> Tensor:
        length = _length(self.prompt)
        return torch.cat([torch.zeros_like(output[..., :length, :]), output[..., : output.shape[-2] - length, :]], -2)


@dataclass(eq=False)
class _Attend(Hook):
    """The decoder attends to the encoder's prompt: its mask of the encoder's output grows, where nobody has seen to it yet."""

    prompt: Any = None

    def before(self, owner: Any, inputs: dict[str, Any]) -> dict[str, Any]:
        mask, states = inputs.get("encoder_attention_mask"), inputs.get("encoder_hidden_states")
        if mask is not None and states is not None and mask.ndim == 2 and mask.shape[1] + _length(self.prompt) == states.shape[1]:
            inputs = {**inputs, "encoder_attention_mask": _longer(mask, _length(self.prompt))}
        return inputs


@dataclass(eq=False)
class _Remember(Hook):
    """The decoder's prompt: keys and values that the decoder makes of the prompt alone stand in the cache before the first token."""

    prompt: Any = None
    unasked: bool = field(default=False, init=False)
    """Whether this forward has a cache that its caller did not ask for."""

    def before(self, owner: Any, inputs: dict[str, Any]) -> dict[str, Any]:
        from transformers.cache_utils import DynamicCache, EncoderDecoderCache

        cache = inputs.get("past_key_values")
        asked = inputs.get("use_cache")
        self.unasked = cache is None and not (owner.config.use_cache if asked is None else asked)
        if cache is not None and cache.get_seq_length() > 0:
            return inputs
        if owner.training and getattr(owner, "gradient_checkpointing", False):
            raise RuntimeError("a decoder prompt stands in the cache, which gradient checkpointing leaves out: switch checkpointing off for the decoder")
        if cache is None:
            cache = EncoderDecoderCache(DynamicCache(config=owner.config), DynamicCache(config=owner.config))
        tokens = inputs["input_ids"] if inputs.get("inputs_embeds") is None else inputs["inputs_embeds"]
        prompt = self.prompt()
        prompt = _of_batch(prompt.to(owner.embed_tokens.weight.dtype), tokens)
        owner.forward(inputs_embeds=prompt, past_key_values=cache, use_cache=True)
        return {**inputs, "past_key_values": cache, "attention_mask": _longer(inputs.get("attention_mask"), prompt.shape[1])}


@dataclass(eq=False)
class _Forget(Hook):
    """A cache that nobody asked for is not given back: ``generate`` would take it for its own."""

    remember: Any = None

    def behind(self, output: Any) -> Any:
        if self.remember.unasked and getattr(output, "past_key_values", None) is not None:
            output.past_key_values = None
        return output


@dataclass(eq=False)
class _Generate(Hook):
    """Weights for all layers of the stack, once per forward."""

    network: Any = None

    def before(self, owner: Any, inputs: dict[str, Any]) -> dict[str, Any]:
        self.network.hand_out()
        return inputs


@dataclass(eq=False)
class _Embed(Hook):
    """The encoder states that all layers of the stack attend to, changed once."""

    embedding: Any = None

    def before(self, owner: Any, inputs: dict[str, Any]) -> dict[str, Any]:
        states = inputs.get("encoder_hidden_states")
        return inputs if states is None else {**inputs, "encoder_hidden_states": self.embedding(states)}


def _longer(mask: Tensor | None, length: int) -> Tensor | None:
    if mask is None:
        return None
    if mask.ndim != 2:
        raise ValueError(
            f"attention_mask: shape {tuple(mask.shape)} must be (batch, tokens), so that a prompt can be put before it; a static cache prepares another: take a dynamic one"
        )
    return torch.cat([mask.new_ones(mask.shape[0], length), mask], 1)


def _of_batch(prompt: Tensor, like: Tensor) -> Tensor:
    """A prompt for every sample; where samples have prompts of their own, for each of its beams."""
    prompt = prompt.to(like.dtype) if like.is_floating_point() else prompt
    return prompt.expand(len(like), -1, -1) if prompt.dim() == 2 else prompt.repeat_interleave(len(like) // len(prompt), 0)


def _length(prompt: Any) -> int:
    return (next(iter(prompt.adapters.values())) if hasattr(prompt, "adapters") else prompt).length


def _encoder_prompt(stack: Any, other: Any, prompt: nn.Module) -> list[Hook]:
    hooks: list[Hook] = [_Prepend(stack, "pre", prompt)]
    if hasattr(stack, "embed_positions"):
        hooks.append(_NoPositions(stack.embed_positions, "post", prompt))
    return hooks + ([] if other is None else [_Attend(other, "pre", prompt)])


def _decoder_prompt(stack: Any, other: Any, prompt: nn.Module) -> list[Hook]:
    remember = _Remember(stack, "pre", prompt)
    return [remember, _Forget(stack, "post", remember)]


STAGES: dict[str, tuple[str, Callable[[Any, Any, Any], list[Hook]]]] = {
    "encoder.prompt": ("prompt", _encoder_prompt),
    "decoder.prompt": ("prompt", _decoder_prompt),
    "encoder.hypernetwork": ("adapter_layers_hyper_net", lambda stack, other, network: [_Generate(stack, "pre", network)]),
    "decoder.hypernetwork": ("adapter_layers_hyper_net", lambda stack, other, network: [_Generate(stack, "pre", network)]),
    "text.temporal_embedding": ("temporal_embedding", lambda stack, other, embedding: [_Embed(stack, "pre", embedding)]),
}
"""Role -> the stack's child that the stage's module becomes, and the hooks around (stack, the other stack of the model or None, module)."""
