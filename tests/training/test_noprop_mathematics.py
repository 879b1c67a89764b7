"""NoProp's formulas against Gaussian algebra, simulation, exact paths of the flow, and finite differences."""

import itertools
import math

import numpy as np
import pytest
import torch

from provenn.training import (
    DenoisingBlock,
    GammaSchedule,
    NoPropCT,
    NoPropDT,
    NoPropFM,
    VelocityBlock,
    cosine_schedule,
    ddpm_coefficients,
)
from provenn.training._noprop_data import prototypes
from provenn.training._noprop_paths import integrate
from provenn.training._noprop_trainer import prior_divergence

ALPHAS = torch.tensor([0.7, 0.4, 0.9, 0.6, 0.95], dtype=torch.float64)  # T = 4, in no order
SCHEDULES = {"cosine": cosine_schedule(7), "any": ALPHAS}


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("alphas", SCHEDULES.values(), ids=SCHEDULES)
def test_composing_the_noise_backwards_gives_the_closed_form(alphas):
    held = ddpm_coefficients(alphas)
    mean, variance = alphas[-1].sqrt(), 1 - alphas[-1]  # of z_T, in units of u
    for t in range(len(alphas) - 1, -1, -1):
        assert mean.item() == pytest.approx(held.alpha_bars[t].sqrt().item(), abs=1e-12)
        assert variance.item() == pytest.approx(1 - held.alpha_bars[t].item(), abs=1e-12)
        if t > 0:  # q(z_{t−1} | z_t)
            mean = alphas[t - 1].sqrt() * mean
            variance = alphas[t - 1] * variance + 1 - alphas[t - 1]


@pytest.mark.parametrize("alphas", SCHEDULES.values(), ids=SCHEDULES)
def test_coefficients_are_the_gaussian_conditioned_on_the_noisier_one(alphas):
    """Condition the joint Gaussian of (z_T, …, z_0) given u, built as a linear system, on z_{t−1}."""
    held, steps = ddpm_coefficients(alphas), len(alphas)
    system = np.eye(steps)  # rows: z_T, z_{T−1}, …, z_0; each less its share of the one before is noise
    for row in range(1, steps):
        system[row, row - 1] = -math.sqrt(alphas[steps - 1 - row])
    noise = np.diag(1 - alphas.flip(0).numpy())
    inverse = np.linalg.inv(system)
    covariance = inverse @ noise @ inverse.T
    means = inverse[:, 0] * math.sqrt(alphas[-1])
    for t in range(1, steps):
        here, before = steps - 1 - t, steps - t
        b = covariance[here, before] / covariance[before, before]
        a = means[here] - b * means[before]
        c = covariance[here, here] - b * covariance[before, here]
        found = [held.a[t - 1].item(), held.b[t - 1].item(), held.c[t - 1].item()]
        assert found == pytest.approx([a, b, c], abs=1e-12)
        mean = held.a[t - 1] + held.b[t - 1] * held.alpha_bars[t - 1].sqrt()
        assert mean.item() == pytest.approx(held.alpha_bars[t].sqrt().item(), abs=1e-12)


def test_the_cosine_schedule_and_its_signal_to_noise_ratio():
    for blocks in (1, 2, 10, 100):
        held = ddpm_coefficients(cosine_schedule(blocks))
        angles = np.arange(1, blocks + 2) * math.pi / 2 / (blocks + 2)
        np.testing.assert_allclose(held.alpha_bars, 1 - np.cos(angles) ** 2, atol=1e-12)
        np.testing.assert_allclose(held.snr, np.tan(angles) ** 2, rtol=1e-9)  # sin²/cos²
        assert (held.snr.diff() > 0).all()
        assert held.snr.diff().sum().item() == pytest.approx((held.snr[-1] - held.snr[0]).item())


def test_an_alpha_near_one_is_clamped_with_a_warning():
    with pytest.warns(UserWarning, match="alphas"):
        held = ddpm_coefficients(torch.tensor([0.5, 1 - 1e-9], dtype=torch.float64))
    assert held.alpha_bars[-1] == 1 - 1e-6
    assert held.snr.isfinite().all()


def test_the_priors_divergence_is_that_of_torch():
    u, alpha_bar = torch.randn(5, 3, generator=generator(), dtype=torch.float64), torch.tensor(0.3).double()
    ours = torch.distributions.Normal(alpha_bar.sqrt() * u, (1 - alpha_bar).sqrt())
    divergence = torch.distributions.kl_divergence(ours, torch.distributions.Normal(torch.zeros(()).double(), 1.0))
    assert prior_divergence(u, alpha_bar).item() == pytest.approx(divergence.sum(1).mean().item(), rel=1e-12)


class Perfect(DenoisingBlock):
    """A block that knows the class: û = u of the class that x holds."""

    def step(self, z, encoded, embeddings, t=None):
        return embeddings[encoded[:, 0].long()]


def perfect(embed_dim=3, time_dim=None):
    return Perfect(torch.nn.Identity(), 1, embed_dim, 3, hidden=1, batch_norm=False, time_dim=time_dim)


def test_perfect_blocks_end_in_the_distribution_that_the_head_was_trained_on():
    """From z_0 ~ q(z_0 | y), with noise c_t: mean √ᾱ_T u and variance 1 − ᾱ_T; four standard errors of 1e5 draws."""
    trainer = NoPropDT(perfect, num_blocks=4, schedule=ALPHAS)
    network, count = trainer.model, 100_000
    ends = []
    network.head = torch.nn.Identity()
    u = torch.eye(3)[torch.tensor([1])]
    alpha_bars = network.coefficients.alpha_bars.tolist()
    start = alpha_bars[0] ** 0.5 * u + (1 - alpha_bars[0]) ** 0.5 * torch.randn(count, 3, generator=generator(1))
    with torch.no_grad():
        ends = network(torch.ones(count, 1), start, generator(2))
    spread = math.sqrt(1 - alpha_bars[-1])
    torch.testing.assert_close(ends.mean(0), alpha_bars[-1] ** 0.5 * u[0], rtol=0, atol=4 * spread / count**0.5)
    expected = torch.full((3,), spread**2)
    torch.testing.assert_close(ends.var(0), expected, rtol=4 * (2 / count) ** 0.5, atol=0)


def test_guesses_lie_in_the_convex_hull_of_the_embeddings():
    block = DenoisingBlock.for_vectors(4, 5, 3, hidden=8).double().eval()
    embeddings = torch.randn(3, 5, generator=generator(), dtype=torch.float64)
    z, x = (torch.randn(50, size, generator=generator(size), dtype=torch.float64) for size in (5, 4))
    guess = block(10 * z, 10 * x, embeddings)
    ones = torch.ones(1, 50, dtype=torch.float64)
    system = torch.cat([embeddings.T, torch.ones(1, 3, dtype=torch.float64)])
    weights = torch.linalg.lstsq(system, torch.cat([guess.T, ones])).solution
    torch.testing.assert_close(system @ weights, torch.cat([guess.T, ones]), atol=1e-9, rtol=0)
    assert weights.min() > -1e-9
    assert weights.std(1).min() > 1e-3  # guesses differ: z and x matter


def test_what_a_block_sees():
    """A different x, z or t changes the outcome: no branch is left out."""
    block = DenoisingBlock.for_vectors(4, 3, 3, hidden=16, batch_norm=False, time_dim=8)
    z, x, t = torch.ones(1, 3), torch.ones(1, 4), torch.full((1,), 0.2)
    first = block(z, x, torch.eye(3), t)
    for other in ((-z, x, t), (z, -x, t), (z, x, t + 0.1)):
        assert not torch.allclose(first, block(other[0], other[1], torch.eye(3), other[2]), atol=1e-4)


@pytest.fixture
def schedule():
    held = GammaSchedule(-2.0, 3.0).double()
    with torch.no_grad():
        for index, parameter in enumerate(held.parameters()):
            parameter += 0.3 * torch.randn(parameter.shape, generator=generator(index), dtype=torch.float64)
    return held


def test_the_learned_schedule_falls_between_its_ends(schedule):
    t = torch.linspace(0, 1, 1001, dtype=torch.float64)
    gamma = schedule(t)
    assert (gamma.diff() < 0).all()
    assert gamma[-1].item() == pytest.approx(schedule.gamma_0.item(), abs=1e-12)
    assert GammaSchedule(-2.0, 3.0)(torch.tensor([0.0, 1.0])).tolist() == pytest.approx([3.0, -2.0], abs=1e-5)
    torch.testing.assert_close(schedule.snr(t), schedule.alpha_bar(t) / (1 - schedule.alpha_bar(t)))


def test_rates_of_the_learned_schedule_by_autograd_and_by_differences(schedule):
    t = torch.linspace(0.01, 0.99, 50, dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(schedule.snr(t).sum(), t)
    torch.testing.assert_close(schedule.snr_rate(t), slope, rtol=1e-10, atol=0)
    with torch.no_grad():
        step = 1e-5
        differences = (schedule.snr(t + step) - schedule.snr(t - step)) / (2 * step)
        torch.testing.assert_close(schedule.snr_rate(t), differences, rtol=1e-7, atol=0)
        differences = (schedule(t - step) - schedule(t + step)) / (2 * step)
        torch.testing.assert_close(schedule.rate(t), differences, rtol=1e-7, atol=0)
    assert all(parameter.requires_grad for parameter in schedule.parameters())


def continuous(schedule, inference, solver=None):
    network = perfect(time_dim=2).double()
    trainer = NoPropCT(network, inference=inference, solver=solver)
    trainer.schedule.load_state_dict(schedule.state_dict())
    return trainer


U = torch.tensor([[0.3, -1.2, 0.8]], dtype=torch.float64)


@pytest.mark.parametrize(("solver", "order"), [("euler", 1), ("heun", 2)])
def test_the_flow_converges_to_its_exact_path(schedule, solver, order):
    trainer = continuous(schedule, "flow")
    start = torch.randn(4, 3, generator=generator(), dtype=torch.float64)
    first, last = schedule.alpha_bar(torch.tensor([0.0, 1.0]).double())
    exact = last.sqrt() * U + ((1 - last) / (1 - first)).sqrt() * (start - first.sqrt() * U)
    with torch.no_grad():
        errors = [
            (integrate(lambda z, t: trainer.velocity(z, U.expand_as(z), t), start, steps, solver) - exact)
            .abs()
            .max()
            .item()
            for steps in (80, 160, 320)
        ]
    observed = [math.log2(a / b) for a, b in itertools.pairwise(errors)]
    assert observed == pytest.approx([order, order], abs=0.15)


def test_discrete_blocks_tend_to_the_stochastic_equation(schedule):
    """(a, b − 1, c) / Δt from ᾱ at two near times, against the equation's coefficients: the error halves with Δt."""
    trainer = continuous(schedule, "sde")
    t = torch.tensor([0.4], dtype=torch.float64)
    with torch.no_grad():
        zero, one = torch.zeros(1, 1, dtype=torch.float64), torch.ones(1, 1, dtype=torch.float64)
        limits = torch.cat([trainer.velocity(zero, one, t)[0], trainer.velocity(one, zero, t)[0], trainer.diffusion(t)])
        errors = []
        for length in (1e-3, 5e-4, 2.5e-4):
            before, after = schedule.alpha_bar(t), schedule.alpha_bar(t + length)
            held = ddpm_coefficients(torch.cat([before / after, after]))
            found = torch.cat([held.a, held.b - 1, held.c]) / length
            errors.append((found - limits).abs())
    for coarse, fine in itertools.pairwise(errors):
        torch.testing.assert_close(fine / coarse, torch.full((3,), 0.5, dtype=torch.float64), atol=0.02, rtol=0)


def test_the_stochastic_equation_ends_with_the_right_variance(schedule):
    """From q(z_0 | y): mean √ᾱ_1 u and variance 1 − ᾱ_1, within four standard errors, and 1 to 3 % for the steps."""
    trainer, count = continuous(schedule, "sde"), 5_000
    first, last = schedule.alpha_bar(torch.tensor([0.0, 1.0]).double()).detach()
    noise = torch.randn(count, 3, generator=generator(3), dtype=torch.float64)
    start = first.sqrt() * U + (1 - first).sqrt() * noise
    with torch.no_grad():
        end = integrate(
            lambda z, t: trainer.velocity(z, U.expand_as(z), t), start, 100, "euler", trainer.diffusion, generator(4)
        )
    spread = (1 - last).sqrt().item()
    bound = 4 * spread / count**0.5 + 0.01
    torch.testing.assert_close(end.mean(0), last.sqrt() * U[0], rtol=0, atol=bound)
    expected = torch.full((3,), spread**2, dtype=torch.float64)
    torch.testing.assert_close(end.var(0), expected, rtol=4 * (2 / count) ** 0.5 + 0.03, atol=0)


def test_the_drift_is_the_stochastic_equation_without_noise(schedule):
    z, t = torch.randn(5, 3, generator=generator(), dtype=torch.float64), torch.rand(5, generator=generator()).double()
    drift, sde, flow = (continuous(schedule, one).velocity(z, U.expand_as(z), t) for one in ("drift", "sde", "flow"))
    torch.testing.assert_close(drift, sde)
    alpha_bar, rate = schedule.alpha_bar(t)[:, None], schedule.rate(t)[:, None]
    score = (alpha_bar.sqrt() * U - z) / (1 - alpha_bar)  # of q(z_t | y)
    torch.testing.assert_close(flow, sde - 0.5 * rate * (1 - alpha_bar) * score)  # Song et al.'s probability flow


class Exact(VelocityBlock):
    """A velocity that knows the class."""

    def joined(self, z, encoded, t=None):
        return (torch.eye(3)[encoded[:, 0].long()] - z) / (1 - t[:, None])


@pytest.mark.parametrize("steps", [1, 7])
def test_flow_matching_with_an_exact_velocity_arrives(steps):
    network = Exact(torch.nn.Identity(), 1, 3, 3, hidden=1, batch_norm=False, time_dim=2)
    trainer, labels = NoPropFM(network, solver="euler"), torch.tensor([2, 0, 1, 1])
    start = torch.randn(4, 3, generator=generator())
    encoded = labels[:, None].float()
    end = integrate(lambda z, t: network.joined(z, encoded, t), start, steps, "euler")
    torch.testing.assert_close(end, torch.eye(3)[labels], atol=1e-5, rtol=0)
    assert (trainer.predict(encoded, steps=steps) == labels).all()


def loss_of_constant(v, sigma, embedding="onehot"):
    """Mean loss of flow matching for a constant velocity, over many draws."""

    class Constant(VelocityBlock):
        def forward(self, z, x, t=None):
            return v.expand(len(z), -1)

    network = Constant(torch.nn.Identity(), 1, 3, 3, hidden=1, batch_norm=False, time_dim=2)
    y = torch.ones(200_000, dtype=torch.long)
    return NoPropFM(network, sigma, embedding=embedding).loss(torch.ones(len(y), 1), y, generator()).item()


def test_the_loss_of_flow_matching_in_expectation():
    """E‖v − u + z_0‖² = ‖v − u‖² + d, whatever σ; four standard errors of 2e5 draws."""
    v = torch.tensor([0.5, -1.0, 2.0])
    expected = (v - torch.eye(3)[1]).square().sum().item() + 3
    for sigma in (0.0, 0.5):
        assert loss_of_constant(v, sigma) == pytest.approx(expected, abs=4 * 6 / 200_000**0.5)


def test_the_loss_of_discrete_time_in_expectation():
    """A block that always guesses class 0: its loss is the weight times ‖u_0 − u_y‖² = 2 or 0."""

    class Stubborn(Perfect):
        def step(self, z, encoded, embeddings, t=None):
            return embeddings[0].expand(len(z), -1)

    trainer = NoPropDT(lambda: Stubborn(torch.nn.Identity(), 1, 3, 3, hidden=1), num_blocks=4, schedule=ALPHAS, eta=0.3)
    x, y = torch.ones(4, 1), torch.tensor([0, 1, 2, 2])
    alpha_bars = np.cumprod(ALPHAS.numpy()[::-1])[::-1]
    for t in (1, 2, 4):
        gain = alpha_bars[t] / (1 - alpha_bars[t]) - alpha_bars[t - 1] / (1 - alpha_bars[t - 1])
        found = trainer.block_loss(t, x, y, torch.eye(3), generator()).item()
        assert found == pytest.approx(4 / 2 * 0.3 * gain * 2 * 3 / 4, rel=1e-5)


def spied(inputs):
    class Spy(Perfect):
        def step(self, z, encoded, embeddings, t=None):
            inputs.append((z.detach(), t))
            return embeddings[encoded[:, 0].long()]

    return lambda time_dim=None: Spy(torch.nn.Identity(), 1, 3, 3, hidden=1, batch_norm=False, time_dim=time_dim)


def test_blocks_and_head_are_shown_the_right_noise():
    """Block t sees q(z_{t−1} | y), the head q(z_T | y); within five standard errors of 1e5 draws."""
    shown, count = [], 100_000
    trainer = NoPropDT(spied(shown), num_blocks=4, schedule=ALPHAS)
    y = torch.full((count,), 2)
    trainer.block_loss(3, torch.full((count, 1), 2.0), y, torch.eye(3), generator())
    trainer.model.head.register_forward_pre_hook(lambda module, inputs: shown.append((inputs[0].detach(), None)))
    trainer.head_loss(y, torch.eye(3), generator())
    alpha_bars = np.cumprod(ALPHAS.numpy()[::-1])[::-1]
    for (z, _), alpha_bar in zip(shown, (alpha_bars[2], alpha_bars[4]), strict=True):
        mean = torch.tensor([0.0, 0.0, math.sqrt(alpha_bar)])
        torch.testing.assert_close(z.mean(0), mean, rtol=0, atol=5 * math.sqrt((1 - alpha_bar) / count))
        torch.testing.assert_close(
            z.var(0), torch.full((3,), 1 - alpha_bar).float(), rtol=5 * (2 / count) ** 0.5, atol=0
        )


def test_continuous_time_shows_the_noise_of_each_time():
    """Given t, (z − √ᾱ u) / √(1 − ᾱ) is standard normal and t uniform; five standard errors."""
    shown, count = [], 100_000
    trainer = NoPropCT(spied(shown)(time_dim=2))
    trainer.loss(torch.ones(count, 1), torch.ones(count, dtype=torch.long), generator())
    (z, t) = shown[0]
    alpha_bar = trainer.schedule.alpha_bar(t).detach()[:, None]
    standard = (z - alpha_bar.sqrt() * torch.eye(3)[1]) / (1 - alpha_bar).sqrt()
    assert standard.mean().abs().item() < 5 / (3 * count) ** 0.5
    assert standard.var().item() == pytest.approx(1, abs=5 * (2 / 3 / count) ** 0.5)
    assert np.corrcoef(standard[:, 1], t)[0, 1] == pytest.approx(0, abs=5 / count**0.5)
    assert t.mean().item() == pytest.approx(0.5, abs=5 * (1 / 12 / count) ** 0.5)
    assert t.square().mean().item() == pytest.approx(1 / 3, abs=5 * 0.3 / count**0.5)


def test_the_loss_of_continuous_time_in_expectation():
    """For û always class 0 and y = 1: ½ η · 2 · (SNR(1) − SNR(0)), with the head's and the prior's terms apart."""

    class Stubborn(Perfect):
        def step(self, z, encoded, embeddings, t=None):
            return embeddings[0].expand(len(z), -1)

    network = Stubborn(torch.nn.Identity(), 1, 3, 3, hidden=1, batch_norm=False, time_dim=2)
    count, y = 200_000, torch.ones(200_000, dtype=torch.long)
    losses = [NoPropCT(network, eta=eta).loss(torch.ones(count, 1), y, generator()).item() for eta in (1.0, 3.0)]
    gain = math.exp(4) - math.exp(-4)
    assert (losses[1] - losses[0]) / 2 == pytest.approx(gain, rel=0.02)


def test_prototypes_have_the_smallest_median_distance():
    for samples in (60, 1203):  # the second in more than one stripe
        x = torch.randn(samples, 2, 3, generator=generator(samples), dtype=torch.float64)
        y = (torch.rand(samples, generator=generator(1)) < 0.1).long()
        found = prototypes(x, y, 2)
        for label in (0, 1):
            members = x[y == label].flatten(1).numpy()
            medians = [
                np.median(np.delete(np.linalg.norm(members - one, axis=1), place)) for place, one in enumerate(members)
            ]
            np.testing.assert_array_equal(found[label], members[int(np.argmin(medians))])
    alone = torch.tensor([[1.0], [5.0]])
    assert prototypes(alone, torch.tensor([1, 0]), 2).tolist() == [[5.0], [1.0]]
