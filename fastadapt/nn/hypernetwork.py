"""Hyperformer: adapters whose weights a small network generates from embeddings of task and layer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn

from fastadapt import functional
from fastadapt.nn.init import TORCH, Init, booleans, positive
from fastadapt.nn.per_task import check_ids, check_task_names, guarded, routed
from fastadapt.nn.projections import as_parameters, state_of

BLOCKS = ("feed_forward", "self_attention", "cross_attention")


class TaskEmbeddings(nn.Module):
    """An embedding per task, ``task_to_embeddings.<task>`` (dim,), N(0, 1); shared by the hypernetworks of all stacks.

    Args:
        tasks: names.
        dim: width.
    """

    _tied_weights_keys = {"": ""}  # as in `PerTask`

    def __init__(self, tasks: Sequence[str], dim: int = 512, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        if not tasks:
            raise ValueError("tasks: must name the tasks, each of which has an embedding")
        check_task_names(tasks, nn.ParameterDict())
        positive(dim=dim)
        self.tasks = tuple(tasks)  # a ParameterDict sorts
        self.task_to_embeddings = nn.ParameterDict({task: nn.Parameter(torch.empty(dim, device=device, dtype=dtype)) for task in tasks})
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draws the embeddings again."""
        for embedding in self.task_to_embeddings.values():
            embedding.normal_()


class Generated(NamedTuple):
    """One adapter's weights, with generated layer norms or None; in a batch that mixes tasks those of all tasks, (G, ...), with each sample's task."""

    w_down: Tensor
    b_down: Tensor
    w_up: Tensor
    b_up: Tensor
    norm_before: tuple[Tensor, Tensor] | None = None
    norm_after: tuple[Tensor, Tensor] | None = None
    task_ids: Tensor | None = None
    task: str | None = None


class GeneratedBottleneck(nn.Module):
    """A bottleneck adapter without parameters of its own: a `HyperNetwork` hands it its weights before every forward of the stack.

    Args:
        width: D.
        rank: R.
        activation: as in `Bottleneck`.
    """

    def __init__(self, width: int, rank: int, *, activation: str = "gelu_new") -> None:
        super().__init__()
        positive(width=width, rank=rank)
        functional.activation_index(activation)
        self.width, self.rank, self.activation = width, rank, activation
        self.weights: Generated | None = None

    def __getstate__(self) -> dict[str, Any]:
        # Generated tensors belong to one forward: copies and files do without.
        return {**super().__getstate__(), "weights": None}  # type: ignore[dict-item]

    def reset_parameters(self) -> None:
        """Nothing: the starting values are the hypernetwork's."""

    def forward(self, h: Tensor, x: Tensor | None = None) -> Tensor:
        """y of h's shape (..., D); ``x`` has no part in it.

        Raises:
            RuntimeError: no weights have been handed out: the module was called outside its stack. Or the layer runs without gradients while its weights were generated with them,
                as reentrant gradient checkpointing does: each layer's backward would go through the graph that generated the weights of all. Or this is a checkpointed layer
                that backward runs again, and the last weights are another task's.
        """
        if (w := self.weights) is None:
            raise RuntimeError("the hypernetwork has not generated weights for this adapter: call the model's encoder or decoder, not its layers")
        if w.w_down.requires_grad and not torch.is_grad_enabled():
            raise RuntimeError("generated weights cannot be trained under reentrant gradient checkpointing: use `model.gradient_checkpointing_enable({'use_reentrant': False})`")
        y, of = self._adapted(h, w), w.task if w.task_ids is None else w.task_ids
        return y if of is None else guarded(y, of)

    def _adapted(self, h: Tensor, w: Generated) -> Tensor:
        if w.task_ids is None:
            return functional.bottleneck(h, **self._arguments(w))
        if w.norm_before is None and w.norm_after is None:
            return functional.routed_bottleneck(h, check_ids(w.task_ids, h), w.w_down, w.w_up, w.b_down, w.b_up, activation=self.activation)
        tensors = (w.w_down.unbind(), w.b_down.unbind(), w.w_up.unbind(), w.b_up.unbind())
        norms = ([None] * len(w.w_down) if norm is None else list(zip(*(t.unbind() for t in norm), strict=True)) for norm in (w.norm_before, w.norm_after))
        more = {"residual": "input", "scale": 1.0, "heads": 1}
        return routed(w.task_ids, [(h, {**self._arguments(Generated(*of_task)), **more}) for of_task in zip(*tensors, *norms, strict=True)])

    def _arguments(self, w: Generated) -> dict[str, Any]:
        before, after = (None if norm is None else (*norm, 1e-5) for norm in (w.norm_before, w.norm_after))
        weights = {"w_down": w.w_down, "w_up": w.w_up, "b_down": w.b_down, "b_up": w.b_up}
        return {**weights, "activation": self.activation, "norm_before": before, "norm_after": after}

    def call(self) -> dict[str, Any]:
        """As `Bottleneck.call`."""
        return {"op": "bottleneck", "width": self.width, "rank": self.rank, "param_dtype": torch.float32 if self.weights is None else self.weights.w_down.dtype}

    def extra_repr(self) -> str:
        return f"width={self.width}, rank={self.rank}, activation={self.activation!r}"


class HyperNetwork(nn.Module):
    r"""Hyperformer's generator for one stack of layers (Mahabadi et al. 2021; VL-Adapter's "unique" hypernetwork).

    With the task's embedding and that of layer l (and, with ``one``, of block t):

    .. math:: p = LN(W_2\,\mathrm{relu}(W_1 [task; layer_l] + b_1) + b_2), \qquad W_d = G_{dw}\,p, \quad b_d = G_{db}\,p, \quad W_u = G_{uw}\,p, \quad b_u = G_{ub}\,p

    Each G is a Linear with bias; each kind of block has its own four, or all share them (``one``, the "efficient" form). All layers are generated at once, a row of p each. The
    parameters' names are the published ones.

    Args:
        width: D.
        rank: R of the generated adapters.
        layers: number of layers.
        blocks: kinds of blocks that get adapters, of "feed_forward", "self_attention", "cross_attention".
        embeddings: the tasks' embeddings.
        task_dim, hidden, projected: widths of the embeddings, of the network's middle and of p; 512, 128 and 64 are the published class's, VL-Adapter's runs have p of 8.
        layer_norm: the LN over p, eps 1e-6.
        norm_before, norm_after: generate layer norms around the adapters too: weight and bias are Linears of p, without the customary 1 (as published, so they start near zero).
        one: one generator for all kinds of blocks.
        init: starting values.

    Raises:
        ValueError: an argument is out of range.
    """

    def __init__(
        self,
        width: int,
        rank: int,
        layers: int,
        blocks: Sequence[str],
        embeddings: TaskEmbeddings,
        *,
        task_dim: int = 512,
        hidden: int = 128,
        projected: int = 64,
        layer_norm: bool = True,
        norm_before: bool = False,
        norm_after: bool = False,
        one: bool = False,
        init: Init = TORCH,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        positive(width=width, rank=rank, layers=layers, task_dim=task_dim, hidden=hidden, projected=projected)
        booleans(layer_norm=layer_norm, norm_before=norm_before, norm_after=norm_after, one=one)
        if not blocks or set(blocks) - set(BLOCKS):
            raise ValueError(f"blocks: must be some of {', '.join(BLOCKS)}, not {blocks!r}")
        if one and (norm_before or norm_after):
            raise ValueError("one: the shared generator makes no layer norms; norm_before and norm_after must be False")
        if any(p.numel() != task_dim for p in embeddings.parameters()):
            raise ValueError(f"task_dim: must be the width of the embeddings, not {task_dim}")
        self.width, self.rank, self.blocks, self.one, self.init = width, rank, tuple(b for b in BLOCKS if b in blocks), one, init
        self.norms = tuple(side for side, wanted in (("pre", norm_before), ("post", norm_after)) if wanted)
        self.task_embeddings = embeddings
        self.task: str | None = None
        self.task_ids: Tensor | None = None
        self.sites: list[tuple[str, int, GeneratedBottleneck]] = []
        self._made: tuple[str | None, tuple[tuple[int, int], ...]] | None = None
        factory: dict[str, Any] = {"device": device, "dtype": dtype}

        def linear(i: int, o: int) -> nn.Linear:
            return nn.Linear(i, o, **factory)

        self.layer_id_embeddings = nn.Embedding(layers, task_dim, **factory)
        if one:
            self.adapters_block_type = nn.Embedding(3, task_dim, **factory)
        self.task_hypernet = nn.ModuleDict({"task_embeding_generator": nn.Sequential(linear((3 if one else 2) * task_dim, hidden), nn.ReLU(), linear(hidden, projected))})
        self.LayerNorm = nn.LayerNorm(projected, eps=1e-6, **factory) if layer_norm else None
        for prefix in [""] if one else [f"{block}_" for block in self.blocks]:
            for side, rows, columns in (("up", width, rank), ("down", rank, width)):
                generators = {"weight_generator": nn.Sequential(linear(projected, rows * columns)), "bias_generator": nn.Sequential(linear(projected, rows))}
                self.add_module(f"{prefix}{side}_sampler_hyper_net", nn.ModuleDict(generators))
            for side in self.norms:
                self.add_module(f"{prefix}{side}_layernorm_hypernet", nn.ModuleDict({f"{kind}_generator": linear(projected, width) for kind in ("weight", "bias")}))
        self.reset_parameters()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "task_ids": None}  # as in `PerTask`

    def train(self, mode: bool = True) -> Self:
        self._made = None  # as in `Keeping`
        return super().train(mode)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draws the starting values again: the rule ``init``'s std (torch's default rule has 0.01 here) and zero biases; N(0, 1) for torch's embeddings."""
        zero = {id(p) for name, module in self.named_children() if "up_sampler" in name and "up_sampler" in self.init.zero for p in module.parameters()}
        self.task_embeddings.reset_parameters()
        for module in self.modules():
            if isinstance(module, nn.Embedding):
                module.weight.normal_(0.0, 1.0 if self.init.std is None else self.init.std)
            elif isinstance(module, nn.LayerNorm):
                module.reset_parameters()
            elif isinstance(module, nn.Linear):
                module.weight.zero_() if id(module.weight) in zero else module.weight.normal_(0.0, 0.01 if self.init.std is None else self.init.std)
                module.bias.zero_()

    def set_task(self, task: str | None) -> None:
        """Selects the task that weights are generated for.

        Raises:
            ValueError: the task has no embedding.
        """
        known = self.task_embeddings.task_to_embeddings
        if task is not None and task not in known:
            raise ValueError(f"task: {task!r} has no embedding here; must be one of {', '.join(known.keys())}")
        self.task = task

    def set_route(self, task_ids: Tensor | None) -> None:
        """As `PerTask.set_route`; places are those among the embeddings' tasks."""
        self.task_ids = task_ids

    def forward(self) -> dict[str, list[Generated]]:
        """For each kind of block the adapters of all layers; in a batch that mixes tasks, those of all tasks.

        Raises:
            RuntimeError: no task is selected.
        """
        if self.task is None and self.task_ids is None:
            raise RuntimeError(f"no task is selected: use `handle.set_task(...)` or `with handle.task(...)`; tasks: {', '.join(self.task_embeddings.task_to_embeddings.keys())}")
        with as_parameters(self.layer_id_embeddings.weight):
            return self._generate()

    def _generate(self) -> dict[str, list[Generated]]:
        embeddings: Any = self.task_embeddings.task_to_embeddings
        layer = self.layer_id_embeddings.weight
        task = embeddings[self.task] if self.task_ids is None else torch.stack([embeddings[name] for name in self.task_embeddings.tasks])[:, None]
        layer = layer if self.task_ids is None else layer.expand(len(embeddings), -1, -1)
        given = [torch.cat([task.expand_as(layer), layer], -1)]
        if self.one:
            kinds = self.adapters_block_type.weight[[BLOCKS.index(block) for block in self.blocks]]
            given = [torch.cat([given[0], kind.expand_as(layer)], -1) for kind in kinds]
        projected = [self.task_hypernet["task_embeding_generator"](e) for e in given]
        projected = projected if self.LayerNorm is None else [self.LayerNorm(p) for p in projected]
        return {block: self._adapters("" if self.one else f"{block}_", projected[i if self.one else 0]) for i, block in enumerate(self.blocks)}

    def _adapters(self, prefix: str, p: Tensor) -> list[Generated]:
        parts: list[Any] = []
        layers = p.dim() - 2
        for side, rows, columns in (("down", self.rank, self.width), ("up", self.width, self.rank)):
            net: Any = self._modules[f"{prefix}{side}_sampler_hyper_net"]
            parts += [net["weight_generator"](p).unflatten(-1, (rows, columns)).unbind(layers), net["bias_generator"](p).unbind(layers)]
        norms = {}
        for side in self.norms:
            net = self._modules[f"{prefix}{side}_layernorm_hypernet"]
            norms[side] = list(zip(*(net[f"{kind}_generator"](p).unbind(layers) for kind in ("weight", "bias")), strict=True))
        none = [None] * p.shape[layers]
        ids, task = ([given] * len(none) for given in (self.task_ids, self.task if self.task_ids is None else None))
        return [Generated(*row) for row in zip(*parts, norms.get("pre", none), norms.get("post", none), ids, task, strict=True)]

    def hand_out(self) -> None:
        """Generates the weights of all layers and gives them to the adapters in ``sites``; without gradients, as in ``generate``, only if something changed since the last time
        (through a parameter's ``.data``: after the next ``train()`` or ``eval()``)."""
        made = None
        if not (torch.is_grad_enabled() or torch.compiler.is_compiling() or functional.transformed()) and (state := state_of(list(self.parameters()))):
            made = (self.task if self.task_ids is None else None, state)
            if self._made == made and all(site.weights is not None and site.weights.task_ids is self.task_ids for _, _, site in self.sites):
                return
        generated = self.forward()
        for block, layer, site in self.sites:
            site.weights = generated[block][layer]
        self._made = made
