"""What the SeqBoat claim trains: selective copying, spoken digits, and the two dense baselines."""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from provenn import data
from provenn.core.experiment.seeding import generator
from provenn.nn import GatedAttentionUnit, MultiHeadEMA, SeqBoat

SEQBOAT, CHUNKED, EMA = "SeqBoat", "MEGA-chunk", "EMA"
ARMS = (SEQBOAT, CHUNKED, EMA)
VOCABULARY, MARKED, CLASSES, BINS = 8, 8, 10, 33
BLANK, CUE, SYMBOLS = VOCABULARY, VOCABULARY + 1, VOCABULARY + 2


class Split(NamedTuple):
    """Inputs and labels."""

    x: Tensor
    y: Tensor


def copying(count: int, length: int, draws: torch.Generator) -> Split:
    """Draw selective copying: 8 symbols stand among blanks, and 8 cues at the end ask for them in their order.

    Args:
        count: Sequences.
        length: With the cues.
        draws: Draws symbols and places.

    Shape:
        x (count, length, 10), one-hot: 8 symbols, blank, cue; y (count, 8).
    """
    body = length - MARKED
    places = torch.rand(count, body, generator=draws).argsort(1)[:, :MARKED].sort(1).values
    symbols = torch.randint(VOCABULARY, (count, MARKED), generator=draws)
    tokens = torch.full((count, length), BLANK).scatter(1, places, symbols)
    tokens[:, body:] = CUE
    return Split(F.one_hot(tokens, SYMBOLS).float(), symbols)


def length_at(epoch: int, length: int, step: int) -> int:
    """Return how long the sequences of an epoch are: one step more each epoch, up to the whole length."""
    return min(length, step * (epoch + 1))


@cache
def spoken_digits(length: int, real: bool) -> dict[str, Split]:
    """Return log spectra of frames: takes 0 to 4 of the Free Spoken Digit set for test, 5 to 9 for validation.

    Args:
        length: Frames of 64 samples, 32 apart.
        real: Whether to load the data set; else two tones of a class stand in for a digit.

    Shape:
        x (clips, length, 33), standardised by the training clips; y (clips,).
    """
    samples = 32 * (length + 1)
    if real:
        bundle = data.load("fsdd")
        wave, y, take = torch.from_numpy(bundle.padded(samples)), torch.from_numpy(bundle.y).long(), bundle.take
    else:
        wave, y, take = _tones(600, samples)
    frames = wave.unfold(1, 64, 32) * torch.hann_window(64)
    x = torch.log(torch.fft.rfft(frames).abs().square() + 1e-4)
    parts = {"test": take < 5, "validation": (take >= 5) & (take < 10), "train": take >= 10}
    chosen = {name: torch.from_numpy(rows) for name, rows in parts.items()}
    known = x[chosen["train"]]
    x = (x - known.mean((0, 1))) / known.std((0, 1))
    return {name: Split(x[rows], y[rows]) for name, rows in chosen.items()}


def _tones(count: int, samples: int) -> tuple[Tensor, Tensor, np.ndarray]:
    draws = generator("tones")
    y = torch.arange(count) % CLASSES
    time = torch.arange(samples) / 8000
    pitch = 400 + 300 * y[:, None] * torch.where(time < time[-1] / 2, 1.0, 0.5)
    wave = torch.sin(2 * torch.pi * pitch * time) + 0.3 * torch.randn(count, samples, generator=draws)
    return 0.3 * wave, y, np.arange(count) // CLASSES % 50


class DenseLayer(nn.Module):
    """A SeqBoat layer without its router: no attention, or attention on all elements within chunks."""

    def __init__(
        self, dim: int, zdim: int, ndim: int, norm: nn.Module, bidirectional: bool, chunk: int | None, attn: str
    ) -> None:
        super().__init__()
        self.chunk = chunk
        self.norm, self.ssm = norm, MultiHeadEMA(dim, ndim, bidirectional)
        self.proj = nn.Linear(dim, dim)
        nn.init.trunc_normal_(self.proj.weight, 0.0, 0.02, -0.04, 0.04)
        nn.init.zeros_(self.proj.bias)
        options = {"attn": attn, "bidirectional": bidirectional, "rel_pos_bias": "local"}
        self.gau = None if chunk is None else GatedAttentionUnit(dim, zdim, 2 * dim, chunk, **options)

    def forward(self, x: Float[Tensor, "batch time dim"]) -> Float[Tensor, "batch time dim"]:
        """Return the layer's output; time is a multiple of the chunk."""
        m = F.silu(self.ssm(self.norm(x)))
        added = self.proj(m)
        if self.gau is not None and self.chunk is not None:
            added = added + self.gau(m.unflatten(1, (-1, self.chunk)).flatten(0, 1)).reshape(m.shape)
        return F.silu(added + x)


class DenseModel(nn.Module):
    """The baselines' model: as SeqBoat's, with dense layers."""

    def __init__(self, skeleton: SeqBoat, layers: list[DenseLayer]) -> None:
        super().__init__()
        self.encoder, self.decoder, self.final_norm = skeleton.encoder, skeleton.decoder, skeleton.final_norm
        self.layers, self.pool = nn.Sequential(*layers), skeleton.pool

    def forward(self, x: Float[Tensor, "batch time features"]) -> Tensor:
        """Return the logits."""
        y = self.final_norm(self.layers(self.encoder(x)))
        out: Tensor = self.decoder(y if self.pool is None else y.mean(1))
        return out


def build(arm: str, spoken: bool, dim: int, zdim: int, ndim: int, window: int) -> nn.Module:
    """Build an arm's model of two layers, with the options of the authors' runs on such data, the same in all arms."""
    norm, attn = ("batchnorm", "relu2") if spoken else ("layernorm", "softmax")
    model = SeqBoat(
        BINS if spoken else SYMBOLS, dim, 2, CLASSES if spoken else VOCABULARY, pool="mean" if spoken else None,
        zdim=zdim, ndim=ndim, window=window, attn=attn, norm=norm, bidirectional=spoken, rel_pos_bias="local",
        init_temp_scale=1.0 if spoken else 0.3,
    )  # fmt: skip
    if not spoken:
        nn.init.normal_(model.encoder.weight, std=dim**-0.5)
    if arm == SEQBOAT:
        sparse: nn.Module = model
        return sparse
    chunk = window if arm == CHUNKED else None
    layers = [DenseLayer(dim, zdim, ndim, layer.norm, spoken, chunk, attn) for layer in model.layers]
    return DenseModel(model, layers)


def optimizer_of(model: nn.Module, spoken: bool, lr: float) -> torch.optim.Optimizer:
    """Build AdamW; for tokens with betas and clipping of the authors' runs on such data."""
    if spoken:
        return torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.01)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.98), weight_decay=0.01)
    optimizer.register_step_pre_hook(_clip)
    return optimizer


def _clip(optimizer: torch.optim.Optimizer, *_: object) -> None:
    nn.utils.clip_grad_norm_([p for group in optimizer.param_groups for p in group["params"]], 1.0)


def logits_of(model: nn.Module, x: Tensor, spoken: bool) -> Tensor:
    """Return the logits that are asked for: one of a clip, or those at the cues."""
    logits: Tensor = model(x)
    return logits if spoken else logits[:, -MARKED:]


@torch.no_grad()
def evaluate(model: nn.Module, split: Split, spoken: bool, device: str) -> tuple[float, list[float]]:
    """Return accuracy, and each layer's share of elements that attention gets (empty for the baselines)."""
    model.eval()
    right, shares = 0.0, []
    for x, y in zip(split.x.split(128), split.y.split(128), strict=True):
        predicted = logits_of(model, x.to(device), spoken).argmax(-1).cpu()
        right += (predicted == y).double().sum().item()
        if isinstance(model, SeqBoat):
            rates = [rate.item() for rate in model.last_activation if rate is not None]
            shares.append([len(x) * rate / len(split.x) for rate in rates])
    return right / split.y.numel(), [sum(layer) for layer in zip(*shares, strict=True)]


def loss(model: nn.Module, x: Tensor, y: Int[Tensor, "..."]) -> Tensor:
    """Cross-entropy of what is asked for; labels of one dimension are those of clips."""
    logits = logits_of(model, x, spoken=y.ndim == 1)
    return F.cross_entropy(logits.flatten(0, -2), y.flatten())
