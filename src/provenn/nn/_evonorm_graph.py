"""The space of layers that the search walks: graphs of elementary operations on tensors."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import product
from typing import TYPE_CHECKING, Any

import torch

from provenn.core.experiment.checks import check_choice, check_integer

if TYPE_CHECKING:
    from provenn.nn._evonorm_graph_layer import NormActLayer

INPUTS = ("x", "0", "v0", "v1")
"""The first nodes of every graph: the input, zero, and two vectors over the channels that start at 0 and at 1."""
BINARY = ("add", "mul", "div", "max")
UNARY = ("neg", "sigmoid", "tanh", "exp", "log", "abs", "square", "sqrt")
MOMENTS = ("mean", "rms", "std")
AXES = ("bwh", "wh", "whc", "whcg")
AGGREGATIONS = tuple(f"{moment}_{axes}" for moment, axes in product(MOMENTS, AXES))
OPERATIONS = (*BINARY, *UNARY, *AGGREGATIONS)
_COMMUTES = ("add", "mul", "max")
_FORMULAS: Mapping[str, str] = {
    "add": "({} + {})", "mul": "({} · {})", "div": "({} / {})", "max": "max({}, {})",
    "neg": "(−{})", "sigmoid": "σ({})", "square": "{}²",
    "log": "slog({})", "sqrt": "ssqrt({})",
}  # fmt: skip


Node = tuple[str, tuple[int, ...]]
"""An operation, and the indices of the nodes that it takes."""


@dataclass(frozen=True)
class NormActSpace:
    """The graphs that may be proposed: how many nodes, and which operations.

    Args:
        series: ``"B"`` takes all 24 operations, ``"S"`` leaves out the aggregations over the batch.
        nodes: Nodes of a random graph beside the four inputs.

    Raises:
        ValueError: An unknown series, or ``nodes`` < 1.
        TypeError: ``nodes`` is not an integer.

    Source: arXiv 2004.02967, on the search space, table of primitives.
    """

    series: str = "B"
    nodes: int = 10

    def __post_init__(self) -> None:
        check_choice("series", self.series, ("B", "S"))
        check_integer("nodes", self.nodes, at_least=1)

    @property
    def operations(self) -> tuple[str, ...]:
        """The names of the operations."""
        return tuple(op for op in OPERATIONS if self.series == "B" or not op.endswith("_bwh"))

    def __contains__(self, graph: object) -> bool:
        """Return whether a graph is of this space: its operations are, and its nodes are no more."""
        if not isinstance(graph, NormActGraph) or len(graph.nodes) > self.nodes:
            return False
        allowed = set(self.operations)
        return all(op in allowed for op, _ in graph.nodes)


@dataclass(frozen=True)
class NormActGraph:
    """A layer as a graph without cycles over x, 0, v₀ and v₁; its last node, times γ plus β, is the output.

    v₀ and v₁ are vectors over the channels that are trained, from 0 and from 1. The operations are addition, product,
    quotient and maximum; −, σ, tanh, exp, ``log`` = sign(x) ln |x|, ``abs``, ``square`` and ``sqrt`` = sign(x) √|x|;
    and ``mean``, ``rms`` = √(μ(x²) + ε) and ``std`` = √(s² + ε), each over batch and pixels (``_bwh``), pixels
    (``_wh``), pixels and channels (``_whc``), or pixels and the channels of a group (``_whcg``). All shapes broadcast.

    Args:
        nodes: Pairs of an operation and the indices of what it takes: 0 to 3 are the inputs, 4 is the first node.

    Raises:
        ValueError: There are no nodes, an operation is unknown, has the wrong number of inputs, or takes a node that
            is not before it.

    Source: arXiv 2004.02967, on the search space.
    """

    nodes: tuple[Node, ...]

    def __post_init__(self) -> None:
        made = tuple((op, tuple(inputs)) for op, inputs in self.nodes)
        if not made:
            raise ValueError("nodes must hold one operation or more, got none")
        for place, (op, inputs) in enumerate(made, len(INPUTS)):
            if op not in OPERATIONS:
                raise ValueError(f"nodes must name known operations, got {op!r}")
            if len(inputs) != arity(op):
                raise ValueError(f"nodes must give {op} {arity(op)} inputs, got {inputs}")
            if not all(0 <= index < place for index in inputs):
                raise ValueError(f"nodes must take earlier nodes, below {place}, got {inputs}")
        object.__setattr__(self, "nodes", made)

    @classmethod
    def named(cls, name: str) -> NormActGraph:
        """Return the graph of a known layer.

        Args:
            name: ``"BN-ReLU"``, ``"SiLU"``, or a kind of :class:`EvoNorm2d`, ``"B0"`` to ``"S2"``.

        Raises:
            ValueError: It is unknown.
        """
        check_choice("name", name, _KNOWN)
        return cls(_KNOWN[name])

    @classmethod
    def random(cls, space: NormActSpace, generator: torch.Generator) -> NormActGraph:
        """Draw a graph: for every node an operation and what it takes, uniformly.

        Args:
            space: Nodes and operations.
            generator: Source of the draws.
        """
        places = range(len(INPUTS), len(INPUTS) + space.nodes)
        return cls(tuple(_draw(space, place, generator) for place in places))

    def mutate(self, space: NormActSpace, generator: torch.Generator) -> NormActGraph:
        """Return a copy in which one node, drawn uniformly, has its operation and what it takes drawn anew.

        Args:
            space: The operations.
            generator: Source of the draws.
        """
        picked = _below(len(self.nodes), generator)
        nodes = list(self.nodes)
        nodes[picked] = _draw(space, len(INPUTS) + picked, generator)
        return NormActGraph(tuple(nodes))

    @property
    def used(self) -> frozenset[int]:
        """The indices of the nodes, inputs included, that the output depends on."""
        found = {len(INPUTS) + len(self.nodes) - 1}
        for place in range(len(INPUTS) + len(self.nodes) - 1, len(INPUTS) - 1, -1):
            if place in found:
                found.update(self.nodes[place - len(INPUTS)][1])
        return frozenset(found)

    def hash(self) -> str:
        """Return a digest of the function: nodes that are not used, and the order in sums, do not enter."""
        return _folded(self, _digest)

    def to_formula(self) -> str:
        """Return the function as text, with γ and β; shared nodes are written out wherever they are used."""
        body = _folded(self, _formula)
        is_product = self.nodes[-1][0] in ("mul", "div")
        return f"{body[1:-1] if is_product else body} · γ + β"

    def to_module(self, num_features: int, **options: Any) -> NormActLayer:
        """Return the graph as a layer.

        Args:
            num_features: Channels.
            **options: As in :class:`NormActLayer`.
        """
        from provenn.nn._evonorm_graph_layer import NormActLayer  # which needs this module

        return NormActLayer(self, num_features, **options)


def arity(op: str) -> int:
    """Return how many tensors an operation takes."""
    return 2 if op in BINARY else 1


def _draw(space: NormActSpace, place: int, generator: torch.Generator) -> Node:
    op = space.operations[_below(len(space.operations), generator)]
    return op, tuple(_below(place, generator) for _ in range(arity(op)))


def _below(bound: int, generator: torch.Generator) -> int:
    return int(torch.randint(bound, (), generator=generator, device=generator.device))


def _folded(graph: NormActGraph, write: Any) -> str:
    """Write every used node in terms of what was written of its inputs; return the output's."""
    written = dict(enumerate(INPUTS))
    used = graph.used
    for place, (op, inputs) in enumerate(graph.nodes, len(INPUTS)):
        if place in used:
            written[place] = write(op, [written[index] for index in inputs])
    return written[len(INPUTS) + len(graph.nodes) - 1]


def _digest(op: str, inputs: list[str]) -> str:
    parts = sorted(inputs) if op in _COMMUTES else inputs
    return hashlib.sha256("\x1f".join([op, *parts]).encode()).hexdigest()[:16]


def _formula(op: str, inputs: list[str]) -> str:
    return _FORMULAS.get(op, op + "({})").format(*inputs)


_KNOWN: Mapping[str, tuple[Node, ...]] = {
    "SiLU": (("sigmoid", (0,)), ("mul", (0, 4))),
    # batch norm's own scale and shift come before the maximum: v1 and v0 stand for them
    "BN-ReLU": (
        ("mean_bwh", (0,)), ("neg", (4,)), ("add", (0, 5)), ("std_bwh", (0,)), ("div", (6, 7)),
        ("mul", (8, 3)), ("add", (9, 2)), ("max", (10, 1)),
    ),
    "B0": (
        ("std_bwh", (0,)), ("std_wh", (0,)), ("mul", (3, 0)), ("add", (6, 5)), ("max", (4, 7)), ("div", (0, 8)),
    ),
    # 1 is exp(0)
    "B1": (
        ("std_bwh", (0,)), ("rms_wh", (0,)), ("exp", (1,)), ("add", (0, 6)), ("mul", (7, 5)), ("max", (4, 8)),
        ("div", (0, 9)),
    ),
    "B2": (
        ("std_bwh", (0,)), ("rms_wh", (0,)), ("neg", (0,)), ("add", (5, 6)), ("max", (4, 7)), ("div", (0, 8)),
    ),
    "S0": (("mul", (3, 0)), ("sigmoid", (4,)), ("mul", (0, 5)), ("std_whcg", (0,)), ("div", (6, 7))),
    "S1": (("sigmoid", (0,)), ("mul", (0, 4)), ("std_whcg", (0,)), ("div", (5, 6))),
    "S2": (("sigmoid", (0,)), ("mul", (0, 4)), ("rms_whcg", (0,)), ("div", (5, 6))),
}  # fmt: skip
