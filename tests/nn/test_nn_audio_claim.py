"""The rule of nnAudio's claim on made-up evidence, and its references against the layers' definitions."""

import numpy as np
import pytest
import torch

from provenn.claims import Evidence
from provenn.claims.nn import _nn_audio_reference as reference
from provenn.claims.nn import nn_audio as claim

SEEDS = 3


def evidence(exact=1e-6, near=0.01, time=1.0, old_time=5.0, stft=0.4, mel=0.9, fixed=1.0):
    deviations = {name: exact if name in claim.EXACT_LAYERS else near for name in reference.REFERENCES}
    times = {name: old_time if name == "CQT1992" else time for name in claim.TIMED}
    losses = {
        claim.STFT_TRAINED: stft * fixed,
        claim.STFT_FIXED: fixed,
        claim.MEL_TRAINED: mel * fixed,
        claim.MEL_FIXED: fixed,
    }
    return Evidence.of(
        {
            **{("agreement", name): {"deviation": [value] * SEEDS} for name, value in deviations.items()},
            **{("speed", name): {"ms_a_second": [value] * SEEDS} for name, value in times.items()},
            **{("tones", name): {"test_loss": [value] * SEEDS} for name, value in losses.items()},
        }
    )


@pytest.mark.parametrize(
    ("changes", "outcome"),
    [
        ({}, "reproduced"),
        ({"stft": 0.9, "mel": 0.4}, "reproduced"),
        ({"exact": 1e-4, "near": 0.02}, "reproduced"),
        ({"fixed": 1e-6}, "reproduced"),
        ({"stft": 0.5, "mel": 0.5}, "partly"),
        ({"old_time": 1.0}, "partly"),
        ({"stft": 0.9, "old_time": 0.5}, "not reproduced"),
        ({"exact": 1.01e-4}, "not reproduced"),
        ({"near": 0.0201}, "not reproduced"),
    ],
)
def test_verdicts(changes, outcome):
    assert claim.judge(evidence(**changes)).outcome == outcome


def test_one_seed_that_deviates_is_enough():
    cells = evidence()
    worse = Evidence.of({("agreement", "STFT"): {"deviation": [1e-6, 1e-3, 1e-6]}}).cells
    assert claim.judge(Evidence({**cells.cells, **worse})).outcome == "not reproduced"


def test_reason_names_the_figures():
    reason = claim.judge(evidence()).reason
    assert all(figure in reason for figure in ("1.0e-06", "1.00%", "1.00 ms", "5.00 ms", "0.40", "0.90"))


def test_reference_frames_are_centred():
    x = np.arange(2000.0)[None]
    cut = reference.frames(x, 64)
    assert cut.shape == (1, 2000 // reference.HOP + 1, 64)
    assert cut[0, 2, 32] == 2 * reference.HOP
    np.testing.assert_array_equal(cut[0, 0, :32], np.arange(32, 0, -1))


def test_tones_are_what_their_targets_say():
    x, y = claim.tones(50)
    spectrum = torch.fft.rfft(x * torch.hann_window(claim.TONE_SAMPLES), 16000).abs()
    np.testing.assert_allclose(spectrum.argmax(1) / 2, y * claim.HIGHEST_TONE, atol=2)
    assert torch.equal(claim.tones(50)[0], x)


@pytest.mark.parametrize("arm", [claim.STFT_TRAINED, claim.STFT_FIXED, claim.MEL_TRAINED, claim.MEL_FIXED])
def test_arms_differ_in_training_alone(arm):
    front = claim.tone_front(arm)
    assert bool(list(front.parameters())) == (arm in (claim.STFT_TRAINED, claim.MEL_TRAINED))
    twin = claim.tone_front(arm.replace("trained", "fixed"))
    x = claim.tones(3)[0]
    torch.testing.assert_close(front(x), twin(x), rtol=1e-3, atol=1e-4)
    assert front(x).shape == (3, 128, 7)


def test_clips_are_of_three_kinds():
    x = claim.clips(0, 4, spoken=False)
    assert x.shape == (4, claim.RATE)
    assert not torch.equal(x, claim.clips(1, 4, spoken=False))
    assert torch.equal(x, claim.clips(0, 4, spoken=False))
    assert 0.3 < x[0].std() < 0.4  # a chirp of amplitude ½
