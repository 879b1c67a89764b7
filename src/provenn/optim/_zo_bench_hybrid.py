"""HybridZO: back-propagation for the parameters near the output, values of the loss for the rest."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Self

import torch
from torch import Tensor

from provenn.core.experiment.checks import check_choice, check_integer
from provenn.core.numerics.gradient_free import LIMIT, Closure
from provenn.optim._zo_bench_zeroth_order import ZerothOrder


class HybridZO(torch.optim.Optimizer):
    """First-order steps for some parameters, zeroth-order steps for the others, both from the same weights and batch.

    Back-propagation stops at the first-order part, so that activations are stored for that part only::

        deep, head = list(model[0].parameters()), list(model[1].parameters())
        optimizer = HybridZO(deep, head, {"lr": 1e-5}, partial(torch.optim.SGD, lr=1e-2))
        optimizer.step(lambda: loss_fn(model(x), y))

    It is an optimizer itself: ``param_groups`` and ``state`` are those of the two parts, zeroth-order first, and
    schedulers work on it.

    Args:
        params_zo: Parameters, or groups of them, to step by the loss's values; may be none.
        params_fo: Those to step by gradients; may be none.
        zo_kwargs: Arguments of :class:`ZerothOrder` for the former.
        fo_optimizer: ``fo_optimizer(params_fo)`` builds the latter's optimizer; it must step without a closure.

    Shape:
        Parameters of any shape; the zeroth-order ones real and contiguous.

    Raises:
        ValueError: There is no parameter at all, one is in both parts, or an argument of a part is refused.
        RuntimeError: The loss was NaN or infinite in ten steps in a row; each such step is skipped and counted.

    Cost: a step is one forward pass with a backward pass through the first-order part, and a :class:`ZerothOrder` step
    of the rest.

    Source: arXiv 2402.11592, section 5, hybrid ZO and FO training.
    """

    def __init__(
        self,
        params_zo: Any,
        params_fo: Any,
        zo_kwargs: Mapping[str, Any],
        fo_optimizer: Callable[[Any], torch.optim.Optimizer],
    ) -> None:
        deep, head = list(params_zo), list(params_fo)
        if not deep and not head:
            raise ValueError("params_zo and params_fo must hold at least one parameter between them, got none")
        self.zo = ZerothOrder(deep, **zo_kwargs) if deep else None
        self.fo = fo_optimizer(head) if head else None
        both = set(map(id, _held(self.zo))) & set(map(id, _held(self.fo)))
        if both:
            raise ValueError(f"params_fo must share no parameter with params_zo, got {len(both)} that are in both")
        self.skipped = self._skipped_in_a_row = 0
        # Optimizer.__init__ would make parameter groups of its own; __setstate__ makes the rest, such as the hooks.
        self.__setstate__({})

    @classmethod
    def last_blocks(
        cls,
        blocks: Sequence[Sequence[Tensor]],
        last: int,
        zo_kwargs: Mapping[str, Any],
        fo_optimizer: Callable[[Any], torch.optim.Optimizer],
    ) -> Self:
        """Build one that back-propagates through the last blocks only.

        Args:
            blocks: Parameters from the input to the output, as :func:`parameter_blocks` makes them.
            last: K, from 0 (all zeroth-order) to all.
            zo_kwargs: As of the class.
            fo_optimizer: As of the class.

        Returns:
            The optimizer.

        Raises:
            ValueError: ``last`` < 0 or above the number of blocks.
        """
        check_integer("last", last, at_least=0, at_most=len(blocks))
        cut = len(blocks) - last
        deep, head = ([one for block in part for one in block] for part in (blocks[:cut], blocks[cut:]))
        return cls(deep, head, zo_kwargs, fo_optimizer)

    def __getstate__(self) -> dict[str, Any]:
        names = ("zo", "fo", "skipped", "_skipped_in_a_row")
        return {name: getattr(self, name) for name in names}

    @property
    def param_groups(self) -> list[dict[str, Any]]:  # type: ignore[override]
        """The groups of both parts, zeroth-order first."""
        return [group for part in self._parts() for group in part.param_groups]

    @property
    def state(self) -> Any:  # type: ignore[override]
        """The state of both parts."""
        return {tensor: kept for part in self._parts() for tensor, kept in part.state.items()}

    @property
    def defaults(self) -> dict[str, Any]:  # type: ignore[override]
        """The defaults of the first part that there is."""
        return self._parts()[0].defaults

    def _parts(self) -> list[torch.optim.Optimizer]:
        return [part for part in (self.zo, self.fo) if part is not None]

    def add_param_group(self, param_group: dict[str, Any], part: str = "zo") -> None:
        """Add a group of parameters to one of the parts.

        Args:
            param_group: Parameters and their options.
            part: ``"zo"`` or ``"fo"``, one that the optimizer has.

        Raises:
            ValueError: There is no such part.
        """
        parts = {name: one for name, one in (("zo", self.zo), ("fo", self.fo)) if one is not None}
        check_choice("part", part, parts)
        parts[part].add_param_group(param_group)

    def state_dict(self) -> dict[str, Any]:
        """Return the states of both parts, under ``"zo"`` and ``"fo"``, and the counts of skipped steps."""
        parts = {name: None if one is None else one.state_dict() for name, one in (("zo", self.zo), ("fo", self.fo))}
        return {**parts, "skipped": self.skipped, "skipped_in_a_row": self._skipped_in_a_row}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on where another one was, draws included.

        Args:
            state_dict: What :meth:`state_dict` returned.

        Raises:
            ValueError: It is of another kind of optimizer, or of one with other parts.
        """
        for name, one in (("zo", self.zo), ("fo", self.fo)):
            if name not in state_dict or (state_dict[name] is None) != (one is None):
                raise ValueError(f"state_dict must be of a HybridZO with the same parts, got {sorted(state_dict)}")
        for one, saved in ((self.zo, state_dict["zo"]), (self.fo, state_dict["fo"])):
            if one is not None:
                one.load_state_dict(saved)
        self.skipped, self._skipped_in_a_row = state_dict["skipped"], state_dict["skipped_in_a_row"]

    @torch.no_grad()
    def step(self, closure: Closure) -> Any:  # type: ignore[override]
        """Take one step of both parts from the same weights.

        Args:
            closure: Evaluates the loss on one batch, and returns it; called first with gradients enabled, when it may
                call ``backward``, then without.

        Returns:
            The loss of the first evaluation.

        Raises:
            RuntimeError: The loss was NaN or infinite in ten steps in a row.
        """
        loss, gradients = (None, []) if self.fo is None else self._differentiate(closure)
        void = loss is not None and not math.isfinite(float(loss))
        if self.zo is not None and not void:
            before = self.zo.skipped
            valued = self.zo.step(closure)
            loss, void = valued if loss is None else loss, self.zo.skipped > before
        if void:
            self.skipped += 1
            self._skipped_in_a_row += 1
            if self._skipped_in_a_row >= LIMIT:
                raise RuntimeError(f"{LIMIT} steps in a row were skipped, the last at the loss {float(loss or 0)}")
            return loss
        self._skipped_in_a_row = 0
        if self.fo is not None:
            for one, gradient in zip(_held(self.fo), gradients, strict=True):
                one.grad = gradient  # the closure may have cleared it since
            self.fo.step()
        return loss

    def _differentiate(self, closure: Closure) -> tuple[Tensor, list[Tensor | None]]:
        """Return loss and gradients of the first-order part, without a graph through the other part."""
        head = _held(self.fo)
        for one in head:
            one.grad = None
        with torch.enable_grad(), _frozen(_held(self.zo)):
            loss = closure()
            if not isinstance(loss, Tensor):
                raise TypeError(f"closure must return a tensor where a part is first-order, got {loss!r}")
            gradients = [one.grad for one in head]
            if loss.requires_grad and all(one is None for one in gradients):
                gradients = list(torch.autograd.grad(loss, head, allow_unused=True))
        return loss.detach(), gradients


def _held(part: torch.optim.Optimizer | None) -> list[Tensor]:
    return [] if part is None else [tensor for group in part.param_groups for tensor in group["params"]]


@contextmanager
def _frozen(tensors: Iterable[Tensor]) -> Iterator[None]:
    """Keep tensors out of the graph, and put their flags back."""
    flags = [(tensor, tensor.requires_grad) for tensor in tensors]
    try:
        for tensor, _ in flags:
            tensor.requires_grad_(False)
        yield
    finally:
        for tensor, flag in flags:
            tensor.requires_grad_(flag)
