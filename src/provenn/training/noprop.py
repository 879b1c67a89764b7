"""NoProp: Training Neural Networks without Back-propagation or Forward-propagation.

Li, Teh, Pascanu, 2025. https://arxiv.org/abs/2503.24322

Each block of a network learns on its own to denoise a noised class embedding, given the data:

    q(z_t | y) = N(√ᾱ_t u_y, (1 − ᾱ_t) I)
    L = −log p̂(y | z_T) + KL(q(z_0 | y) ‖ N(0, I)) + (T/2) η E_t (SNR(t) − SNR(t−1)) ‖û_t(z_{t−1}, x) − u_y‖²
    inference: z_t = a_t û_t(z_{t−1}, x) + b_t z_{t−1} + √c_t ε, from z_0 ~ N(0, I)

The rooms: ``_noprop_schedules`` (ᾱ and what follows from it), ``_noprop_blocks`` (networks), ``_noprop_data`` (batches,
class embeddings), ``_noprop_trainer`` (what the trainers share), ``_noprop_dt``, ``_noprop_ct`` with ``_noprop_paths``,
``_noprop_fm``; and two baselines, ``_noprop_forward_forward`` and ``_noprop_target_propagation``.
"""

from provenn.training._noprop_blocks import DenoisingBlock, VelocityBlock
from provenn.training._noprop_ct import NoPropCT
from provenn.training._noprop_dt import NoPropDT
from provenn.training._noprop_fm import NoPropFM
from provenn.training._noprop_forward_forward import ForwardForwardTrainer
from provenn.training._noprop_schedules import GammaSchedule, cosine_schedule, ddpm_coefficients
from provenn.training._noprop_target_propagation import DifferenceTargetPropagation

__all__ = [
    "DenoisingBlock",
    "DifferenceTargetPropagation",
    "ForwardForwardTrainer",
    "GammaSchedule",
    "NoPropCT",
    "NoPropDT",
    "NoPropFM",
    "VelocityBlock",
    "cosine_schedule",
    "ddpm_coefficients",
]
