"""A priori compression of convolutional neural networks for wave simulators.

Boukraichi, Akkari, Casenave, Ryckelynck, 2023. https://arxiv.org/abs/2304.04964

Convolutions whose kernels are built of one-way filters before training, so that fewer weights are trained, stored and
multiplied:

    K[o, c, y, x] = Σ_r a[o, r, c] u[o, r, y] v[o, r, x]

and the finite-element wave solver whose fields such networks learn to predict. The rooms, each named
``_a_priori_compressed_conv_…``: ``base`` (what the layers share), ``one_way`` (the paper's layers), ``shared`` (the
canonical and Tucker formats that they are compared with), ``compress`` (the conversion of models); ``elements``,
``mesh``, ``assembly`` (finite elements), ``wave`` (the solver), ``history`` (what a run leaves), ``dataset``.
"""

from provenn.nn._a_priori_compressed_conv_compress import (
    CompressionReport,
    LayerChange,
    ModelCosts,
    compress_before_training,
)
from provenn.nn._a_priori_compressed_conv_dataset import WaveDataset, wave_dataset
from provenn.nn._a_priori_compressed_conv_history import WaveCertificate, WaveResult
from provenn.nn._a_priori_compressed_conv_mesh import QuadMesh
from provenn.nn._a_priori_compressed_conv_one_way import OneWayConv2d, OneWayConvTranspose2d
from provenn.nn._a_priori_compressed_conv_shared import (
    CPConv2d,
    CPConvTranspose2d,
    Tucker2Conv2d,
    Tucker2ConvTranspose2d,
)
from provenn.nn._a_priori_compressed_conv_wave import WaveFE2d

__all__ = [
    "CPConv2d",
    "CPConvTranspose2d",
    "CompressionReport",
    "LayerChange",
    "ModelCosts",
    "OneWayConv2d",
    "OneWayConvTranspose2d",
    "QuadMesh",
    "Tucker2Conv2d",
    "Tucker2ConvTranspose2d",
    "WaveCertificate",
    "WaveDataset",
    "WaveFE2d",
    "WaveResult",
    "compress_before_training",
    "wave_dataset",
]
