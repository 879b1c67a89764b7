"""The rule of subsampled attention's claim on made-up figures, and what its runs count and share."""

import pytest
import torch

from provenn.claims import Evidence
from provenn.claims.claim import Metric, Trial
from provenn.claims.nn import stochastic_subsampled_attention as claim
from provenn.core.experiment.accounting import multiply_accumulates
from provenn.core.experiment.seeding import seeded

# Fine-tuned bits, their reduction, bits sampled to the end, their reduction, mean sub-model, ensemble of 16.
GOOD = (2.50, 3.0, 2.505, 3.9, 2.60, 2.50)
DEAR = (2.50, 3.0, 2.505, 3.4, 2.60, 2.50)
WORSE = (2.60, 3.0, 2.60, 3.9, 2.70, 2.59)
APART = (2.50, 3.0, 2.505, 3.9, 2.60, 2.58)
NEITHER = (2.60, 3.0, 2.60, 3.9, 2.70, 2.69)


def evidence(local, unbiased, dense=2.50, dropout=2.60):
    names = ("test_bits", "reduction", "test_bits_sampled", "reduction_sampled", "sub_model_bits", "ensemble_bits")
    figures = {}
    for arm, row in ((claim.LOCAL, local), (claim.UNBIASED, unbiased)):
        figures[claim.STUDY, arm] = {
            name: [one - 0.002, one, one + 0.002] if "bits" in name else [one] * 3
            for name, one in zip(names, row, strict=True)
        }
    for arm, bits in ((claim.DENSE, dense), (claim.DROPOUT, dropout)):
        figures[claim.STUDY, arm] = {"test_bits": [bits + 0.001, bits, bits - 0.001]}
    return Evidence.of(figures)


@pytest.mark.parametrize(
    ("local", "unbiased", "outcome"),
    [
        (GOOD, NEITHER, "reproduced"),
        (NEITHER, GOOD, "reproduced"),
        (DEAR, NEITHER, "partly"),  # the ensemble alone
        (WORSE, NEITHER, "partly"),
        (APART, NEITHER, "partly"),  # as good for less work alone
        (APART, WORSE, "partly"),  # each half by another arm
        (NEITHER, NEITHER, "not reproduced"),
        # The thresholds' edges: bits, work, sub-models, dense evaluation.
        ((2.70, 3.0, 2.509, 3.6, 2.60, 2.50), NEITHER, "reproduced"),
        ((2.70, 3.0, 2.511, 3.6, 2.60, 2.50), NEITHER, "partly"),
        ((2.70, 3.0, 2.509, 3.49, 2.60, 2.50), NEITHER, "partly"),
        ((2.50, 3.51, 2.70, 3.9, 2.75, 2.69), NEITHER, "reproduced"),
        ((2.50, 3.0, 2.505, 3.9, 2.521, 2.50), NEITHER, "reproduced"),
        ((2.50, 3.0, 2.505, 3.9, 2.519, 2.50), NEITHER, "partly"),
        ((2.50, 3.0, 2.505, 3.9, 2.60, 2.504), NEITHER, "reproduced"),
        ((2.50, 3.0, 2.505, 3.9, 2.60, 2.506), NEITHER, "partly"),
    ],
)
def test_judge(local, unbiased, outcome):
    assert claim.judge(evidence(local, unbiased)).outcome == outcome


def test_the_better_dense_arm_is_the_baseline():
    for dense, dropout in ((2.40, 2.60), (2.60, 2.40)):
        verdict = claim.judge(evidence(GOOD, NEITHER, dense, dropout))
        assert verdict.outcome == "partly"
        assert ("dropout" in verdict.reason.split("(")[0]) == (dropout < dense)


SIZES = {"dim": 16, "depth": 2, "heads": 2, "length": 32, "sparsity": 4}


def test_arms_share_weights_and_differ_in_attention():
    models = {}
    for arm in (*claim.METHODS, *claim.BASELINES):
        with seeded(0):
            models[arm] = claim.language_model(arm, 9, SIZES)
    tokens = torch.randint(9, (2, 32), generator=torch.Generator().manual_seed(0))
    outputs = [model.eval()(tokens) for model in models.values()]
    for one in outputs[1:]:
        torch.testing.assert_close(one, outputs[0])
    layers = {arm: model.blocks[0].attention.layer for arm, model in models.items()}
    assert {arm: (one.sparsity, one.bias, one.dropout) for arm, one in layers.items()} == {
        claim.LOCAL: (4, "local", 0.0),
        claim.UNBIASED: (4, "none", 0.0),
        claim.DENSE: (1, "none", 0.0),
        claim.DROPOUT: (1, "none", 0.1),
    }
    later = tokens.clone()
    later[:, 20:] = 0
    torch.testing.assert_close(models[claim.LOCAL](later)[:, :20], outputs[0][:, :20])


def test_the_counted_work_is_the_layers():
    assert claim.reduction(128, 4, 0.0) == pytest.approx(128 / 33)
    assert claim.reduction(128, 4, 0.1) == pytest.approx(1 / (0.9 * 33 / 128 + 0.1))
    costs = []
    for arm in (claim.DENSE, claim.LOCAL):
        layer = claim.language_model(arm, 9, SIZES).blocks[0].attention.layer
        heads = torch.zeros(1, 2, 32, 8)
        counted = multiply_accumulates(
            lambda layer=layer, heads=heads: layer.attend(heads, heads, heads, None, True, False)
        )
        costs.append(counted)
    own = 2 * 32 * 16  # products and values of own sources, elementwise
    assert costs[0] / (costs[1] + own) == pytest.approx(claim.reduction(32, 4, 0.0))


def test_a_run_trains_the_last_part_twice_from_one_state():
    budget = claim.CLAIM.studies[claim.STUDY].tiers["smoke"].budget
    trial = Trial(claim.STUDY, claim.LOCAL, 0, "smoke", budget, {"lr": 1e-3})
    events = [list(claim.run(trial)) for _ in range(2)]
    metrics = [{one.name: one.value for one in run if isinstance(one, Metric)} for run in events]
    assert metrics[0] == metrics[1]
    assert metrics[0]["test_bits"] != metrics[0]["test_bits_sampled"]
    assert metrics[0]["test_bits"] == pytest.approx(metrics[0]["test_bits_sampled"], abs=0.05)
    assert metrics[0]["ensemble_bits"] <= metrics[0]["sub_model_bits"]
    tuning = {one.name for one in claim.run(Trial(claim.STUDY, claim.LOCAL, 0, "smoke", budget, {"lr": 1e-3}, True))
              if isinstance(one, Metric)}  # fmt: skip
    assert tuning == {"validation_bits"}
