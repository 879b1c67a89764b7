"""Sparse MeZO: Less Parameters for Better Performance in Zeroth-Order LLM Fine-Tuning.

Liu, Zhu, Gong, Cheng, Hsieh, You, 2024. https://arxiv.org/abs/2402.15751

MeZO that perturbs and updates only weights of small magnitude. A tensor's threshold h is the quantile of its |θ| before
training; in every step the mask m = 1[|θ| ≤ h] comes from the weights as they are, unperturbed:

    c = (f(θ + ε m⊙z) − f(θ − ε m⊙z)) / 2ε,    θ ← θ − η c m⊙z,    z ~ N(0, I).

With d̂ = Σ m, E‖c m⊙z‖² = (d̂ + 2) ‖m⊙∇f‖², so the step size may grow by about d / d̂.
"""

from __future__ import annotations

from typing import Any, Self

import torch
from torch import Tensor, nn

from provenn.core.experiment.checks import check_choice, check_integer, check_number
from provenn.core.experiment.parameters import flat_view
from provenn.core.experiment.seeding import derive_seed
from provenn.core.numerics.gradient_free import Evaluations, GradientFreeOptimizer, checked, layerwise_difference
from provenn.core.numerics.zeroth_order import SeededDirection, finite_difference, perturbed_layers
from provenn.optim._sparse_mezo_masks import (
    SELECTIONS,
    Choice,
    MaskShare,
    choose,
    magnitude_thresholds,
    mask_of,
    stored_masks,
    within,
)

__all__ = ["MaskShare", "SparseMeZO", "magnitude_thresholds"]

MODES = ("recompute", "stored", "static")


class SparseMeZO(GradientFreeOptimizer):
    """MeZO on the weights of small magnitude, with masks that are made again wherever they are needed.

    The closure evaluates the loss on one batch, by running the model; a step calls it twice::

        optimizer = SparseMeZO.for_model(model, lr=1e-6)
        optimizer.step(lambda: loss_fn(model(x), y))

    Args:
        params: Parameters or groups of them. A group has its own ``lr``, ``weight_decay`` and ``maximize``.
        lr: Step size η; with few weights in the mask, larger ones than MeZO's work.
        eps: ε, the length of a perturbation.
        sparsity: Share of each matrix that is out of the mask at the start, 1 − r; the paper's runs have 0.7 to 0.8.
        mask: ``"recompute"``: a layer's perturbed copy is made when its forward begins and dropped when it ends, so
            that the mask always reads clean weights; it needs ``model``. ``"stored"``: masks of the clean weights are
            kept for the step, and the weights move in place. ``"static"``: the masks of the first weights, for
            comparison.
        select: ``"smallest"`` weights; or, for comparison, the ``"largest"``, or a ``"random"`` choice of the same
            share that stays for the whole run.
        dense_small: Whether tensors that are no matrices or have fewer than ``min_numel`` entries are wholly in, or
            wholly out.
        min_numel: Entries from which on a matrix has a mask.
        weight_decay: λ; λθ is added to the estimate, within the mask.
        generator: Draws the seed of all noise, once. ``None``: torch's global generator.
        maximize: Whether to climb.
        model: The model that owns the parameters; :meth:`for_model` passes it. It is in evaluation mode within a step.

    Shape:
        Parameters of any shape; real, contiguous.

    Raises:
        ValueError: ``sparsity`` outside [0, 1), ``eps`` ≤ 0, ``lr`` ≤ 0, ``weight_decay`` < 0, ``min_numel`` < 1, an
            unknown ``mask`` or ``select``, ``"recompute"`` without ``model``, or a weight that is NaN or infinite.
        RuntimeError: The masks are empty in all tensors; a parameter is owned by two modules, or, in a step, is used
            outside its own module's forward (``"recompute"``); or the loss was NaN or infinite in ten steps in a row.

    Cost: per step two evaluations and three draws of z with their masks (four in place), about 3 ns an entry and draw
    on a CPU, and a comparison. Memory above a forward pass: with ``"recompute"`` the perturbed copy of one layer, with
    the others one byte a masked weight. No state but a number a tensor.

    Source: arXiv 2402.15751, algorithm 1 and section 3.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-6,
        eps: float = 1e-3,
        sparsity: float = 0.75,
        mask: str = "recompute",
        select: str = "smallest",
        dense_small: bool = True,
        min_numel: int = 128,
        weight_decay: float = 0.0,
        generator: torch.Generator | None = None,
        maximize: bool = False,
        *,
        model: nn.Module | None = None,
    ) -> None:
        check_number("eps", eps, above=0)
        check_number("sparsity", sparsity, at_least=0, below=1)
        check_choice("mask", mask, MODES)
        check_choice("select", select, SELECTIONS)
        check_integer("min_numel", min_numel, at_least=1)
        if mask == "recompute" and model is None:
            raise ValueError("mask='recompute' needs the model: build it by SparseMeZO.for_model")
        self.eps, self.sparsity, self.mask, self.select = eps, sparsity, mask, select
        self.dense_small, self.min_numel = dense_small, min_numel
        self.choices: list[Choice | None] = []
        self._static: list[Tensor | None] = []
        defaults = {"lr": lr, "weight_decay": weight_decay, "maximize": maximize}
        super().__init__(params, defaults, generator, model)
        self._check_not_empty()
        if mask == "recompute" and model is not None:
            with perturbed_layers(model, SeededDirection(self._active()[0], 0), eps):
                pass  # ties are found here and not at the first step

    @classmethod
    def for_model(cls, model: nn.Module, **options: Any) -> Self:
        """Build one over a model's trainable parameters, whose layers are perturbed while they run.

        Hooks on the model's layers exist within a step only.

        Args:
            model: The model.
            **options: As of the class.

        Returns:
            The optimizer.

        Raises:
            ValueError: As of the class.
            RuntimeError: Two modules own a parameter, or the masks are empty.
        """
        return cls([one for one in model.parameters() if one.requires_grad], model=model, **options)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of parameters, with thresholds by their present values.

        Args:
            param_group: Parameters and their options.

        Raises:
            ValueError: An option is out of bounds, or a parameter complex, not contiguous or not finite.
        """
        group = {**self.defaults, **param_group}
        check_number("lr", group["lr"], above=0)
        check_number("weight_decay", group["weight_decay"], at_least=0)
        super().add_param_group(param_group)
        names = self._names()
        added = self.param_groups[-1]["params"]
        try:
            first = len(self.choices)
            choices = [self._choose(one, names[first + place]) for place, one in enumerate(added)]
        except ValueError:
            self.param_groups.pop()
            raise
        self.choices += choices
        if self.mask == "static":
            known = [choice or Choice() for choice in choices]
            self._static += stored_masks(added, known, self.select)

    def _names(self) -> list[str]:
        known = {} if self.model is None else {id(one): name for name, one in self.model.named_parameters()}
        return [known.get(id(one), f"params[{place}]") for place, one in enumerate(self.tensors)]

    def _choose(self, tensor: Tensor, name: str) -> Choice | None:
        """Return how a tensor's entries are chosen; ``None``: it stays out."""
        if tensor.ndim >= 2 and tensor.numel() >= self.min_numel:
            return choose(tensor, self.sparsity, self.select, name)
        choose(tensor, 0.0, self.select, name)  # for its check of the values
        return Choice() if self.dense_small else None

    def _active(self) -> tuple[list[Tensor], list[Choice], list[Tensor | None]]:
        """Return the tensors that are not wholly out, their choices, and their static masks."""
        tensors, static = self.tensors, self._static or [None] * len(self.choices)
        rows = zip(tensors, self.choices, static, strict=True)
        active = [(one, choice, kept) for one, choice, kept in rows if choice is not None]
        return [row[0] for row in active], [row[1] for row in active], [row[2] for row in active]

    def _check_not_empty(self) -> None:
        if not any(share.now for share in self.mask_report()):
            raise RuntimeError(
                f"the masks are empty in all {len(self.choices)} parameters at sparsity={self.sparsity}: nothing moves"
            )

    def mask_report(self) -> list[MaskShare]:
        """Return what the mask lets through of each parameter, now and at the start.

        The mask drains as weights grow over their thresholds, the more the further training moves them.

        Returns:
            One record a parameter, in their order.
        """
        static = self._static or [None] * len(self.choices)
        rows = zip(self._names(), self.tensors, self.choices, static, strict=True)
        return [self._share(name, tensor, choice, kept) for name, tensor, choice, kept in rows]

    def _share(self, name: str, tensor: Tensor, choice: Choice | None, kept: Tensor | None) -> MaskShare:
        if choice is None:
            return MaskShare(name, tensor.numel(), None, 0.0, 0.0, 0)
        now = choice.share
        if choice.threshold is not None:
            entries = within(tensor.detach(), choice.threshold, self.select) if kept is None else kept
            now = float(entries.double().mean())
        return MaskShare(name, tensor.numel(), choice.threshold, choice.share, now, choice.ties)

    def state_dict(self) -> dict[str, Any]:
        """Return torch's state with seed, counts, thresholds and static masks."""
        kept = {
            "shapes": [list(one.shape) for one in self.tensors],
            "choices": [None if one is None else [one.threshold, one.share, one.ties] for one in self.choices],
            "static": list(self._static),
        }
        return {**super().state_dict(), "masks": kept}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on where another optimizer was: draws, thresholds and static masks are its own.

        Args:
            state_dict: What :meth:`state_dict` returned.

        Raises:
            ValueError: It is of another kind of optimizer, or of parameters of other shapes.
        """
        kept, shapes = state_dict.get("masks"), [list(one.shape) for one in self.tensors]
        if kept is None or kept["shapes"] != shapes or bool(kept["static"]) != bool(self._static):
            found = (
                "no entry 'masks'" if kept is None else f"shapes {kept['shapes']}, {len(kept['static'])} static masks"
            )
            raise ValueError(f"state_dict must be of parameters of shapes {shapes} and of the same mask, got {found}")
        super().load_state_dict(state_dict)
        self.choices = [None if one is None else Choice(*one) for one in kept["choices"]]
        self._static = [
            None if one is None else one.to(tensor.device)
            for one, tensor in zip(kept["static"], self.tensors, strict=False)
        ]

    def _take_step(self, loss: Evaluations) -> None:
        tensors, choices, kept = self._active()
        masks: list[Tensor | None] | None = kept if self.mask == "static" else None
        if self.mask == "stored":
            masks = stored_masks(tensors, choices, self.select)
        mask = mask_of(tensors, choices, self.select, derive_seed(self.seed, "random mask"), masks)
        direction = SeededDirection(tensors, self.draw_seed(0, 0), mask)
        if self.mask == "recompute" and self.model is not None:
            difference = layerwise_difference(loss, self.model, direction, self.eps)
        else:
            difference = finite_difference(loss, direction, self.eps)
        slope = checked(difference).derivative
        if slope == 0:
            self._check_not_empty()  # a flat loss is no error; a mask that has drained is
        self._move(direction, slope)

    def _move(self, direction: SeededDirection, slope: float) -> None:
        """Update in place, piece by piece; a mask by magnitude reads each piece before it moves."""
        options = {tensor: group for group in self.param_groups for tensor in group["params"]}
        views = [flat_view(tensor) for tensor in direction.tensors]
        for index, piece, noise in direction.pieces():
            group, weights = options[direction.tensors[index]], views[index][piece]
            decay = group["weight_decay"]
            kept = weights * (noise != 0) if decay else None  # masked entries are the ones without noise
            noise.mul_(-slope if group["maximize"] else slope)
            if kept is not None:
                noise.add_(kept, alpha=decay)
            weights.add_(noise, alpha=-group["lr"])
            del noise
