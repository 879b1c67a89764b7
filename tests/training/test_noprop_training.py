"""That NoProp's blocks learn alone, in any order and process, and that all trainers classify."""

import copy
import itertools
import subprocess
import sys

import pytest
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F

from provenn.training import (
    DenoisingBlock,
    DifferenceTargetPropagation,
    ForwardForwardTrainer,
    NoPropCT,
    NoPropDT,
    NoPropFM,
    VelocityBlock,
)


@pytest.fixture(autouse=True)
def _seeded():
    """Weights that a test draws are the same in every run and order."""
    torch.manual_seed(0)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def small(samples=30):
    y = torch.arange(samples) % 3
    return torch.randn(samples, 5, generator=generator()) + torch.eye(3, 5)[y], y


def block(embed_dim=3):
    """With dropout and batch normalisation, so that random numbers and buffers matter."""
    features = nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.3))
    return DenoisingBlock(features, 8, embed_dim, 3, hidden=8)


def trainer(**options):
    return NoPropDT(block, num_blocks=3, **{"epochs": 2, "batch_size": 8, "seed": 5, **options})


def state(module):
    return {name: value.clone() for name, value in module.state_dict().items()}


def same(one, other):
    return set(one) == set(other) and all(torch.equal(one[name], other[name]) for name in one)


def test_training_a_block_leaves_all_others_bitwise_alone():
    held = trainer()
    others = [held.model.blocks[0], held.model.blocks[2], held.model.head, held.embeddings]
    for module in others:
        for parameter in module.parameters():
            parameter.grad = torch.ones_like(parameter)
    before, own = [state(module) for module in others], state(held.model.blocks[1])
    held.fit_block(2, *small())
    assert all(same(state(module), kept) for module, kept in zip(others, before, strict=True))
    assert all((p.grad == 1).all() for module in others for p in module.parameters())
    assert not same(state(held.model.blocks[1]), own)


def test_a_blocks_loss_reaches_no_other_block():
    held = trainer()
    x, y = small()
    held.block_loss(2, x, y, held.embeddings.weight, generator()).backward()
    assert all(p.grad is not None for p in held.model.blocks[1].parameters())
    for module in (held.model.blocks[0], held.model.blocks[2], held.model.head):
        assert all(p.grad is None for p in module.parameters())


def test_the_order_of_the_blocks_does_not_matter_and_equals_the_loop():
    whole, apart = trainer(), trainer()
    whole.fit(*small())
    for t in (3, 1, 2):
        apart.fit_block(t, *small())
    apart.fit_head(*small())
    assert same(state(whole.model), state(apart.model))
    start = trainer()
    assert not any(same(state(a), state(b)) for a, b in zip(start.model.blocks, whole.model.blocks, strict=True))


WORKER = """
import sys, torch
sys.path[:0] = [{tests!r}]
from test_noprop_training import small, trainer
held = trainer()
held.fit_block(int(sys.argv[1]), *small())
torch.save(held.model.blocks[int(sys.argv[1]) - 1].state_dict(), sys.argv[2])
"""


@pytest.mark.slow  # three fresh interpreters, two at a time, each of which imports torch
def test_blocks_trained_in_processes_of_their_own_equal_the_loop(tmp_path):
    from pathlib import Path

    script = tmp_path / "worker.py"
    script.write_text(WORKER.format(tests=str(Path(__file__).parent)))
    running = [subprocess.Popen([sys.executable, str(script), str(t), str(tmp_path / f"{t}.pt")]) for t in (1, 2, 3)]
    assert [process.wait(timeout=250) for process in running] == [0, 0, 0]
    whole, joined = trainer(), trainer()
    whole.fit(*small())
    for t in (1, 2, 3):
        joined.model.blocks[t - 1].load_state_dict(torch.load(tmp_path / f"{t}.pt"))
    assert same(state(whole.model.blocks), state(joined.model.blocks))


def test_blocks_start_from_weights_of_their_own():
    first, second = trainer().model.blocks[:2]
    assert not torch.equal(first.features[0].weight, second.features[0].weight)


@pytest.mark.parametrize("make", [lambda **o: NoPropDT(lambda: block(5), num_blocks=2, **o), "ct", "fm"])
def test_embeddings_train_only_where_they_are_learned(make):
    if make == "ct":
        make = lambda **o: NoPropCT(DenoisingBlock.for_vectors(5, 5, 3, hidden=8, time_dim=4), **o)  # noqa: E731
    elif make == "fm":
        make = lambda **o: NoPropFM(VelocityBlock.for_vectors(5, 5, 3, hidden=8, time_dim=4), **o)  # noqa: E731
    learned = make(embedding="learned", epochs=1, batch_size=8)
    start = learned.embeddings.weight.detach().clone()
    torch.testing.assert_close(start @ start.T, torch.eye(3))
    learned.fit(*small())
    assert (learned.embeddings.weight != start).all()
    chosen = make(embedding="prototype", epochs=1, batch_size=8, lr=1e-9, weight_decay=0.0)
    x, y = small()
    chosen.fit(x, y)
    for label, row in enumerate(chosen.embeddings.weight):
        assert (x[y == label] - row).abs().sum(1).min() < 1e-5
    with pytest.raises(ValueError, match="embed_dim"):
        make()


def test_a_fixed_schedule_stays_and_a_learned_one_moves():
    def fitted(learn):
        network = DenoisingBlock.for_vectors(5, 3, 3, hidden=8, batch_norm=False, time_dim=4)
        held = NoPropCT(network, learn_schedule=learn, epochs=1, batch_size=8)
        before = state(held.schedule)
        held.fit(*small())
        return [not torch.equal(before[name], value) for name, value in held.schedule.state_dict().items()]

    assert not any(fitted(False))
    assert all(fitted(True))


def test_a_loader_gives_what_its_batches_hold():
    x, y = small(16)
    loader = [(x[:8], y[:8]), (x[8:], y[8:])]
    held = trainer(epochs=1)
    held.fit(loader)
    other = trainer(epochs=1)
    for t, data in ((1, loader), (2, loader), (3, loader)):
        other.fit_block(t, data)
    assert same(state(held.model.blocks), state(other.model.blocks))
    with pytest.raises(ValueError, match="labels"):
        trainer().fit([(x, y + 1)])


def test_a_last_batch_of_one_sample_is_left_out():
    result = trainer(epochs=1).fit(*small(25))  # 8 + 8 + 8 + 1
    assert result.history[0].step == 3 * 3


def test_predictions_repeat_and_draws_average():
    held = trainer()
    held.fit(*small())
    x, _ = small()
    assert torch.equal(held.predict_proba(x), held.predict_proba(x))
    assert not torch.equal(held.predict_proba(x, generator=generator(1)), held.predict_proba(x, generator=generator(2)))
    draws = generator(3)
    single = torch.stack([held.predict_proba(x, generator=draws) for _ in range(4)])
    torch.testing.assert_close(held.predict_proba(x, generator=generator(3), draws=4), single.mean(0))
    torch.testing.assert_close(single[0].sum(1), torch.ones(30))
    assert held.model.training == trainer().model.training


def test_inference_is_the_chain_of_blocks_with_noise():
    """Written out with the blocks' coefficients, drawing the same noise in the same order."""
    held = trainer()
    held.fit(*small())
    x, _ = small()
    draws = generator(7)
    held.model.eval()
    with torch.no_grad():
        z = torch.randn(30, 3, generator=draws)
        a, b, c, _, _ = held.model.coefficients
        for index, one in enumerate(held.model.blocks):
            guess = one(z, x, torch.eye(3))
            z = (
                a[index].float() * guess
                + b[index].float() * z
                + c[index].sqrt().float() * torch.randn(30, 3, generator=draws)
            )
        expected = held.model.head(z).softmax(1)
    torch.testing.assert_close(held.predict_proba(x, generator=generator(7)), expected)


def relu_layers(*widths):
    return nn.Sequential(*(nn.Sequential(nn.Linear(a, b), nn.ReLU()) for a, b in itertools.pairwise(widths)))


def test_forward_forwards_loss_written_out():
    layers = relu_layers(5 + 3, 6, 4).double()
    x, y = small(9)
    x = x.double()
    held = ForwardForwardTrainer(layers, 3, threshold=1.5, label_scale=2.0)
    loss = held.loss(x, y, generator(2))
    wrong = (y + torch.randint(1, 3, (9,), generator=generator(2))) % 3
    assert (wrong != y).all()
    expected = torch.zeros(())
    for labels, sign in ((y, 1), (wrong, -1)):
        inputs = torch.cat([x, 2 * torch.eye(3, dtype=torch.float64)[labels]], 1)
        for layer in layers:
            outputs = layer(inputs)
            goodness = (outputs**2).mean(1)
            probability = torch.sigmoid(sign * (goodness - 1.5))
            expected = expected - probability.log().mean() / 2
            inputs = outputs / ((outputs**2).mean(1, keepdim=True) + 1e-8).sqrt()  # a layer may be silent
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
    loss.backward()
    alone = copy.deepcopy(layers[0])
    both = torch.cat([torch.cat([x, 2 * torch.eye(3).double()[one]], 1) for one in (y, wrong)])
    margin = ((alone(both) ** 2).mean(1) - 1.5) * torch.cat([torch.ones(9), -torch.ones(9)])
    alone.zero_grad()
    F.softplus(-margin).mean().backward()
    torch.testing.assert_close(layers[0][0].weight.grad, alone[0].weight.grad)  # nothing comes from the second layer


def test_the_targets_of_target_propagation():
    """With exact inverses of linear layers the targets are the outputs' step carried back by the inverse matrices."""
    draws = generator(4)
    layers = [nn.Linear(4, 4, bias=False, dtype=torch.float64) for _ in range(3)]
    layers.append(nn.Linear(4, 3, dtype=torch.float64))
    inverses = [nn.Linear(4, 4, bias=False, dtype=torch.float64) for _ in range(2)]
    with torch.no_grad():
        for layer in layers[:3]:
            layer.weight.copy_(torch.eye(4) + 0.1 * torch.randn(4, 4, generator=draws))
        for inverse, layer in zip(inverses, layers[1:3], strict=True):
            inverse.weight.copy_(layer.weight.inverse())
    held = DifferenceTargetPropagation(layers, inverses, target_step=0.5, noise=0.0)
    x, y = torch.randn(6, 4, generator=draws, dtype=torch.float64), torch.arange(6) % 3
    hidden, targets = held.targets(x, y)
    with torch.no_grad():
        slope = (layers[3](hidden[2]).softmax(1) - F.one_hot(y, 3)) @ layers[3].weight
        shift = -0.5 * slope
        for place in (2, 1, 0):
            torch.testing.assert_close(targets[place] - hidden[place], shift)
            shift = shift @ layers[place].weight.inverse().T
    loss = held.loss(x, y, generator())
    squares = sum((a - b).square().sum(1).mean() for a, b in zip(hidden, targets, strict=True))
    torch.testing.assert_close(loss, squares + F.cross_entropy(layers[3](hidden[2]), y))  # inverses are exact
    loss.backward()
    inputs = [x, *hidden]
    for layer, before, target, here in zip(layers[:3], inputs, targets, hidden, strict=False):
        torch.testing.assert_close(layer.weight.grad, 2 * (here - target).T @ before / 6)  # its own loss alone


def test_inverses_learn_to_undo_their_layers():
    layers = [nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3)]
    inverse = nn.Linear(4, 4)
    held = DifferenceTargetPropagation(layers, [inverse], epochs=150, batch_size=30, lr=1e-2, target_step=0.01)
    x = torch.randn(60, 4, generator=generator())

    def error():
        with torch.no_grad():
            before = layers[0](x)
            return ((inverse(layers[1](before)) - before).square().sum() / before.square().sum()).item()

    start = error()
    held.fit(x, torch.arange(60) % 3)
    assert error() < 0.1 * start


@pytest.fixture(scope="module")
def digits():
    bundle = load_digits()
    x, y = torch.from_numpy(bundle.data).float() / 8 - 1, torch.from_numpy(bundle.target)
    return (x[:1200], y[:1200]), (x[1200:], y[1200:])


WIDE = {"batch_size": 64, "lr": 3e-3}


def arms():
    tanh = [nn.Sequential(nn.Linear(a, b), nn.Tanh()) for a, b in ((64, 64), (64, 64))]
    return {
        "DT": (lambda: NoPropDT(lambda: DenoisingBlock.for_vectors(64, 10, 10, hidden=64), 2, epochs=5, **WIDE), 0.5),
        "DT, learned": (
            lambda: NoPropDT(lambda: DenoisingBlock.for_vectors(64, 20, 10, hidden=64), 2, "learned", epochs=5, **WIDE),
            0.85,
        ),
        "DT, prototypes of images": (
            lambda: NoPropDT(
                lambda: DenoisingBlock.for_images((1, 8, 8), 64, 10, channels=(8, 16), hidden=64, dropout=0.0),
                2,
                "prototype",
                epochs=3,
                **WIDE,
            ),
            0.6,
        ),
        "CT": (
            lambda: NoPropCT(
                DenoisingBlock.for_vectors(64, 10, 10, hidden=64, batch_norm=False, time_dim=16), epochs=15, **WIDE
            ),
            0.8,
        ),
        "FM": (
            lambda: NoPropFM(
                VelocityBlock.for_vectors(64, 10, 10, hidden=64, batch_norm=False, time_dim=16), epochs=15, **WIDE
            ),
            0.8,
        ),
        "forward-forward": (lambda: ForwardForwardTrainer(relu_layers(74, 128, 128), 10, epochs=15, **WIDE), 0.6),
        "difference target propagation": (
            lambda: DifferenceTargetPropagation(
                [*tanh, nn.Linear(64, 10)], [nn.Sequential(nn.Linear(64, 64), nn.Tanh())], epochs=10, **WIDE
            ),
            0.8,
        ),
    }


@pytest.mark.parametrize("name", arms())
def test_digits_are_told_apart(digits, name):
    """Chance is 0.1; the bounds lie some way under what is reached."""
    make, bound = arms()[name]
    (x, y), (x_test, y_test) = digits
    if "images" in name:
        x, x_test = x.view(-1, 1, 8, 8), x_test.view(-1, 1, 8, 8)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        held = make()
    held.fit(x, y)
    assert (held.predict(x_test) == y_test).float().mean() > bound
