"""ZerothOrder: the five rules, block-wise estimates and sparse directions."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from provenn.core.experiment.checks import check_choice, check_integer, check_number
from provenn.core.experiment.seeding import derive_seed
from provenn.core.numerics.gradient_free import (
    Closure,
    Evaluations,
    GradientFreeOptimizer,
    NonFiniteLossError,
    layerwise_difference,
    restore_,
    restoring_difference,
)
from provenn.core.numerics.zeroth_order import Difference, SeededDirection, finite_difference
from provenn.optim._zo_bench_blocks import checked_blocks
from provenn.optim._zo_bench_estimate import Estimate, estimate, masked_shares, random_mask
from provenn.optim._zo_bench_rules import RULES, apply


class ZerothOrder(GradientFreeOptimizer):
    """ZO-SGD (MeZO) and its kin: steps from values of the loss alone, with the memory of a forward pass.

    The closure evaluates the loss on one batch, and a step calls it several times::

        optimizer = ZerothOrder(model.parameters(), lr=1e-6, model=model)
        optimizer.step(lambda: loss_fn(model(x), y))

    Evaluations a step and block: 2·q two-sided, 1 + q one-sided; ``"conservative"`` three more (two one-sided).

    Args:
        params: Parameters or groups of them. A group has its own ``lr``, ``weight_decay``, ``momentum`` and ``betas``.
        lr: Step size η. ĝ is about √d longer than the gradient, so η is far below first-order ones.
        rule: What becomes of ĝ. ``"sgd"``: θ ← θ − ηĝ. ``"sign"``: each c counts by its sign. ``"momentum"``:
            m ← βm + ĝ, θ ← θ − ηm. ``"adam"``: Adam on ĝ, ε = 10⁻⁸. ``"conservative"``: of θ − ηĝ, θ + ηĝ and θ the
            one with the least loss.
        eps: μ, the length of a perturbation.
        num_queries: q, directions averaged in a step.
        two_sided: Whether to difference f(θ ± μz), or f(θ + μz) and f(θ).
        momentum: β of ``"momentum"``.
        betas: β₁ and β₂ of ``"adam"``.
        weight_decay: λ; λθ is added to ĝ.
        blocks: A partition of the parameters, as :func:`parameter_blocks` makes them: each block in turn gets an
            estimate of its own, with the others as they are. ``None``: one block.
        sparsity: Share of entries whose noise is 0, by a random mask.
        resample_every: Steps that a mask lasts.
        generator: Draws the seed of all noise, once. ``None``: torch's global generator.
        sign: For ``"sign"``: ``"query"``, the authors' code, moves by η·|z|; ``"coordinate"``, as in ZO-signSGD, by η.
        immediate: Whether a block moves as soon as it has its estimate, or all after the last has.
        sparsity_by: ``"layer"``: the same share in every tensor. ``"global"``: each tensor's share of the weights that
            are smallest overall at construction. A group added later has shares of its own.
        exact_restore: Whether perturbations leave no rounding behind: given ``model``, layers are perturbed only while
            they run, at the cost of one layer's copy; without, the block that is perturbed is copied, as
            ``"conservative"`` does anyway with this option.
        model: Is in evaluation mode within a step, since dropout would make the two losses differ by noise / μ.
            ``None``: see to that yourself.

    Shape:
        Parameters of any shape; real, contiguous.

    Raises:
        ValueError: ``lr`` ≤ 0, ``eps`` ≤ 0, ``num_queries`` < 1, ``sparsity`` outside [0, 1), ``momentum`` or ``betas``
            outside [0, 1), ``weight_decay`` < 0 (or ≠ 0 with ``"conservative"``), ``resample_every`` < 1, an unknown
            ``rule``, ``sign`` or ``sparsity_by``, or ``blocks`` that miss or repeat a parameter.
        TypeError: A number is of another type.
        RuntimeError: The loss was NaN or infinite in ten steps in a row; each such step is skipped and counted.

    Cost: per query, three draws of z for the perturbations (two one-sided) and one for the update, about 3 ns an
    entry and draw on a CPU; a mask doubles the draws. Memory: a forward pass's, or the weights and 2¹³
    numbers a query where that is more (2²⁰ on a GPU, a 64th of a larger tensor); one buffer of the parameters for
    ``"momentum"``, two for ``"adam"``.

    Source: arXiv 2402.11592, section 3 (methods) and section 5 (block-wise, sparse); arXiv 2305.17333, algorithm 1.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-6,
        rule: str = "sgd",
        eps: float = 1e-3,
        num_queries: int = 1,
        two_sided: bool = True,
        momentum: float = 0.9,
        betas: tuple[float, float] = (0.9, 0.999),
        weight_decay: float = 0.0,
        blocks: Iterable[Iterable[Tensor]] | None = None,
        sparsity: float = 0.0,
        resample_every: int = 1,
        generator: torch.Generator | None = None,
        *,
        sign: str = "query",
        immediate: bool = True,
        sparsity_by: str = "layer",
        exact_restore: bool = False,
        model: nn.Module | None = None,
    ) -> None:
        check_choice("rule", rule, RULES)
        check_number("eps", eps, above=0)
        check_integer("num_queries", num_queries, at_least=1)
        check_number("sparsity", sparsity, at_least=0, below=1)
        check_integer("resample_every", resample_every, at_least=1)
        check_choice("sign", sign, ("query", "coordinate"))
        check_choice("sparsity_by", sparsity_by, ("layer", "global"))
        self.rule, self.eps, self.num_queries, self.two_sided = rule, eps, num_queries, two_sided
        self.sparsity, self.resample_every, self.sparsity_by = sparsity, resample_every, sparsity_by
        self.sign, self.immediate, self.exact_restore = sign, immediate, exact_restore
        self.blocks: list[list[Tensor]] | None = None
        self.shares: list[float] | None = None
        defaults = {"lr": lr, "momentum": momentum, "betas": betas, "weight_decay": weight_decay}
        super().__init__(params, defaults, generator, model)
        self.shares = masked_shares(self.tensors, sparsity, sparsity_by)
        if blocks is not None:
            self.blocks = checked_blocks(blocks, self.tensors)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of parameters; with ``blocks``, it is one more block.

        Args:
            param_group: Parameters and their options.

        Raises:
            ValueError: An option is out of bounds, or a parameter complex or not contiguous.
        """
        group = {**self.defaults, **param_group}
        check_number("lr", group["lr"], above=0)
        check_number("momentum", group["momentum"], at_least=0, below=1)
        for beta in group["betas"]:
            check_number("betas", beta, at_least=0, below=1)
        check_number("weight_decay", group["weight_decay"], at_least=0)
        if self.rule == "conservative" and group["weight_decay"]:
            raise ValueError(f"weight_decay must be 0 with rule='conservative', got {group['weight_decay']}")
        super().add_param_group(param_group)
        if self.shares is not None:  # not while the groups of the constructor come in
            added = self.param_groups[-1]["params"]
            self.shares += masked_shares(added, self.sparsity, self.sparsity_by)
            if self.blocks is not None:
                self.blocks.append(list(added))

    def state_dict(self) -> dict[str, Any]:
        """Return torch's state with seed, counts, and the shares of a mask."""
        return {**super().state_dict(), "shares": self.shares}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on where another optimizer was, draws included.

        Args:
            state_dict: What :meth:`state_dict` returned.

        Raises:
            ValueError: It is of another kind of optimizer, or of other groups.
        """
        super().load_state_dict(state_dict)
        self.shares = list(state_dict["shares"])

    def _take_step(self, loss: Evaluations) -> None:
        options = {tensor: group for group in self.param_groups for tensor in group["params"]}
        shared = not (self.two_sided or self.immediate or self.rule == "conservative")
        base = float(loss()) if shared else None
        waiting = []
        for number, tensors in enumerate(self.blocks or [self.tensors]):
            if self.rule == "conservative":
                self._conservative(loss, number, tensors, options)
                continue
            found = self._estimate(loss, number, tensors, base)
            if self.immediate:
                self._apply(found, options)
            else:
                waiting.append(found)
        for found in waiting:
            self._apply(found, options)

    def _estimate(self, loss: Closure, number: int, tensors: Sequence[Tensor], base: float | None) -> Estimate:
        seeds = [self.draw_seed(number, query) for query in range(self.num_queries)]
        mask = None
        if self.sparsity and self.shares is not None:
            place = {id(tensor): position for position, tensor in enumerate(self.tensors)}
            window = derive_seed(self.seed, "mask", self.steps // self.resample_every)
            mask = random_mask(tensors, [place[id(tensor)] for tensor in tensors], self.shares, window)
        return estimate(loss, tensors, seeds, self.eps, self.two_sided, mask, base, self._differentiate)

    def _differentiate(
        self, loss: Closure, direction: SeededDirection, eps: float, two_sided: bool, base: float | None
    ) -> Difference:
        if not self.exact_restore:
            return finite_difference(loss, direction, eps, two_sided, base)
        if self.model is None:
            return restoring_difference(loss, direction, eps, two_sided, base)
        return layerwise_difference(loss, self.model, direction, eps, two_sided, base)

    def _apply(self, found: Estimate, options: dict[Tensor, dict[str, Any]], scale: float = 1.0) -> None:
        apply(found, self.rule, options, self.state, self.sign == "coordinate", scale)

    def _conservative(
        self, loss: Closure, number: int, tensors: Sequence[Tensor], options: dict[Tensor, dict[str, Any]]
    ) -> None:
        still = float(loss())
        if not math.isfinite(still):
            raise NonFiniteLossError(f"the loss was {still}")
        found = self._estimate(loss, number, tensors, None if self.two_sided else still)
        copies = [tensor.detach().clone() for tensor in tensors] if self.exact_restore else None
        place = 0.0

        def move(to: float) -> None:
            nonlocal place
            if copies is not None:
                restore_(tensors, copies)
                place = 0.0
            if to != place:
                self._apply(found, options, to - place)
            place = to

        try:
            move(-1.0)
            opposite = float(loss())
            move(1.0)  # last, so that the usual winner is not reached by a sum of moves
            ahead = float(loss())
        except BaseException:
            move(0.0)
            raise
        losses = {1.0: ahead, -1.0: opposite, 0.0: still}  # ties go to the first
        best = min(losses, key=lambda one: math.inf if math.isnan(losses[one]) else losses[one])
        if best != place:
            move(best)
