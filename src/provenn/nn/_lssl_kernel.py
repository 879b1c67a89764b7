"""What a discrete system Ā, B̄, C does over L steps, without a loop over L and without its L powers.

The powers are split, Ā^{js + i} = (Ā^s)^j Ā^i with i < s: s columns (B̄, ĀB̄, …) on the one side and L/s rows
(C, CĀ^s, …) on the other, both by doubling, and one product gives the kernel. Everything here is in float64.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from provenn.core.sequences.state_space import krylov, repeated_squares


class KrylovFactors(NamedTuple):
    """What the kernel needs of a system beside C.

    Args:
        columns: (B̄, ĀB̄, …, Ā^{s−1}B̄), (features, N, s); s is a power of 2 unless it is the whole length.
        powers: Ā, Ā², Ā⁴, …, each (features, N, N).
    """

    columns: Tensor
    powers: tuple[Tensor, ...]


def factorize(
    A: Float[Tensor, "features n n"], B: Float[Tensor, "features n"], length: int, channels: int
) -> KrylovFactors:
    """Return the columns and the powers of Ā for a length.

    s is about √(L·M), for as many rows as columns, but no less than N: so the columns take no more memory than Ā
    itself, and the rows, which C changes, little time. Memory is O(N·max(N, √(L·M))) a feature.
    """
    longest = 1 << (length - 1).bit_length()
    wanted = max(A.shape[-1], math.isqrt(length * channels - 1) + 1)
    block = min(1 << (wanted - 1).bit_length(), longest)
    powers = repeated_squares(A, length)
    return KrylovFactors(krylov(min(block, length), A, B, powers), powers)


def convolution_kernel(
    factors: KrylovFactors, C: Float[Tensor, "features channels n"], length: int
) -> Float[Tensor, "features channels length"]:
    """Return (C B̄, C Ā B̄, …, C Ā^{L−1} B̄)."""
    block = factors.columns.shape[-1]
    rows = _repeated(C[:, None], factors.powers, block, -(-length // block))
    kernel = rows.flatten(1, 2) @ factors.columns
    return kernel.unflatten(1, rows.shape[1:3]).transpose(1, 2).flatten(2)[..., :length]


def _repeated(first: Tensor, powers: tuple[Tensor, ...], stride: int, count: int) -> Tensor:
    """Return (C, CG, …, CG^{count−1}) for G = Ā^stride: (features, 1, rows, N) → (features, count, rows, N)."""
    rows = first
    place = stride.bit_length() - 1
    while rows.shape[1] < count:
        missing = min(rows.shape[1], count - rows.shape[1])
        # Flat, as a product that broadcasts would copy the power for each of the rows.
        further = rows[:, :missing].flatten(1, 2) @ powers[place]
        rows = torch.cat((rows, further.unflatten(1, (missing, rows.shape[2]))), 1)
        place += 1
    return rows


def free_response(
    factors: KrylovFactors,
    C: Float[Tensor, "features channels n"],
    state: Float[Tensor, "batch features n"],
    length: int,
) -> Float[Tensor, "batch features channels length"]:
    """Return C Ā^{t+1} x_0 for t = 0 … L − 1, from rows C Ā^{i+1} of one block and states Ā^{js} x_0."""
    block = factors.columns.shape[-1]
    near = _repeated((C @ factors.powers[0])[:, None], factors.powers, 1, block)
    # x_0 as rows: x_0ᵀ(Gᵀ)^j.
    turned = tuple(power.mT for power in factors.powers)
    far = _repeated(state.transpose(0, 1)[:, None], turned, block, -(-length // block))
    response = torch.einsum("himn,hjbn->bhmji", near, far)
    return response.flatten(3)[..., :length]


def final_state(
    factors: KrylovFactors, u: Float[Tensor, "batch features length"], state: Float[Tensor, "batch features n"]
) -> Float[Tensor, "batch features n"]:
    """Return x_L = Ā^L x_0 + Σ Ā^{L−1−t} B̄ u_t: a product a block of inputs, and one of Ā^s from block to block."""
    length, block = u.shape[-1], factors.columns.shape[-1]
    blocks = -(-length // block)
    padded = torch.nn.functional.pad(u, (blocks * block - length, 0)).unflatten(-1, (blocks, block))
    parts = torch.einsum("bhji,hni->jhbn", padded.flip(-1), factors.columns)
    moved = parts[0]
    if blocks > 1:
        stride = factors.powers[block.bit_length() - 1].mT
        for part in parts[1:].unbind(0):
            moved = moved @ stride + part
    started = state.transpose(0, 1)
    for place in range(length.bit_length()):
        if length >> place & 1:
            # Only at a power of 2 is the last power one more than the kernel needs.
            last = place == len(factors.powers)
            power = factors.powers[-1] @ factors.powers[-1] if last else factors.powers[place]
            started = started @ power.mT
    return (moved + started).transpose(0, 1)
