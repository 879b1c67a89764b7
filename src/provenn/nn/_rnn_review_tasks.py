"""Tasks that ask for memory: samplers of sequences with what is to be said of them, and when.

Source: the survey, arXiv 1506.00019, and what the parts name.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from provenn.core.experiment.checks import check_integer


class SequenceTask(NamedTuple):
    """A batch of a task.

    Args:
        inputs: (n, steps, features).
        targets: Classes (n, steps), or numbers (n, steps, outputs).
        mask: Where there is an input, (n, steps).
        target_mask: Where an output is asked for, (n, steps).
    """

    inputs: Tensor
    targets: Tensor
    mask: Tensor
    target_mask: Tensor


def adding(n: int, T: int, generator: torch.Generator | None = None) -> SequenceTask:
    """Draw sequences of numbers of which two are marked, one in each half; at the end their sum is asked for.

    Args:
        n: Sequences.
        T: Steps, at least 2.
        generator: Draws; ``None`` for torch's global one.

    Shape: inputs (n, T, 2): a number in [0, 1) and the mark; targets (n, T, 1), asked for at the last step.

    Returns:
        The batch.

    Raises:
        ValueError: ``n`` < 0 or ``T`` < 2.
        TypeError: ``n`` or ``T`` is no integer.

    Cost: O(n T).

    Source: Hochreiter & Schmidhuber (1997), experiment 4; one mark a half as in Arjovsky et al., arXiv 1511.06464.
    """
    _check(n, T, 2)
    device = _device(generator)
    values = torch.rand(n, T, generator=generator, device=device)
    marks = torch.zeros_like(values)
    half = T // 2
    first = torch.randint(half, (n, 1), generator=generator, device=device)
    second = torch.randint(half, T, (n, 1), generator=generator, device=device)
    marks.scatter_(1, first, 1).scatter_(1, second, 1)
    sums = (values * marks).sum(1)
    targets = torch.zeros(n, T, 1, device=device)
    targets[:, -1, 0] = sums
    return SequenceTask(torch.stack((values, marks), dim=-1), targets, *_at_the_end(n, T, device))


def copy(n: int, T: int, generator: torch.Generator | None = None, *, bits: int = 8) -> SequenceTask:
    """Draw sequences of random bits; after a delimiter they are to be said again.

    Args:
        n: Sequences.
        T: Items in a sequence.
        generator: Draws; ``None`` for torch's global one.
        bits: Bits of an item.

    Shape: inputs (n, 2T + 1, bits + 1): T items, the delimiter on the last channel, T steps of silence; targets
        (n, 2T + 1, bits), asked for in the silence.

    Returns:
        The batch.

    Raises:
        ValueError: ``n`` < 0, ``T`` < 1 or ``bits`` < 1.
        TypeError: One of them is no integer.

    Cost: O(n T bits).

    Source: Graves et al., arXiv 1410.5401, section 4.1.
    """
    _check(n, T, 1)
    check_integer("bits", bits, at_least=1)
    device = _device(generator)
    items = torch.randint(2, (n, T, bits), generator=generator, device=device).float()
    inputs = torch.zeros(n, 2 * T + 1, bits + 1, device=device)
    inputs[:, :T, :bits] = items
    inputs[:, T, bits] = 1
    targets = torch.zeros(n, 2 * T + 1, bits, device=device)
    targets[:, T + 1 :] = items
    mask, asked = _at_the_end(n, 2 * T + 1, device)
    asked[:, T + 1 :] = True
    return SequenceTask(inputs, targets, mask, asked)


def temporal_order(n: int, T: int, generator: torch.Generator | None = None) -> SequenceTask:
    """Draw sequences of distractors with an X or Y early and another later; at the end their order is asked for.

    The first stands in [T/10, 2T/10), the second in [4T/10, 5T/10). The classes 0 … 3 are XX, XY, YX, YY.

    Args:
        n: Sequences.
        T: Steps, at least 10.
        generator: Draws; ``None`` for torch's global one.

    Shape: inputs (n, T, 8): one of E (first), B (last), a, b, c, d, X, Y; targets (n, T) int64, asked for at the last
        step.

    Returns:
        The batch.

    Raises:
        ValueError: ``n`` < 0 or ``T`` < 10.
        TypeError: ``n`` or ``T`` is no integer.

    Cost: O(n T).

    Source: Hochreiter & Schmidhuber (1997), experiment 6a, with places relative to T as in Pascanu et al.
    """
    _check(n, T, 10)
    device = _device(generator)
    symbols = torch.randint(2, 6, (n, T), generator=generator, device=device)
    symbols[:, 0], symbols[:, -1] = 0, 1
    signs = torch.randint(2, (n, 2), generator=generator, device=device)
    for place, (low, high) in enumerate(((T // 10, 2 * T // 10), (4 * T // 10, 5 * T // 10))):
        at = torch.randint(low, high, (n, 1), generator=generator, device=device)
        symbols.scatter_(1, at, signs[:, place : place + 1] + 6)
    targets = torch.zeros(n, T, dtype=torch.int64, device=device)
    targets[:, -1] = 2 * signs[:, 0] + signs[:, 1]
    return SequenceTask(torch.nn.functional.one_hot(symbols, 8).float(), targets, *_at_the_end(n, T, device))


def delayed_xor(n: int, T: int, generator: torch.Generator | None = None) -> SequenceTask:
    """Draw two bits, then silence; at the last step, T − 2 after the second bit, their exclusive or is asked for.

    Args:
        n: Sequences.
        T: Steps, at least 3.
        generator: Draws; ``None`` for torch's global one.

    Shape: inputs (n, T, 2): the bits as ±1 at the first two steps, and a 1 at the last; targets (n, T) int64, asked for
        at the last step.

    Returns:
        The batch.

    Raises:
        ValueError: ``n`` < 0 or ``T`` < 3.
        TypeError: ``n`` or ``T`` is no integer.

    Cost: O(n T).

    Source: the delayed exclusive or of Williams & Zipser (1989), with a delay of any length.
    """
    _check(n, T, 3)
    device = _device(generator)
    bits = torch.randint(2, (n, 2), generator=generator, device=device)
    inputs = torch.zeros(n, T, 2, device=device)
    inputs[:, :2, 0] = 2 * bits.float() - 1
    inputs[:, -1, 1] = 1
    targets = torch.zeros(n, T, dtype=torch.int64, device=device)
    targets[:, -1] = bits[:, 0] ^ bits[:, 1]
    return SequenceTask(inputs, targets, *_at_the_end(n, T, device))


SYMBOLS = "BTSXPVE"
# Reber's grammar: from a state, by symbol, to the next.
_REBER = (
    {"B": 1}, {"T": 2, "P": 3}, {"S": 2, "X": 4}, {"T": 3, "V": 5}, {"X": 3, "S": 6}, {"P": 4, "V": 6}, {"E": 7},
)  # fmt: skip
_DONE = 2 + 2 * 9


def _embedded() -> list[dict[str, int]]:
    """Return the grammar between two equal symbols: B (T or P), a string of Reber's, the same T or P, E."""
    states: list[dict[str, int]] = [{"B": 1}, {"T": 2, "P": 11}]
    for base, same in ((2, "T"), (11, "P")):
        states += [{symbol: base + to for symbol, to in arcs.items()} for arcs in _REBER]
        states += [{same: base + 8}, {"E": _DONE}]
    return [*states, {"E": _DONE}]


def embedded_reber(n: int, T: int, generator: torch.Generator | None = None) -> SequenceTask:
    """Draw strings of the embedded Reber grammar of at most T symbols; at each the possible next ones are asked for.

    The last but one symbol repeats the second, across a string of any length. Where the grammar goes two ways, each has
    a probability of a half; longer strings are drawn again.

    Args:
        n: Sequences.
        T: Steps, at least 9, the length of the shortest string.
        generator: Draws; ``None`` for torch's global one.

    Shape: inputs (n, T, 7): B, T, S, X, P, V, E, with zeros after the end; targets (n, T, 7): 1 for each symbol that
        may follow, asked for at every symbol but the last.

    Returns:
        The batch; ``mask`` says where a string ends.

    Raises:
        ValueError: ``n`` < 0 or ``T`` < 9.
        TypeError: ``n`` or ``T`` is no integer.

    Cost: O(n T), times the share of strings that are too long.

    Source: Hochreiter & Schmidhuber (1997), experiment 1.
    """
    _check(n, T, 9)
    device = _device(generator)
    table = [[(SYMBOLS.index(symbol), to) for symbol, to in arcs.items()] for arcs in _embedded()]
    arcs = torch.tensor([row if len(row) == 2 else row * 2 for row in table], device=device)  # (states, 2, 2)
    possible = torch.zeros(len(table), len(SYMBOLS), device=device)
    possible.scatter_(1, arcs[:, :, 0], 1)
    found: list[Tensor] = []
    while sum(map(len, found)) < n or not found:
        state = torch.zeros(n, dtype=torch.int64, device=device)
        ways = torch.randint(2, (n, T), generator=generator, device=device)
        path = []
        for way in ways.unbind(1):
            symbol, after = arcs[state, way].unbind(-1)
            path.append(torch.stack((symbol, after, state), dim=-1))
            state = after
        found.append(torch.stack(path, dim=1)[state == _DONE])
    symbols, after, before = torch.cat(found)[:n].unbind(-1)
    mask = before != _DONE
    asked = mask & (after != _DONE)
    inputs = torch.nn.functional.one_hot(symbols, len(SYMBOLS)).float() * mask.unsqueeze(-1)
    return SequenceTask(inputs, possible[after] * asked.unsqueeze(-1), mask, asked)


def _check(n: int, T: int, least: int) -> None:
    check_integer("n", n, at_least=0)
    check_integer("T", T, at_least=least)


def _device(generator: torch.Generator | None) -> torch.device:
    return torch.device("cpu") if generator is None else generator.device


def _at_the_end(n: int, T: int, device: torch.device) -> tuple[Tensor, Tensor]:
    asked = torch.zeros(n, T, dtype=torch.bool, device=device)
    asked[:, -1] = True
    return torch.ones_like(asked), asked
