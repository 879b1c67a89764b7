"""NoProp in discrete time: T blocks, each of which learns on its own."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from provenn.core.experiment.checks import check_integer, check_number
from provenn.core.experiment.seeding import seeded
from provenn.training._noprop_blocks import DenoisingBlock
from provenn.training._noprop_data import (
    ClassEmbeddings,
    Embedding,
    LabelledData,
    Progress,
    Settings,
    TrainingResult,
    fit_epochs,
    normal_like,
)
from provenn.training._noprop_schedules import DDPMCoefficients, cosine_schedule, ddpm_coefficients
from provenn.training._noprop_trainer import NoPropTrainer, noised, prior_divergence


class NoPropNetwork(nn.Module):
    """The T blocks in a row, with class embeddings and output head: what back-propagation would train end to end."""

    def __init__(
        self, blocks: Sequence[DenoisingBlock], embeddings: ClassEmbeddings, coefficients: DDPMCoefficients
    ) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.embeddings = embeddings
        weight = embeddings.weight
        self.head = nn.Linear(weight.shape[1], weight.shape[0], dtype=weight.dtype, device=weight.device)
        self.coefficients = coefficients

    def encode(self, x: Float[Tensor, "batch *data"]) -> list[Tensor]:
        """Return the features of the data in each block."""
        return [block.encode(x) for block in self.blocks]

    def forward(
        self,
        x: Float[Tensor, "batch *data"],
        z: Float[Tensor, "batch embed"],
        generator: torch.Generator | None = None,
    ) -> Float[Tensor, "batch classes"]:
        """Return the head's logits of z_T, from z = z_0; with noise in every block if a generator draws it."""
        return self.denoise(self.encode(x), z, generator)

    def denoise(
        self, encoded: Sequence[Tensor], z: Float[Tensor, "batch embed"], generator: torch.Generator | None
    ) -> Float[Tensor, "batch classes"]:
        """Return the logits of data that are encoded already."""
        steps = zip(self.blocks, encoded, *(one.tolist() for one in self.coefficients[:3]), strict=True)
        for block, features, a, b, c in steps:
            z = a * block.step(z, features, self.embeddings.weight) + b * z
            if generator is not None:
                z = z + c**0.5 * normal_like(z, generator)
        return self.head(z)


class NoPropDT(NoPropTrainer):
    """Train T blocks, each to denoise a noised class embedding, without a pass through another block.

    Block t sees z_{t−1} ~ q(z_{t−1} | y) = N(√ᾱ u_y, (1 − ᾱ) I) with ᾱ = ᾱ_{t−1}, never another block's output, and
    descends (T/2) η (SNR(t) − SNR(t−1)) ‖û_t(z_{t−1}, x) − u_y‖²; the output head, and W_E if learned, descend with it
    −log p̂(y | z_T) and KL(q(z_0 | y) ‖ N(0, I)). One epoch takes every block over all batches, block after block.

    Args:
        block_factory: Called T times without arguments, returns a :class:`DenoisingBlock` without a time; torch's
            global generators are seeded by the block's place meanwhile. For images
            ``lambda: DenoisingBlock.for_images((1, 28, 28), 10, 10)``, for vectors ``DenoisingBlock.for_vectors``.
        num_blocks: T.
        embedding: ``"onehot"`` (fixed, d = m), ``"learned"`` (orthogonal start), or ``"prototype"`` (learned; starts
            at each class's sample with the smallest median distance to the others, d the size of a sample).
        embed_dim: d; ``None`` for the blocks' own.
        schedule: ``"cosine"``, or α_0 … α_T as of :func:`cosine_schedule`.
        eta: η.
        seed: Of weights, order of the data, dropout, noise.
        epochs: Passes over the data, of every block.
        batch_size: Samples a batch, of tensors; a loader makes its own.
        lr: AdamW's learning rate.
        weight_decay: AdamW's weight decay.

    Attributes:
        model: The network of all blocks, embeddings and head.
        num_classes: m.
        embed_dim: d.

    Raises:
        ValueError: T < 1, d or a schedule that does not fit, or a number out of range.
        TypeError: ``block_factory`` does not make denoising blocks.

    Cost: an epoch is T passes over the data, each of one block forward and backward; memory is one block's. The blocks
    can be trained at once, in processes of their own: :meth:`fit_block`.

    Source: NoProp, section 2 and algorithm 1. Optimiser, batch size, epochs and η are as reported for MNIST; dropout
    and the cosine's ends are not in the paper.
    """

    def __init__(
        self,
        block_factory: Callable[[], DenoisingBlock],
        num_blocks: int = 10,
        embedding: Embedding = "onehot",
        embed_dim: int | None = None,
        schedule: str | Float[Tensor, " steps"] = "cosine",
        eta: float = 0.1,
        seed: int = 0,
        *,
        epochs: int = 100,
        batch_size: int = 128,
        lr: float = 1e-3,
        weight_decay: float = 1e-3,
    ) -> None:
        super().__init__(Settings(epochs, batch_size, lr, weight_decay, seed))
        check_integer("num_blocks", num_blocks, at_least=1)
        check_number("eta", eta, above=0)
        coefficients = _coefficients(schedule, num_blocks)
        self.eta = eta
        blocks = []
        for t in range(1, num_blocks + 1):
            with seeded(seed, "block", t):
                blocks.append(_checked_block(block_factory(), embed_dim))
        self.num_classes, self.embed_dim = blocks[0].num_classes, blocks[0].embed_dim
        with seeded(seed, "head"):
            like = next(blocks[0].parameters())
            self.embeddings = ClassEmbeddings(embedding, self.num_classes, self.embed_dim, like)
            self.model = NoPropNetwork(blocks, self.embeddings, coefficients)

    def fit_block(
        self,
        t: int,
        data: Any,
        labels: Int[Tensor, " samples"] | None = None,
        *,
        checkpoint: str | Path | None = None,
        progress: Progress | None = None,
    ) -> TrainingResult:
        """Train block t alone, for all epochs; embeddings stay as they are.

        With fixed embeddings it does to the block what :meth:`fit` does, bit by bit, in whatever process or order:
        build the same trainer in each process, fit one block in each, and load the blocks' ``state_dict`` into one.
        :meth:`fit_head` trains what is left.

        Args:
            t: 1 … T.
            data: As in :meth:`fit`.
            labels: As in :meth:`fit`.
            checkpoint: As in :meth:`fit`; one file a block.
            progress: As in :meth:`fit`.

        Returns:
            History, and the block.

        Raises:
            ValueError: ``t`` outside 1 … T, and as :meth:`fit`.
        """
        check_integer("t", t, at_least=1, at_most=len(self.model.blocks))
        held = self._data(data, labels)

        def loss(block: nn.Module, x: Tensor, y: Tensor, place: Tensor) -> Tensor:
            draws = self._generator("block noise", x, *place.tolist())
            return self.block_loss(t, x, y, self.embeddings.weight.detach(), draws)

        block = self.model.blocks[t - 1]
        batches = lambda epoch: held.passes(epoch, t)  # noqa: E731
        return TrainingResult(fit_epochs(block, loss, batches, self._settings, checkpoint, progress), block)

    def fit_head(
        self,
        data: Any,
        labels: Int[Tensor, " samples"] | None = None,
        *,
        checkpoint: str | Path | None = None,
        progress: Progress | None = None,
    ) -> TrainingResult:
        """Train the output head alone, as :meth:`fit` does beside the blocks; embeddings stay as they are.

        Args:
            data: As in :meth:`fit`.
            labels: As in :meth:`fit`.
            checkpoint: As in :meth:`fit`.
            progress: As in :meth:`fit`.

        Returns:
            History, and the head.

        Raises:
            ValueError: As :meth:`fit`.
        """
        held = self._data(data, labels)

        def loss(head: nn.Module, x: Tensor, y: Tensor, place: Tensor) -> Tensor:
            draws = self._generator("head noise", x, *place.tolist())
            return self.head_loss(y, self.embeddings.weight.detach(), draws)

        batches = lambda epoch: self._epoch(held, epoch)  # noqa: E731
        history = fit_epochs(self.model.head, loss, batches, self._settings, checkpoint, progress)
        return TrainingResult(history, self.model.head)

    def block_loss(
        self,
        t: int,
        x: Float[Tensor, "batch *data"],
        y: Int[Tensor, " batch"],
        embeddings: Float[Tensor, "classes embed"],
        draws: torch.Generator,
    ) -> Float[Tensor, ""]:
        """Return (T/2) η (SNR(t) − SNR(t−1)) times the mean of ‖û_t(z_{t−1}, x) − u_y‖² over a batch.

        Args:
            t: 1 … T.
            x: Samples.
            y: Their classes.
            embeddings: W_E.
            draws: Draws z_{t−1} ~ q(z_{t−1} | y).
        """
        held, u = self.model.coefficients, embeddings[y]
        guess = self.model.blocks[t - 1](noised(u, held.alpha_bars[t - 1].item(), draws), x, embeddings)
        weight = 0.5 * len(self.model.blocks) * self.eta * (held.snr[t] - held.snr[t - 1]).item()
        return weight * (guess - u).square().sum(1).mean()

    def head_loss(
        self, y: Int[Tensor, " batch"], embeddings: Float[Tensor, "classes embed"], draws: torch.Generator
    ) -> Float[Tensor, ""]:
        """Return the mean of −log p̂(y | z_T) + KL(q(z_0 | y) ‖ N(0, I)) over a batch.

        Args:
            y: Classes.
            embeddings: W_E.
            draws: Draws z_T ~ q(z_T | y).
        """
        alpha_bars, u = self.model.coefficients.alpha_bars.tolist(), embeddings[y]
        logits = self.model.head(noised(u, alpha_bars[-1], draws))
        return F.cross_entropy(logits, y) + prior_divergence(u, u.new_tensor(alpha_bars[0]))

    def _loss(self, model: nn.Module, x: Tensor, y: Tensor, place: Tensor) -> Tensor:
        epoch, t, step = place.tolist()
        weight = self.embeddings.weight
        denoising = self.block_loss(t, x, y, weight, self._generator("block noise", x, epoch, t, step))
        return denoising + self.head_loss(y, weight, self._generator("head noise", x, epoch, t, step))

    def _epoch(self, data: LabelledData, epoch: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        for t in range(1, len(self.model.blocks) + 1):
            yield from data.passes(epoch, t)

    def _encode(self, x: Tensor) -> list[Tensor]:
        return self.model.encode(x)

    def _classify(self, encoded: Any, z: Tensor, steps: int | None, noise: torch.Generator) -> Tensor:
        if steps not in (None, len(self.model.blocks)):
            raise ValueError(f"steps must be the number of blocks, {len(self.model.blocks)}, or None, got {steps}")
        return self.model.denoise(encoded, z, noise)


def _coefficients(schedule: str | Tensor, num_blocks: int) -> DDPMCoefficients:
    if isinstance(schedule, str):
        if schedule != "cosine":
            raise ValueError(f"schedule must be 'cosine' or α_0 … α_T, got {schedule!r}")
        return ddpm_coefficients(cosine_schedule(num_blocks))
    if schedule.ndim != 1 or len(schedule) != num_blocks + 1:
        raise ValueError(f"schedule must hold α_0 … α_{num_blocks}, got shape {tuple(schedule.shape)}")
    try:
        return ddpm_coefficients(schedule)
    except ValueError as error:
        raise ValueError(f"schedule: {error}") from error


def _checked_block(block: Any, embed_dim: int | None) -> DenoisingBlock:
    if not isinstance(block, DenoisingBlock) or block.timed:
        raise TypeError(f"block_factory must return a DenoisingBlock without a time, got {block!r}")
    if embed_dim not in (None, block.embed_dim):
        raise ValueError(f"embed_dim must be what the block takes, {block.embed_dim}, got {embed_dim}")
    return block
