"""The network of the sequence tasks: two blocks around a part, which mixes the steps of a sequence."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

BLOCKS = 2
CLIP = 1.0
"""Gradients through hundreds of steps explode now and then, and one such step can undo a training."""
Adapter = Callable[[Any, int], nn.Module]
"""``adapter(part, width)`` makes a layer (batch, time, width) → (batch, time, width), or a tuple that begins so."""


class SequenceNetwork(nn.Module):
    """Embed each step, pass two residual blocks (norm, part), and read the mean over time or the last step.

    Args:
        channels: Numbers a step.
        width: Width of the blocks.
        outputs: Numbers to predict.
        layer: ``layer(width)`` makes the part.
        pooled: Whether the mean over time is read; otherwise the last step.
    """

    def __init__(
        self, channels: int, width: int, outputs: int, layer: Callable[[int], nn.Module], pooled: bool = True
    ) -> None:
        super().__init__()
        self.pooled = pooled
        self.embed = nn.Linear(channels, width)
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(BLOCKS))
        self.layers = nn.ModuleList(layer(width) for _ in range(BLOCKS))
        self.norm = nn.LayerNorm(width)
        self.readout = nn.Linear(width, outputs)

    def forward(self, x: Float[Tensor, "batch time channels"]) -> Float[Tensor, "batch outputs"]:
        """Return the outputs."""
        h = self.embed(x)
        for norm, layer in zip(self.norms, self.layers, strict=True):
            mixed = layer(norm(h))
            mixed = mixed[0] if isinstance(mixed, tuple) else mixed
            if mixed.shape != h.shape:  # a shorter one would be added to every step without a word
                raise ValueError(f"gives {tuple(mixed.shape)} for a sequence {tuple(h.shape)}")
            h = h + mixed
        h = self.norm(h)
        y: Tensor = self.readout(h.mean(1) if self.pooled else h[:, -1])
        return y


class CausalAttention(nn.Module):
    """Softmax attention to earlier steps, with sinusoids added for the place: what attention layers are held against.

    Args:
        width: Width, a multiple of 4.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(width, 4, batch_first=True)

    def forward(self, x: Float[Tensor, "batch time width"]) -> Float[Tensor, "batch time width"]:
        """Return what each step gathers."""
        x = x + sinusoids(x)
        mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1], x.device, x.dtype)
        gathered: Tensor = self.attention(x, x, x, attn_mask=mask, need_weights=False)[0]
        return gathered


def sinusoids(x: Float[Tensor, "batch time width"]) -> Float[Tensor, "time width"]:
    """Return sines and cosines of the place, of wavelengths from 2π to 2π · 10⁴.

    Source: Vaswani et al., "Attention is all you need", NeurIPS 2017, section 3.5.
    """
    time = torch.arange(x.shape[1], device=x.device, dtype=x.dtype)[:, None]
    rates = 1e4 ** (-torch.arange(0, x.shape[2], 2, device=x.device, dtype=x.dtype) / x.shape[2])
    return torch.cat(((time * rates).sin(), (time * rates).cos()), 1)[:, : x.shape[2]]


class SelfAttention(nn.Module):
    """A layer of attention, called with one sequence as query, key and value, and with sinusoids added for the place.

    Args:
        layer: ``layer(query, key, value)`` → (batch, time, width), or a tuple that begins so.
    """

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Float[Tensor, "batch time width"]) -> Float[Tensor, "batch time width"]:
        """Return what each step gathers."""
        x = x + sinusoids(x)
        gathered: Any = self.layer(x, x, x)
        return gathered[0] if isinstance(gathered, tuple) else gathered


def recurrent(kind: type[nn.RNNBase]) -> Callable[[int], nn.Module]:
    """Return what makes one of torch's recurrent layers of a width."""

    def make(width: int) -> nn.Module:
        return kind(width, width, batch_first=True)

    return make


REFERENCES: Mapping[str, Any] = {
    "lstm": recurrent(nn.LSTM),
    "gru": recurrent(nn.GRU),
    "attention": CausalAttention,
}


def _of_width(part: Any, width: int) -> nn.Module:
    made: nn.Module = part(width)
    return made


def _square(part: Any, width: int) -> nn.Module:
    """Make what takes the widths of its inputs and of its states."""
    made: nn.Module = part(width, width)
    return made


def _with_outputs(part: Any, width: int) -> nn.Module:
    made: nn.Module = part(width, width, output_size=width)
    return made


def _bidirectional(part: Any, width: int) -> nn.Module:
    from provenn.nn import PeepholeLSTM

    made: nn.Module = part(PeepholeLSTM(width, width), PeepholeLSTM(width, width), width)
    return made


def _turing_machine(part: Any, width: int) -> nn.Module:
    made: nn.Module = part(width, width, hidden_size=width, slots=16, width=8)
    return made


def _seqboat(part: Any, width: int) -> nn.Module:
    made: nn.Module = part(width, zdim=max(4, width // 2), window=16)
    return made


def _gated_attention(part: Any, width: int) -> nn.Module:
    made: nn.Module = part(width, zdim=max(4, width // 2), hdim=2 * width, window=16)
    return made


def _sigmoid_attention(part: Any, width: int) -> nn.Module:
    return SelfAttention(part(width, 4, causal=True))


def _subsampled(part: Any, width: int) -> nn.Module:
    return SelfAttention(part(width, 4))


def _refused(why: str) -> Adapter:
    """Return an adapter of what has no place in a sequence."""

    def refuse(part: Any, width: int) -> nn.Module:
        raise ValueError(why)

    return refuse


_PIECE = _refused("is a piece of LSSL, which fits")

ADAPTERS: Mapping[str, Adapter] = {
    "SeqBoatLayer": _seqboat,
    "GatedAttentionUnit": _gated_attention,
    "ElmanRNN": _with_outputs,
    "JordanRNN": _with_outputs,
    "PeepholeLSTM": _square,
    "GRU": _square,
    "BiRNN": _bidirectional,
    "NTMCell": _turing_machine,
    "ICLRNN": _with_outputs,
    "ICRNN": _with_outputs,
    "LipschitzRNN": _with_outputs,
    "SigmoidAttention": _sigmoid_attention,
    "SubsampledAttention": _subsampled,
    "KroneckerAttention": _refused("takes time cubic in the length of a sequence"),
    "ICLRNNCell": _refused("is one step; ICLRNN, which fits, takes them all"),
    "LSSLModel": _refused("is a whole network; its layer LSSL fits"),
    "SeqBoat": _refused("is a whole network; its layer SeqBoatLayer fits"),
    "SequenceModel": _refused("is a whole network around a recurrent layer, which fits"),
    "SparseModularActivation": _refused("goes around other modules; SeqBoatLayer, which fits, is made of it"),
    "StructuredTransition": _PIECE,
    "DenseTransition": _PIECE,
    "LinearStateSpace": _PIECE,
    "PLSTM2d": _refused("is a layer of grids"),
    "PLSTMGraph": _refused("is a layer of acyclic graphs"),
    "PLSTMVision": _refused("is a whole network for images"),
    "InvariantMDS": _refused("takes points without an order"),
    "TransportMLP": _refused("maps each step alone"),
}
"""How parts of this package that need more than a width are made; another part is called as ``part(width)``."""

PLACE = (
    "layers of sequences, called as part(width) or torch's recurrent layers; the layer maps (batch, time, width) to the"
    " same shape, or to a tuple that begins with it"
)


def sequence_layer(part: Any, width: int) -> nn.Module:
    """Make a part for sequences of a width."""
    if isinstance(part, type) and issubclass(part, nn.RNNBase) and part.__module__.startswith("torch."):
        return recurrent(part)(width)
    # By name alone a user's own layer would be taken for one of this package.
    ours = getattr(part, "__module__", "").startswith("provenn.")
    adapter = ADAPTERS.get(getattr(part, "__name__", ""), _of_width) if ours else _of_width
    made: nn.Module = adapter(part, width)
    return made
