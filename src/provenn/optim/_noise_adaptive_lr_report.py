"""What LANTON knows of each layer: its noise, and the share of the learning rate that this leaves it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from provenn.core.experiment.reports import Report

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class LayerRate(Report):
    """One layer's noise and rate.

    Attributes:
        name: The parameter's name; its place, such as ``"1.0"``, where the groups carry no names.
        group: Index of its parameter group.
        norm: The norm that its steps and its noise are measured in.
        shape: Its shape.
        noise: H, the running mean of the squared dual norm of the gradients' difference; NaN where it is not measured.
        factor: a = α / √(α² + H); NaN likewise.
        ratio: r = √(a / largest a of its group).
        rate: The group's learning rate times r.
    """

    name: str
    group: int
    norm: str
    shape: tuple[int, ...]
    noise: float
    factor: float
    ratio: float
    rate: float


@dataclass(frozen=True)
class LayerReport(Report):
    """The noise and the rate of every layer, in the order of the parameter groups."""

    nested: ClassVar[dict[str, type[Report]]] = {"layers": LayerRate}

    layers: tuple[LayerRate, ...]

    def plot(self) -> Figure:
        """Draw each layer's effective learning rate as a bar, one colour a norm."""
        from matplotlib.figure import Figure

        figure = Figure(figsize=(7, 1.5 + 0.22 * len(self.layers)), layout="constrained")
        axes = figure.subplots()
        for norm in dict.fromkeys(layer.norm for layer in self.layers):
            places = [place for place, layer in enumerate(self.layers) if layer.norm == norm]
            axes.barh(places, [self.layers[place].rate for place in places], label=norm)
        axes.set_yticks(range(len(self.layers)), [layer.name for layer in self.layers])
        axes.invert_yaxis()
        axes.set_xlabel("effective learning rate")
        axes.legend(title="norm")
        return figure
