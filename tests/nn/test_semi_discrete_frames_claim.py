"""The claim of generalised scattering: the rule's edges, and the signals."""

import pytest
import torch

from provenn.claims import Evidence
from provenn.claims.nn import _semi_discrete_frames_signals as signals
from provenn.claims.nn import semi_discrete_frames as claim


def draws(seed=0):
    return torch.Generator().manual_seed(seed)


def evidence(share=0.9, falling=1.0, band=1.0, cartoon=0.5, best=0.95, pixels=0.9):
    figures = {
        (claim.TRANSLATION, arm): {
            "largest share of the bound": [0.5, 0.5, share],
            "shifts at which deeper layers change less": [1.0, 1.0, falling],
        }
        for arm in claim.NETWORKS
    }
    figures |= {
        (claim.DEFORMATION, arm): {
            "largest share of the bound": [0.5] * 3,
            "slope, band-limited": [band] * 3,
            "slope, cartoon": [cartoon] * 3,
            "slope, Lipschitz": [1.0] * 3,
        }
        for arm in claim.STUDIES[claim.DEFORMATION]
    }
    figures |= {(claim.CLASSES, arm): {"test accuracy": [0.1] * 3} for arm in claim.STUDIES[claim.CLASSES]}
    figures[claim.CLASSES, "Haar, modulus"] = {"test accuracy": [best] * 3}
    figures[claim.CLASSES, claim.PIXELS] = {"test accuracy": [pixels] * 3}
    return Evidence.of(figures)


@pytest.mark.parametrize(
    ("options", "outcome"),
    [
        ({}, "reproduced"),
        ({"share": 1.0, "cartoon": 0.7, "band": 0.85, "best": 0.9}, "reproduced"),
        ({"share": 1.01}, "not reproduced"),
        ({"cartoon": 0.71}, "partly"),
        ({"cartoon": 0.39}, "partly"),
        ({"band": 1.16}, "partly"),
        ({"falling": 0.875}, "partly"),
        ({"best": 0.89}, "partly"),
        ({"best": 0.89, "falling": 0.5}, "not reproduced"),
    ],
)
def test_the_rule(options, outcome):
    assert claim.judge(evidence(**options)).outcome == outcome


def test_all_networks_are_admissible_and_differ_in_bank_or_nonlinearity():
    for arm in claim.NETWORKS:
        net = claim.network(arm, 16)
        assert net.constants().admissible
        assert len(net(torch.randn(1, 1, 16, 16))) == 4


def test_signals_are_of_their_classes():
    noise = signals.band_limited(2, 32, draws(1))
    spectrum = torch.fft.fft2(noise).abs()
    assert spectrum[..., 8:24, :].max() < 1e-9 * spectrum.max()
    shape = signals.shapes(3, 32, draws(2))
    disc, cone = signals.discs(shape, 32), signals.cones(shape, 32)
    assert set(disc.unique().tolist()) == {0.0, 1.0}
    assert ((cone > 0) == (disc > 0)).all()
    assert (cone - cone.roll(1, 2)).abs().max() <= 1 / shape[1].min()
    tau = signals.displacement(32, draws(3))
    assert tau.abs().max() == 1
    shifted = signals.discs(shape, 32, torch.tensor([3.0, -2.0]).view(2, 1, 1).double())
    assert torch.equal(shifted, disc.roll((3, -2), (2, 3)))
