"""AF-KAN's claim: the rule's edges, and networks of one size."""

import numpy as np
import pytest

from provenn.claims import Evidence
from provenn.claims.nn import af_kan as claim

RBF_FULL, RBF_MATCHED, SPLINE_MATCHED = "RBF KAN, full width", "RBF KAN, matched", "B-spline KAN, matched"


def evidence(noise=0.0005, **changed):
    means = dict.fromkeys(claim.ARMS, 0.9) | {claim.AF: 0.93, claim.MLP: 0.92} | dict.fromkeys(claim.FULL, 0.93)
    means |= changed
    wiggle = np.array([-1, -0.5, 0, 0.5, 1]) * noise
    return Evidence.of(
        {
            (claim.STUDY, arm): {
                "test accuracy": (means[arm] + (wiggle if arm == claim.AF else 0 * wiggle)).tolist(),
                "parameters": [1000.0] * 5,
            }
            for arm in claim.ARMS
        }
    )


@pytest.mark.parametrize(
    ("options", "outcome"),
    [
        ({}, "reproduced"),
        ({RBF_FULL: 0.94}, "reproduced"),
        ({RBF_FULL: 0.941}, "partly"),
        ({"MLP": 0.9303}, "partly"),
        ({"MLP": 0.933}, "partly"),
        ({"MLP": 0.9331}, "not reproduced"),
        ({"noise": 0.05}, "partly"),
        ({RBF_MATCHED: 0.931}, "not reproduced"),
        ({SPLINE_MATCHED: 0.9299, "noise": 0.01}, "partly"),
    ],
)
def test_the_rule(options, outcome):
    assert claim.judge(evidence(**options)).outcome == outcome


def test_matched_networks_have_af_kans_parameters_at_most_and_the_full_ones_more():
    own = claim.count(claim.network(claim.AF, 64, 16))
    for arm in claim.MATCHED:
        assert 0.7 * own < claim.count(claim.network(arm, 64, 16)) <= own
    for arm in claim.FULL:
        assert claim.count(claim.network(arm, 64, 16)) > 4 * own
    assert 0.9 * own < claim.count(claim.network(claim.MLP, 64, 16)) <= own


def test_parts_of_the_data_do_not_overlap():
    (x, _), (held, _), (test, _) = claim.images_of("digits", 1000)
    assert (len(x), len(held), len(test)) == (1000, 200, 200)
    rows = [set(map(tuple, part.tolist())) for part in (x, held, test)]
    assert not rows[0] & rows[1] | rows[0] & rows[2] | rows[1] & rows[2]
    assert -1 <= x.min() < x.max() <= 1
