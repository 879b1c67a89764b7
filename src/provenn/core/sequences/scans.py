"""Linear recurrences along one axis, evaluated in parallel: h_t = a_t h_{t−1} + x_t, with numbers or matrices as gates.

Three ways to the same numbers: step by step, in chunks of about √T steps that advance together, and as an associative
scan of logarithmic depth. The derivative is again such a recurrence, run backwards, so that no way keeps more than its
inputs and its outputs for the backward pass.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal, no_type_check

import torch
from jaxtyping import Shaped
from torch import Tensor
from torch.nn import functional as F

Method = Literal["auto", "sequential", "chunked", "associative"]
Elements = tuple[Tensor, ...]

_METHODS = ("auto", "sequential", "chunked", "associative")
_LONG = 48
"""From about this length on, chunks beat the loop inside the function on the CPU that it was measured on."""
_WIDE = 512
"""And up to about so many numbers a step: beyond them calls cost little, and chunks go through memory more often."""


def associative_scan(combine: Callable[[Elements, Elements], Elements], elements: Elements, dim: int = 0) -> Elements:
    """Combine all prefixes of a sequence: y_t = x_1 ∘ x_2 ∘ … ∘ x_t, in 2 log₂ T rounds.

    Args:
        combine: (earlier, later) ↦ earlier ∘ later, an associative map of two tuples of tensors to one, applied to many
            pairs at once along ``dim``.
        elements: The sequence: tensors of one length T ≥ 1 along ``dim``.
        dim: The axis of time, counted from the front.

    Shape:
        Each tensor of the result is shaped as its element.

    Returns:
        The prefixes; y_1 is x_1 itself.

    Raises:
        ValueError: The tensors' lengths differ, or ``dim`` < 0.

    Cost: under 2T calls' worth of ``combine`` in 2 log₂ T calls; differentiable, with O(T) memory.

    Source: Blelloch, "Prefix sums and their applications", CMU-CS-90-190 (1990).
    """
    if dim < 0:
        raise ValueError(f"dim must be counted from the front, got {dim}")
    lengths = {one.shape[dim] for one in elements}
    if len(lengths) != 1:
        raise ValueError(f"elements must share one length along dimension {dim}, got {sorted(lengths)}")
    length = lengths.pop()
    if length < 2:
        return elements
    # Pairs are combined, their prefixes found by recursion; those are the odd places, and one step from the even ones.
    left = tuple(one.narrow(dim, 0, length - length % 2)[_every_other(dim, 0)] for one in elements)
    right = tuple(one[_every_other(dim, 1)] for one in elements)
    odd = associative_scan(combine, combine(left, right), dim)
    first = tuple(one.narrow(dim, 0, 1) for one in elements)
    if length == 2:
        even = first
    else:
        count = (length + 1) // 2 - 1
        later = tuple(one[_every_other(dim, 2)] for one in elements)
        rest = combine(tuple(one.narrow(dim, 0, count) for one in odd), later)
        even = tuple(torch.cat(pair, dim) for pair in zip(first, rest, strict=True))
    return tuple(_interleave(one, other, dim) for one, other in zip(even, odd, strict=True))


def _every_other(dim: int, start: int) -> tuple[slice, ...]:
    return (slice(None),) * dim + (slice(start, None, 2),)


def _interleave(even: Tensor, odd: Tensor, dim: int) -> Tensor:
    """Merge x_0, x_2, … and x_1, x_3, …; there may be one even element more."""
    count = odd.shape[dim]
    woven = torch.stack((even.narrow(dim, 0, count), odd), dim + 1).flatten(dim, dim + 1)
    return woven if even.shape[dim] == count else torch.cat((woven, even.narrow(dim, count, 1)), dim)


def linear_recurrence(
    gates: Shaped[Tensor, "..."],
    inputs: Shaped[Tensor, "..."],
    initial: Shaped[Tensor, "..."] | None = None,
    *,
    dim: int = 1,
    method: Method = "auto",
) -> Shaped[Tensor, "..."]:
    """Solve h_t = a_t ⊙ h_{t−1} + x_t for all t at once.

    Args:
        gates: a, real or complex; any size, also above 1. Chunks and the scan multiply gates with each other: where the
            product of a stretch of them leaves the type's range, they give NaN or infinity even if the states step by
            step would not.
        inputs: x.
        initial: h_0; zero without it.
        dim: The axis of time.
        method: ``"sequential"``, ``"chunked"``, ``"associative"``, or ``"auto"``: the first for short sequences, and on
            a CPU for wide steps, chunks for others. All agree to rounding.

    Shape:
        ``inputs`` (…, time, …); ``gates`` has as many dimensions and broadcasts against it, but for time, where both
        have T; ``initial`` broadcasts against ``inputs`` without time. The result is shaped as the broadcast.

    Returns:
        h_1 … h_T.

    Raises:
        ValueError: The shapes do not fit, or there is no such method.

    Cost: O(T) work; T, 2√T or 2 log₂ T rounds. Keeps gates and results for the backward pass, which is one more
    recurrence. Differentiable twice and more, in reverse mode; works under torch.func.vmap.

    Source: Blelloch (1990); Martin and Cundy, "Parallelizing linear recurrent neural nets over sequence length" (2018).
    """
    if gates.ndim != inputs.ndim or not -inputs.ndim <= dim < inputs.ndim:
        raise ValueError(
            f"gates and inputs must have equally many dimensions, {dim} among them, got {tuple(gates.shape)} and "
            f"{tuple(inputs.shape)}"
        )
    return _solve(gates.movedim(dim, 0), inputs.movedim(dim, 0), initial, method, matrices=False).movedim(0, dim)


def matrix_recurrence(
    gates: Shaped[Tensor, "... time n n"],
    inputs: Shaped[Tensor, "... time n m"],
    initial: Shaped[Tensor, "... n m"] | None = None,
    *,
    method: Method = "auto",
) -> Shaped[Tensor, "... time n m"]:
    """Solve H_t = A_t H_{t−1} + X_t for all t at once, with matrices as gates.

    Args:
        gates: A.
        inputs: X; for vectors, m = 1.
        initial: H_0; zero without it.
        method: As for :func:`linear_recurrence`.

    Shape:
        As in the annotations; leading dimensions broadcast.

    Returns:
        H_1 … H_T.

    Raises:
        ValueError: The shapes do not fit, or there is no such method.

    Cost: step by step T products of n × n with n × m; the others add O(T) products of n × n with n × n, which pays
    where n is small and T large. Keeps gates and results for the backward pass. Differentiable twice and more.

    Source: as :func:`linear_recurrence`.
    """
    if min(gates.ndim, inputs.ndim) < 3 or gates.shape[-1] != gates.shape[-2] or gates.shape[-1] != inputs.shape[-2]:
        raise ValueError(
            f"gates must be (…, time, n, n) and inputs (…, time, n, m), got {tuple(gates.shape)} and "
            f"{tuple(inputs.shape)}"
        )
    deep = max(gates.ndim, inputs.ndim, 0 if initial is None else initial.ndim + 1)
    a = gates[(None,) * (deep - gates.ndim)].movedim(-3, 0)
    x = inputs[(None,) * (deep - inputs.ndim)].movedim(-3, 0)
    return _solve(a, x, initial, method, matrices=True).movedim(0, -3)


def _solve(gates: Tensor, inputs: Tensor, initial: Tensor | None, method: str, matrices: bool) -> Tensor:
    """Solve with time first: check, and bring all to one type and the inputs and the start to their full shapes."""
    if method not in _METHODS:
        raise ValueError(f"method must be one of {', '.join(_METHODS)}, got {method!r}")
    if gates.shape[0] != inputs.shape[0]:
        raise ValueError(f"gates and inputs must be equally long, got {gates.shape[0]} and {inputs.shape[0]} steps")
    tail = 2 if matrices else 0
    dtype = torch.promote_types(gates.dtype, inputs.dtype)
    if initial is None:
        initial = inputs.new_zeros((), dtype=dtype)
    elif initial.is_complex():
        dtype = torch.promote_types(dtype, initial.dtype)
    leads = (one[: max(0, len(one) - tail)] for one in (gates.shape[1:], inputs.shape[1:], initial.shape))
    try:
        shape = torch.broadcast_shapes(*leads) + inputs.shape[inputs.ndim - tail :]
        start, x = initial.to(dtype).expand(shape), inputs.to(dtype).expand(-1, *shape)
    except RuntimeError:
        raise ValueError(
            f"initial must fit what gates and inputs broadcast to without time, and those each other, got "
            f"{tuple(initial.shape)}, and with time first {tuple(gates.shape)} and {tuple(inputs.shape)}"
        ) from None
    if method == "auto":
        # A traced program keeps one method for all batches, so that a width must not decide there.
        looks = inputs.device.type == "cpu" and not torch.compiler.is_compiling()
        wide = looks and max(gates.shape[1:].numel(), math.prod(shape)) > _WIDE
        method = "sequential" if wide or len(inputs) < _LONG else "chunked"
    if len(inputs) == 0:
        return x
    solved: Tensor = _Recurrence.apply(gates.to(dtype), x, start, method, matrices)  # type: ignore[no-untyped-call]
    return solved


@no_type_check  # a signature check inside would break the graph that torch.compile traces
class _Recurrence(torch.autograd.Function):
    """The recurrence with time first; its derivative is the same recurrence on the adjoint gates, backwards."""

    @staticmethod
    def forward(gates: Tensor, inputs: Tensor, initial: Tensor, method: str, matrices: bool) -> Tensor:
        if method == "sequential":
            return _sequential(gates, inputs, initial, matrices)
        solve = _chunked if method == "chunked" else _associative
        return solve(gates, inputs, initial, matrices)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        gates, _, initial, ctx.method, ctx.matrices = inputs
        ctx.save_for_backward(gates, initial, output)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        gates, initial, output = ctx.saved_tensors
        adjoint = gates.mH if ctx.matrices else gates.conj()
        # λ_t = g_t + a*_{t+1} λ_{t+1}: backwards in time, the gate of step t is that of t + 1, and the last has none.
        shifted = torch.cat((torch.zeros_like(adjoint[:1]), adjoint[1:].flip(0)))
        costate = _Recurrence.apply(shifted, grad.flip(0), torch.zeros_like(initial), ctx.method, ctx.matrices).flip(0)  # type: ignore[no-untyped-call]
        before = torch.cat((initial[None], output[:-1]))
        grad_gates = costate @ before.mH if ctx.matrices else costate * before.conj()
        first = adjoint[0] @ costate[0] if ctx.matrices else adjoint[0] * costate[0]
        return grad_gates.sum_to_size(gates.shape), costate, first, None, None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *arguments: Any) -> tuple[Tensor, int]:
        (gates, inputs, initial), options = arguments[:3], arguments[3:]
        # What is mapped comes behind time, and where a step has fewer dimensions than another's, ones behind that.
        gates, inputs, initial = (
            one.unsqueeze(place) if dim is None else one.movedim(dim, place)
            for one, dim, place in zip((gates, inputs, initial), in_dims, (1, 1, 0), strict=False)
        )
        gates = gates[(slice(None), slice(None), *(None,) * (inputs.ndim - gates.ndim))]
        sizes = (info.batch_size, *inputs.shape[2:])
        solved: Tensor = _Recurrence.apply(gates, inputs.expand(-1, *sizes), initial.expand(sizes), *options)  # type: ignore[no-untyped-call]
        return solved, 1


def _sequential(gates: Tensor, inputs: Tensor, state: Tensor, matrices: bool) -> Tensor:
    states = inputs.clone()
    for a, step in zip(gates.unbind(0), states.unbind(0), strict=True):
        state = step.add_(a @ state) if matrices else step.addcmul_(a, state)
    return states


def _chunked(gates: Tensor, inputs: Tensor, initial: Tensor, matrices: bool) -> Tensor:
    """Advance all chunks together from zero, then carry the ends from chunk to chunk."""
    length = len(inputs)
    size = math.isqrt(length - 1) + 1
    chunks = -(-length // size)
    missing = chunks * size - length
    a = F.pad(gates, (0, 0) * (gates.ndim - 1) + (0, missing)).unflatten(0, (chunks, size)).movedim(1, 0).contiguous()
    x = F.pad(inputs, (0, 0) * (inputs.ndim - 1) + (0, missing)).unflatten(0, (chunks, size)).movedim(1, 0)
    local, product = [x[0]], [a[0]]
    for step in range(1, size):
        if matrices:
            local.append(a[step] @ local[-1] + x[step])
            product.append(a[step] @ product[-1])
        else:
            local.append(torch.addcmul(x[step], a[step], local[-1]))
    states = torch.stack(local)
    products = torch.stack(product) if matrices else a.cumprod(0)
    begin = [initial]
    for chunk in range(chunks - 1):
        a_last, x_last = products[-1, chunk], states[-1, chunk]
        begin.append(a_last @ begin[-1] + x_last if matrices else torch.addcmul(x_last, a_last, begin[-1]))
    carry = torch.stack(begin)
    whole = products @ carry + states if matrices else torch.addcmul(states, products, carry)
    return whole.movedim(0, 1).flatten(0, 1)[:length]


def _associative(gates: Tensor, inputs: Tensor, initial: Tensor, matrices: bool) -> Tensor:
    first = gates[:1] @ initial[None] if matrices else gates[:1] * initial[None]
    x = torch.cat((inputs[:1] + first, inputs[1:]))
    return associative_scan(_compose_matrices if matrices else _compose, (gates, x))[1]


def _compose(earlier: Elements, later: Elements) -> Elements:
    (a, x), (b, y) = earlier, later
    return a * b, torch.addcmul(y, b, x)


def _compose_matrices(earlier: Elements, later: Elements) -> Elements:
    (a, x), (b, y) = earlier, later
    return b @ a, b @ x + y
