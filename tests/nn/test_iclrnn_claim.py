"""The claim's rule on made-up evidence, and its data."""

import pytest
import torch

from provenn.claims.claim import Evidence, Metric, Trial
from provenn.claims.nn._iclrnn_reactor import ARMS, METHOD, Controlled, Network, error, gain, reactor
from provenn.claims.nn.iclrnn import CLAIM


def evidence(final=None, best=None, spread=(0.0, 1e-6, 1e-5)):
    """Errors 2 for all arms but the method, 1, unless given."""
    final, best = ({METHOD: 1.0, **(given or {})} for given in (final, best))
    return Evidence.of(
        {
            ("noisy", arm): {
                "mse_final": [final.get(arm, 2.0)] * 3,
                "mse_best": [best.get(arm, 2.0)] * 3,
                "mpc_spread": list(spread) if arm == METHOD else [1.0] * 3,
            }
            for arm in ARMS
        }
    )


@pytest.mark.parametrize(
    ("made", "outcome"),
    [
        (evidence(), "reproduced"),
        (evidence(spread=(0, 0, 1e-4)), "reproduced"),
        (evidence(spread=(0, 0, 1.01e-4)), "not reproduced"),
        (evidence(best={"RNN": 0.5}), "partly"),  # lowest with final weights only
        (evidence(final={"ICRNN": 0.5}, best={"LRNN": 0.5}), "partly"),  # below RNN and LSTM both ways
        (evidence(final={"ICRNN": 0.5}, best={"LSTM": 0.5}), "not reproduced"),
        (evidence(final={"LRNN": 1.0}), "partly"),  # a tie is not lowest
        (evidence(final={"RNN": 1.0}), "not reproduced"),
        (evidence(best={"RNN": 0.5}, spread=(0, 0, 1)), "not reproduced"),
        (evidence(final=dict.fromkeys(ARMS[1:], 0.5)), "not reproduced"),
    ],
)
def test_rule(made, outcome):
    assert CLAIM.judge(made).outcome == outcome


def test_means_over_seeds_decide():
    made = {
        ("noisy", arm): {"mse_final": [3.0, 0.1, 0.1], "mse_best": [1.0] * 3, "mpc_spread": [0.0] * 3}
        if arm == METHOD
        else {"mse_final": [1.5] * 3, "mse_best": [1.2] * 3, "mpc_spread": [0.0] * 3}
        for arm in ARMS
    }
    assert CLAIM.judge(Evidence.of(made)).outcome == "reproduced"


def test_noise_is_on_training_and_validation_states_alone():
    clean, noisy = (reactor(1, noise, 2, 100, 50, 60) for noise in (0.0, 0.9))
    torch.testing.assert_close(noisy.test, clean.test)
    for held, pure in ((noisy.train, clean.train), (noisy.validation, clean.validation)):
        torch.testing.assert_close(held[0], pure[0])
        assert (held[1] - pure[1]).std().item() == pytest.approx(0.9, rel=0.1)
    assert clean.train[0].shape == (100, 5, 4)
    assert clean.train[1].flatten(0, 1).amin(0).tolist() == [0, 0]
    assert clean.train[1].flatten(0, 1).amax(0).tolist() == [1, 1]


def test_best_epoch_and_noiseless_run_are_reported():
    trial = Trial("noisy", METHOD, 0, "smoke", dict(CLAIM.studies["noisy"].tiers["smoke"].budget), {"lr": 3e-3})
    found = {event.name: event.value for event in CLAIM.run(trial) if isinstance(event, Metric)}
    assert {"mse_final", "mse_best", "clean_mse_final", "clean_mse_best", "gain", "macs", "mpc_spread"} <= set(found)


@pytest.mark.parametrize("arm", ARMS)
def test_networks_are_measured(arm):
    network = Network(arm, 4, 0)
    data = reactor(0, 0.0, 2, 40, 10, 10)
    by_hand = sum((network(x[None]) - y).square().mean().item() for x, y in zip(*data.test, strict=True)) / 10
    assert error(network, data.test) == pytest.approx(by_hand, rel=1e-4)
    assert gain(network, data.train[0], 0) >= 0
    x = torch.tensor([[[0.3, 0.7, -1.0, 0.5]]])
    torch.testing.assert_close(Controlled(network)(x), network(torch.tensor([[[0.3, 0.7, 0.0, 0.75]]])))
