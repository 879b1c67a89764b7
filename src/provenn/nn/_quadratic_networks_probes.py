"""What networks of quadratic neurons can express: polynomial pieces on a line, and the dimension of what is reached."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from provenn.core.experiment.checks import check_integer
from provenn.core.experiment.reports import Report
from provenn.nn._quadratic_networks_layers import QuadraticLinear

if TYPE_CHECKING:
    from matplotlib.figure import Figure

NARROWEST = 1e-7
"""Pieces narrower than this share of the line are not told apart: rounding splits a root that only touches in two."""


@dataclass(frozen=True)
class PolynomialPieces(Report):
    """The pieces of a piecewise polynomial network on a line from a start (t = 0) to an end (t = 1).

    Args:
        pieces: Number of stretches in which no ReLU switches; the network is one polynomial of t on each.
        breakpoints: The t in (0, 1) at which they meet, ascending; one fewer than pieces.
        degree: The largest degree that the pieces can have: 2^L with L quadratic layers, 1 without.
    """

    pieces: int
    breakpoints: tuple[float, ...]
    degree: int

    def plot(self) -> Figure:
        """Draw the pieces between their breakpoints."""
        from matplotlib.figure import Figure

        figure = Figure(figsize=(6, 2), layout="constrained")
        axes = figure.subplots()
        axes.vlines((0.0, *self.breakpoints, 1.0), 0, 1)
        axes.set(xlabel="place on the line", yticks=[], title=f"{self.pieces} pieces of degree ≤ {self.degree}")
        return figure


@torch.no_grad()
def polynomial_pieces(
    model: nn.Module, start: Float[Tensor, " features"], end: Float[Tensor, " features"]
) -> PolynomialPieces:
    """Count the polynomial pieces of a network on the line from one point to another.

    Layer by layer: between the breakpoints so far every neuron is a polynomial of known degree, read off at Chebyshev
    nodes in float64; its real roots are the next breakpoints. Those at which no neuron switches in the end are dropped,
    and pieces narrower than 1e-7 of the line merge with a neighbour.

    Args:
        model: ``nn.Sequential``, nested if need be, of ``nn.Linear``, :class:`QuadraticLinear`, ``nn.ReLU`` and
            ``nn.Identity``. Left as it is.
        start: Where the line begins, t = 0.
        end: Where it ends, t = 1.

    Shape:
        start and end (features,).

    Returns:
        The pieces and their breakpoints.

    Raises:
        TypeError: ``model`` has another kind of layer, or a point is not floating-point.
        ValueError: ``start`` and ``end`` differ in shape, are equal, or do not fit the model.

    Cost: for each ReLU one pass of pieces × (degree + 1) points through the layers before it, and the eigenvalues of
    pieces × neurons matrices of size degree.

    Source: section III of https://arxiv.org/abs/2110.06081, networks as splines.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    layers = _flat(copy.deepcopy(model).double().eval(), "")
    for name, point in (("start", start), ("end", end)):
        if not point.is_floating_point():
            raise TypeError(f"{name} must be floating-point, got {point.dtype}")
    first = next((layer for layer in layers if isinstance(layer, (nn.Linear, QuadraticLinear))), None)
    if start.shape != end.shape or start.ndim != 1 or (first is not None and len(start) != first.in_features):
        raise ValueError(f"start and end must be points of the model's inputs, got {tuple(start.shape)} and "
                         f"{tuple(end.shape)}")  # fmt: skip
    if torch.equal(start, end):
        raise ValueError("end must differ from start, or there is no line")
    start, direction = start.double(), end.double() - start.double()
    edges = start.new_tensor([0.0, 1.0])
    degree = 1
    for index, layer in enumerate(layers):
        degree *= 2 if isinstance(layer, QuadraticLinear) else 1
        if isinstance(layer, nn.ReLU):
            places = _chebyshev_nodes(edges, degree)
            values = _through(layers[:index], start + places[..., None] * direction)
            edges = _with_roots(edges, _coefficients(values, degree))
    middles = (edges[1:] + edges[:-1]) / 2
    patterns = _patterns(layers, start + middles[:, None] * direction)
    switches = (patterns[1:] != patterns[:-1]).any(dim=1)
    found = edges[1:-1][switches]
    return PolynomialPieces(len(found) + 1, tuple(found.tolist()), degree)


def _flat(module: Any, name: str) -> list[nn.Module]:
    if type(module) is nn.Sequential:
        named = module._modules.items()  # named_children would leave out a layer's second place
        return [layer for one, child in named for layer in _flat(child, f"{name}.{one}".strip("."))]
    if type(module) not in (nn.Linear, QuadraticLinear, nn.ReLU, nn.Identity):
        raise TypeError(f"model must be a sequence of linear, quadratic and ReLU layers, got {name!r}: {module}")
    return [module]


def _through(layers: list[nn.Module], x: Tensor) -> Tensor:
    for layer in layers:
        x = layer(x)
    return x


def _patterns(layers: list[nn.Module], x: Tensor) -> Tensor:
    """Return which ReLUs are active at points, one row a point; what is 0 up to rounding is not."""
    active = [torch.zeros(len(x), 0, dtype=torch.bool, device=x.device)]
    for layer in layers:
        if isinstance(layer, nn.ReLU):
            active.append(x > 1e-14 * x.abs().max())
        x = layer(x)
    return torch.cat(active, dim=1)


def _chebyshev_nodes(edges: Tensor, degree: int) -> Tensor:
    """Return degree + 1 Chebyshev nodes in each stretch between edges, one row a stretch."""
    angles = (torch.arange(degree + 1, dtype=edges.dtype, device=edges.device) + 0.5) * math.pi / (degree + 1)
    return edges[:-1, None] + (edges[1:] - edges[:-1])[:, None] * (1 + angles.cos()) / 2


def _coefficients(values: Tensor, degree: int) -> Tensor:
    """Turn values (stretch, node, neuron) at Chebyshev nodes to Chebyshev coefficients (stretch, neuron, order)."""
    order = torch.arange(degree + 1, dtype=values.dtype, device=values.device)
    cosines = (order[:, None] * (order + 0.5) * math.pi / (degree + 1)).cos() * (2 / (degree + 1))
    cosines[0] /= 2
    return torch.einsum("on,snw->swo", cosines, values)


def _with_roots(edges: Tensor, coefficients: Tensor) -> Tensor:
    """Add the real roots of the polynomials on each stretch to its edges; spurious ones do no harm."""
    stretch = torch.arange(len(coefficients), device=edges.device)[:, None].expand(coefficients.shape[:2]).flatten()
    flat = coefficients.flatten(0, 1)
    orders = torch.arange(flat.shape[1], device=edges.device)
    kept = flat.abs() > 1e-13 * flat.abs().amax(dim=1, keepdim=True)
    degrees = torch.where(kept, orders, 0).amax(dim=1)
    found = [edges]
    for degree in degrees.unique().tolist():  # a batch of eigenvalue problems for each degree that occurs
        if degree == 0:
            continue
        chosen = degrees == degree
        roots = torch.linalg.eigvals(_colleague(flat[chosen, : degree + 1]))
        real = (roots.imag.abs() < 1e-4) & (roots.real.abs() <= 1)
        left, right = edges[stretch[chosen]], edges[stretch[chosen] + 1]
        places = left[:, None] + (right - left)[:, None] * (1 + roots.real) / 2
        found.append(places[real])
    merged = torch.cat(found).sort().values
    gaps = merged[1:] - merged[:-1] > NARROWEST
    inner = merged[1:][gaps]
    return torch.cat([edges[:1], inner[inner < 1 - NARROWEST], edges[-1:]])


def _colleague(coefficients: Tensor) -> Tensor:
    """Return the matrices of multiplication by x modulo polynomials in Chebyshev's basis: their roots' eigenvalues."""
    degree = coefficients.shape[1] - 1
    matrix = coefficients.new_zeros(len(coefficients), degree, degree)
    if degree == 1:
        return -(coefficients[:, :1] / coefficients[:, 1:])[..., None]
    ones = torch.full((degree - 1,), 0.5, dtype=matrix.dtype, device=matrix.device)
    matrix += ones.diag(1) + ones.diag(-1)
    matrix[:, 0, 1] = 1.0
    matrix[:, -1] -= coefficients[:, :-1] / coefficients[:, -1:] / 2
    return matrix


@dataclass(frozen=True)
class VarietyDimension(Report):
    """How many dimensions the functions have that a network with identity activation reaches.

    Args:
        dimension: Dimension of the variety: rank of the Jacobian of function by parameters, at a random place.
        parameters: Number of parameters, which is no less.
        singular_values: Those of the Jacobian with columns of length 1, descending.
    """

    dimension: int
    parameters: int
    singular_values: tuple[float, ...]

    def plot(self) -> Figure:
        """Draw the singular values, with a line after those that count."""
        from matplotlib.figure import Figure

        figure = Figure(figsize=(5, 4), layout="constrained")
        axes = figure.subplots()
        axes.semilogy(range(1, 1 + len(self.singular_values)), [max(one, 1e-18) for one in self.singular_values], "o")
        axes.axvline(self.dimension + 0.5, linestyle="--")
        axes.set(xlabel="index", ylabel="singular value", title=f"{self.dimension} of {self.parameters} parameters")
        return figure


def variety_dimension(model: nn.Module, features: int, *, generator: torch.Generator | None = None) -> VarietyDimension:
    """Measure the dimension of the set of polynomials that a network with identity activation can be.

    Coefficients are linear in values at sufficiently many points, so the rank is that of the Jacobian of values by
    parameters, at more random points than there are parameters. Parameters are drawn too: the rank is the generic one.

    Args:
        model: A network that is a polynomial of its inputs and its parameters, such as quadratic layers in a row, or
            linear ones with squares between. Its own numbers do not matter. Left as it is.
        features: Number of its inputs.
        generator: Draws parameters and points; ``None`` for a fresh one with seed 0.

    Returns:
        The dimension, with the singular values that it was read off.

    Raises:
        TypeError: ``model`` is not a module, or has an activation of ``torch.nn``, which is no polynomial.
        ValueError: ``features`` < 1, or the model has no parameters.

    Cost: the Jacobian of values at P points by P parameters, and its singular values, O(P³).

    Source: section III of https://arxiv.org/abs/2110.06081, the measure from algebraic geometry.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    check_integer("features", features, at_least=1)
    for name, part in model.named_modules():
        if type(part).__module__ == "torch.nn.modules.activation":
            raise TypeError(f"model must be a polynomial, got {name!r}: {part}")
    twin = copy.deepcopy(model).double().eval()
    generator = torch.Generator().manual_seed(0) if generator is None else generator
    parameters = {name: _normal(parameter, generator) for name, parameter in twin.named_parameters()}
    count = sum(parameter.numel() for parameter in parameters.values())
    if count == 0:
        raise ValueError(f"model must have parameters, got {type(model).__name__} without")
    place = {"generator": generator, "dtype": torch.float64, "device": generator.device}
    device = next(iter(parameters.values())).device
    points = (2 * torch.rand(count + 8, features, **place) - 1).to(device)

    def values(held: dict[str, Tensor]) -> Tensor:
        output: Tensor = torch.func.functional_call(twin, held, (points,))
        return output.flatten()

    jacobians = torch.func.jacrev(values)(parameters)
    jacobian = torch.cat([one.flatten(1) for one in jacobians.values()], dim=1).detach()
    lengths = torch.linalg.vector_norm(jacobian, dim=0)
    spectrum = torch.linalg.svdvals(jacobian / lengths.clamp(min=torch.finfo(torch.float64).tiny))
    dimension = int((spectrum > 1e-10 * spectrum[0]).sum())
    return VarietyDimension(dimension, count, tuple(spectrum.tolist()))


def _normal(parameter: Tensor, generator: torch.Generator) -> Tensor:
    drawn = torch.randn(parameter.shape, generator=generator, dtype=torch.float64, device=generator.device)
    fan_in = parameter[0].numel() if parameter.ndim > 1 else 1
    return (drawn / math.sqrt(fan_in)).to(parameter.device)
