"""nnAudio: An on-the-fly GPU Audio to Spectrogram Conversion Toolbox Using 1D Convolution Neural Networks.

Cheuk, Anderson, Agres, Herremans, IEEE Access 2020. https://arxiv.org/abs/1912.12055; the authors' code:
https://github.com/KinWaiCheuk/nnAudio

Waveforms to spectrograms inside a network: every Fourier or constant-Q kernel is a filter, so that a spectrogram is
computed on the model's device, is differentiable, and its kernels can be trained. The parts' public home is
``provenn.nn.audio``. Kernels are in ``_nn_audio_kernels``, mel and gammatone banks in ``_nn_audio_banks``, padding and
convolution in ``_nn_audio_frames``, low-pass filters in ``_nn_audio_decimation``; the layers in ``_nn_audio_stft``,
``_nn_audio_inverse``, ``_nn_audio_mel``, ``_nn_audio_cqt`` and ``_nn_audio_recursive``.
"""

from provenn.nn._nn_audio_banks import gammatone_filterbank, mel_filterbank
from provenn.nn._nn_audio_cqt import CQT1992, CQT1992v2
from provenn.nn._nn_audio_inverse import ISTFT, GriffinLim
from provenn.nn._nn_audio_kernels import cqt_kernels, fourier_kernels
from provenn.nn._nn_audio_mel import MFCC, Gammatonegram, MelSpectrogram
from provenn.nn._nn_audio_recursive import CQT2010, VQT, CQT2010v2
from provenn.nn._nn_audio_stft import STFT

CQT = CQT1992v2

__all__ = [
    "CQT",
    "CQT1992",
    "CQT2010",
    "ISTFT",
    "MFCC",
    "STFT",
    "VQT",
    "CQT1992v2",
    "CQT2010v2",
    "Gammatonegram",
    "GriffinLim",
    "MelSpectrogram",
    "cqt_kernels",
    "fourier_kernels",
    "gammatone_filterbank",
    "mel_filterbank",
]
