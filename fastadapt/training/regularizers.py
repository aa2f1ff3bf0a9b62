"""Penalties on what adapters compute."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastadapt import functional
from fastadapt.nn import Bottleneck, GeneratedBottleneck, PerTask, ValueParallelAdapter
from fastadapt.ops import activations
from fastadapt.patching import Handle


class Tracked:
    """Mean squares of the adapters' activations in one forward, by site."""

    def __init__(self) -> None:
        self.by_site: dict[str, Tensor] = {}
        self._without_gradient = False

    def penalty(self, weight: float = 0.001) -> Tensor:
        """weight times the mean over sites of mean(z^2), to be added to the loss.

        Raises:
            RuntimeError: no adapter has run inside the block yet, or adapters in training have run without gradients, as in reentrant checkpointing.
        """
        if not self.by_site:
            raise RuntimeError("no adapter has run inside `with track_z(...)` yet; a compiled model that ran before must be called uncompiled there")
        if self._without_gradient and torch.is_grad_enabled():
            raise RuntimeError("z has no gradient: the adapters ran under no_grad, as in reentrant checkpointing; checkpoint with use_reentrant=False")
        return weight * torch.stack(list(self.by_site.values())).mean()


@contextmanager
def track_z(handle: Handle, sites: Callable[[str], bool] = lambda site: True) -> Iterator[Tracked]:
    r"""VL-Adapter's z-regulariser (``--track_z --lambda_z 0.001``): :math:`loss + \lambda\, mean_k\, mean(z_k^2)`, with :math:`z_k = \phi(h W_d^\top + b_d)` of adapter k.

    The fused operation does not give z away: inside the block every adapter's down-projection is computed a second time. Of a site that runs more than once the last run counts, as
    in the published code; with Hyperformer on BART that code counts the feed-forward sites only (``sites=lambda s: s.endswith("feed_forward")``). Batches that mix tasks
    (`Handle.route`), whose z no module sees, are refused inside the block. With gradient checkpointing, which runs layers again in backward, keep backward inside the block.

    Args:
        handle: of a model patched with adapters behind sub-layers.
        sites: which sites count, by id.

    Raises:
        ValueError: no site counts.
        RuntimeError: in the model's forward, inside `Handle.route`.

    >>> with track_z(handle) as z:  # doctest: +SKIP
    ...     loss = model(**batch).loss + z.penalty(0.001)
    """
    tracked, hooks = Tracked(), []
    kinds = (Bottleneck, GeneratedBottleneck)
    for site, module in handle.sites.items():
        adapters = list(module.adapters.values()) if isinstance(module, PerTask) else [module]  # type: ignore[arg-type]
        if sites(site) and isinstance(adapters[0], kinds) and not isinstance(adapters[0], ValueParallelAdapter):
            hooks += [module.register_forward_pre_hook(_not_routed), *(adapter.register_forward_pre_hook(_recorder(tracked, site)) for adapter in adapters)]
    if not hooks:
        raise ValueError("sites: the handle's model has no bottleneck adapter behind a sub-layer that counts")
    try:
        yield tracked
    finally:
        for hook in hooks:
            hook.remove()


def _not_routed(module: Any, inputs: tuple[Any, ...]) -> None:
    of = module.weights if isinstance(module, GeneratedBottleneck) else module
    if getattr(of, "task_ids", None) is not None:
        raise RuntimeError("track_z: does not see what adapters do in a batch that mixes tasks (`with handle.route(...)`); use batches of one task, with handle.task(...)")


def _recorder(tracked: Tracked, site: str) -> Callable[[Any, tuple[Any, ...]], None]:
    def record(adapter: Any, inputs: tuple[Any, ...]) -> None:
        h = inputs[0]
        if isinstance(adapter, GeneratedBottleneck):
            weight, bias = adapter.weights.w_down, adapter.weights.b_down  # type: ignore[union-attr]
            norm = None if adapter.weights.norm_before is None else (*adapter.weights.norm_before, 1e-5)  # type: ignore[union-attr]
        else:
            h = adapter.inside(*inputs)
            weight, bias = adapter.down_sampler.weight, adapter.down_sampler.bias
            norm = None if (n := adapter.pre_layer_norm) is None else (n.weight, n.bias, n.eps)
        if norm is not None:
            h = functional.layer_norm(h, norm)
        z = activations.apply(F.linear(h, weight.to(h.dtype), None if bias is None else bias.to(h.dtype)), functional.activation_index(adapter.activation))
        tracked._without_gradient |= adapter.training and not torch.is_grad_enabled()
        tracked.by_site[site] = z.to(torch.promote_types(z.dtype, torch.float32)).square().mean()

    return record
