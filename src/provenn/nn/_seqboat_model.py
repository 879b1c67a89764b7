"""A model of SeqBoat layers."""

from __future__ import annotations

from typing import Any, Literal

from jaxtyping import Bool, Float
from torch import Tensor, nn

from provenn.core.experiment.checks import check_choice, check_integer
from provenn.nn._seqboat_layer import LayerState, SeqBoatLayer, make_norm
from provenn.nn._seqboat_ssm import check_features, truncated_normal_


class SeqBoat(nn.Module):
    """A linear map into D features, SeqBoat layers, and a linear map out of them: for tagging, or with a pool a label.

    Args:
        d_input: Features of an element; tokens come one-hot.
        d_model: D.
        n_layers: Number of layers.
        d_output: Features of the output; default those of the input.
        pool: ``None``: one output an element. ``"mean"``: one a sequence, from the mean over its elements.
        **layer: Options of :class:`SeqBoatLayer`.

    Shape:
        x (batch, time, d_input), ``padding_mask`` (batch, time), True at padding → (batch, time, d_output), or with a
        pool (batch, d_output).

    Returns:
        Calling it returns the outputs. ``last_activation`` then holds each layer's share of elements that attention
        got.

    Raises:
        TypeError: A size is no integer.
        ValueError: A size < 1, an unknown choice, or what a layer refuses.
        RuntimeError: ``step`` of a bidirectional or pooled model.

    Cost: that of its layers.

    Source: the authors' standalone model.
    """

    def __init__(
        self,
        d_input: int,
        d_model: int,
        n_layers: int,
        d_output: int | None = None,
        *,
        pool: Literal["mean"] | None = None,
        **layer: Any,
    ) -> None:
        super().__init__()
        for name, size in (("d_input", d_input), ("d_model", d_model), ("n_layers", n_layers)):
            check_integer(name, size, at_least=1)
        d_output = d_input if d_output is None else d_output
        check_integer("d_output", d_output, at_least=1)
        check_choice("pool", pool, (None, "mean"))
        self.d_input, self.pool = d_input, pool
        self.encoder, self.decoder = nn.Linear(d_input, d_model), nn.Linear(d_model, d_output)
        for linear in (self.encoder, self.decoder):
            truncated_normal_(linear.weight)
            nn.init.zeros_(linear.bias)
        self.layers = nn.ModuleList(SeqBoatLayer(d_model, **layer) for _ in range(n_layers))
        prenorm = layer.get("prenorm", True)
        self.final_norm = make_norm(layer.get("norm", "layernorm"), d_model) if prenorm else nn.Identity()

    @property
    def last_activation(self) -> tuple[Tensor | None, ...]:
        """Each layer's share of elements, without padding, that attention got in the last call."""
        return tuple(layer.last_activation for layer in self.layers)

    def forward(
        self, x: Float[Tensor, "batch time features"], padding_mask: Bool[Tensor, "batch time"] | None = None
    ) -> Float[Tensor, "batch *rest"]:
        """Return the outputs.

        Args:
            x: The sequences.
            padding_mask: True at padding.
        """
        check_features("x", x, self.d_input, 3)
        y = self.encoder(x)
        for layer in self.layers:
            y = layer(y, padding_mask)
        y = self.final_norm(y)
        if self.pool is not None:
            y = _mean(y, padding_mask)
        out: Tensor = self.decoder(y)
        return out

    def step(
        self, x: Float[Tensor, "batch features"], state: tuple[LayerState, ...] | None = None
    ) -> tuple[Float[Tensor, "batch out"], tuple[LayerState, ...]]:
        """Take the next element of each sequence; ``step`` over a sequence gives ``forward``.

        Args:
            x: The elements.
            state: What the step before returned; ``None`` at the beginning.

        Shape:
            x (batch, d_input) → (batch, d_output).

        Returns:
            Output and the layers' states.

        Raises:
            RuntimeError: The model is bidirectional or pooled.
        """
        check_features("x", x, self.d_input, 2)
        if self.pool is not None:
            raise RuntimeError(f"step needs a model with one output an element, this one has pool={self.pool!r}")
        y, states = self.encoder(x), []
        for index, layer in enumerate(self.layers):
            y, after = layer.step(y, None if state is None else state[index])
            states.append(after)
        out: Tensor = self.decoder(self.final_norm(y))
        return out, tuple(states)


def _mean(y: Tensor, padding_mask: Tensor | None) -> Tensor:
    if padding_mask is None:
        return y.mean(1)
    real = (~padding_mask)[..., None].to(y.dtype)
    return (y * real).sum(1) / real.sum(1).clamp(min=1)
