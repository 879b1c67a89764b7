"""GradientNoise against the formula, random-walk statistics, the wrapped optimizers, and networks that need it."""

import copy
import functools
import io
import itertools
import math

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from torch import nn

from provenn.claims import Evidence
from provenn.claims.claim import Metric, Trial
from provenn.claims.optim import _gradient_noise_network as protocol
from provenn.claims.optim import gradient_noise as claim
from provenn.contracts import BadInput, FunctionCase, InitCase, Moment, OptimizerCase
from provenn.optim import GradientNoise, gradient_noise, noise_std, sussillo_abbott_


def parameter(*shape, dtype=torch.float64):
    return nn.Parameter(torch.zeros(shape or (1,), dtype=dtype))


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def noisy(make, params, eta=1e-3, clip_norm=None, keep_grad=False, **options):
    noise = {"eta": eta, "clip_norm": clip_norm, "keep_grad": keep_grad, "generator": seeded()}
    return GradientNoise(make(params, **options), **noise)


def noisy_sgd(params, lr=0.02, **options):
    return noisy(torch.optim.SGD, params, lr=lr, **options)


def noisy_adam(params, lr=0.01, **options):
    return noisy(torch.optim.Adam, params, lr=lr, **options)


def wrapper(**options):
    return GradientNoise(torch.optim.SGD([parameter()], lr=0.1), **options)


BAD_INPUT = (
    BadInput("eta", lambda: wrapper(eta=-0.01)),
    BadInput("eta", lambda: wrapper(eta=math.nan)),
    BadInput("gamma", lambda: wrapper(gamma=-0.55)),
    BadInput("clip_norm", lambda: wrapper(clip_norm=0.0)),
    BadInput("clip_norm", lambda: wrapper(clip_norm=-1.0)),
    BadInput("optimizer", lambda: GradientNoise([parameter()]), TypeError),
    BadInput("optimizer", lambda: GradientNoise(torch.optim.SGD), TypeError),
    BadInput("closure", lambda: GradientNoise(torch.optim.LBFGS([parameter()])), TypeError),
    BadInput("LBFGS", lambda: GradientNoise(torch.optim.LBFGS([parameter()])), TypeError),
    BadInput("generator", lambda: wrapper(generator=0), TypeError),
    BadInput("state_dict", lambda: wrapper().load_state_dict(torch.optim.SGD([parameter()], lr=0.1).state_dict())),
)

NO_MAXIMIZE = {"maximize": "the wrapped optimizer turns the sign of the noisy gradient: equal in law, not in numbers"}
NO_STEP_SIZE = {"step_size": "the wrapped optimizer checks its own step size; torch's SGD lets NaN pass"}

CASES = [
    OptimizerCase(
        part="provenn.optim.GradientNoise",
        make=noisy_sgd,
        label="SGD",
        foreach=True,
        quadratic={"lr": 0.05},
        rosenbrock={"lr": 1e-3},
        rosenbrock_steps=3000,
        excluded=NO_MAXIMIZE | NO_STEP_SIZE,
        bad_input=BAD_INPUT,
    ),
    OptimizerCase(
        part="provenn.optim.GradientNoise",
        make=functools.partial(noisy_sgd, momentum=0.9, clip_norm=10.0, keep_grad=True),
        label="clipped, momentum",
        foreach=True,
        quadratic={"lr": 0.02},
        rosenbrock={"lr": 1e-3},
        excluded=NO_MAXIMIZE | NO_STEP_SIZE,
        bad_input=BAD_INPUT,
    ),
    OptimizerCase(
        part="provenn.optim.GradientNoise",
        make=noisy_adam,
        label="Adam",
        foreach=True,
        quadratic={"lr": 0.1},
        rosenbrock={"lr": 0.02},
        excluded=NO_MAXIMIZE,
        bad_input=BAD_INPUT,
    ),
    FunctionCase(
        part="provenn.optim.noise_std",
        call=lambda: noise_std(3, 0.3, 0.55),
        bad_input=(
            BadInput("step", lambda: noise_std(-1, 0.3, 0.55)),
            BadInput("step", lambda: noise_std(0.5, 0.3, 0.55), TypeError),
            BadInput("eta", lambda: noise_std(0, -0.3, 0.55)),
            BadInput("gamma", lambda: noise_std(0, 0.3, -0.55)),
        ),
    ),
    InitCase(
        part="provenn.optim.sussillo_abbott_",
        initialize=lambda module, generator: sussillo_abbott_(module, generator=generator),
        make=lambda: nn.Sequential(nn.Linear(3, 12), nn.ReLU(), nn.LayerNorm(12), nn.Linear(12, 2, bias=False)),
        changes=("0.weight", "0.bias", "3.weight"),
        # By hand: n = 3 counts as 6, 1.2 / 3.6 = 1/3; n = 12 gives 1.2 / 9.6 = 1/8.
        moments=lambda: {
            "0.weight": Moment(std=math.sqrt(2 / 3) * math.exp(1 / 3)),
            "0.bias": Moment(std=0.0, largest=0.0),
            "3.weight": Moment(std=math.sqrt(2 / 12) * math.exp(1 / 8)),
        },
        bad_input=(
            BadInput("width", lambda: sussillo_abbott_(nn.Linear(3, 2), width=0)),
            BadInput("module", lambda: sussillo_abbott_(nn.ReLU())),
        ),
    ),
]


def noises(optimizer, steps):
    """The noise of the first steps, one list of tensors a step: what zero gradients have become."""
    params = [param for group in optimizer.param_groups for param in group["params"]]
    found = []
    for _ in range(steps):
        for param in params:
            param.grad = torch.zeros_like(param)
        optimizer.step()
        found.append([param.grad.clone() for param in params])
    return found


def sgd_noise(params, lr=0.1, seed=0, **options):
    return GradientNoise(torch.optim.SGD(params, lr=lr), generator=seeded(seed), **options)


def correlation(one, other):
    return torch.corrcoef(torch.stack([one.flatten(), other.flatten()]))[0, 1].abs().item()


# The noise.


def test_variance_is_the_papers_and_the_one_of_optax():
    # optax.add_noise (JAX, not needed to run this) divides eta by (count + 1)**gamma and takes the root; count starts
    # at 0. Here in NumPy, from that description.
    steps = np.arange(1001)
    for eta in (0.01, 0.3, 1.0):
        variances = eta / np.power(steps + 1.0, 0.55)
        ours = [noise_std(step, eta, 0.55) for step in steps.tolist()]
        np.testing.assert_allclose(ours, np.sqrt(variances), rtol=1e-12)
    assert noise_std(0) == math.sqrt(0.3)
    assert noise_std(99) == pytest.approx(math.sqrt(0.3 / 100**0.55), rel=1e-12)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_measured_variance_follows_the_annealing(dtype):
    # The sampling error of a variance over 1e5 elements is 0.45 %.
    found = noises(sgd_noise([parameter(100_000, dtype=dtype)], eta=0.7, gamma=0.55), 100)
    for step in (0, 9, 99):
        (noise,) = found[step]
        assert noise.dtype == dtype
        assert noise.var().item() == pytest.approx(0.7 / (1 + step) ** 0.55, rel=0.02)
        assert abs(noise.mean().item()) < 4 * math.sqrt(0.7 / 1e5)


def test_without_annealing_the_variance_stays():
    found = noises(sgd_noise([parameter(100_000)], eta=0.7, annealed=False), 100)
    for step in (0, 9, 99):
        assert found[step][0].var().item() == pytest.approx(0.7, rel=0.02)


def test_noise_is_gaussian():
    # Excess kurtosis and skewness of 2e5 draws: sampling errors 0.011 and 0.0055. Uniform noise has kurtosis −1.2.
    ((noise,),) = noises(sgd_noise([parameter(200_000)], eta=1.0), 1)
    assert abs((noise**4).mean().item() - 3) < 0.06
    assert abs((noise**3).mean().item()) < 0.03


@pytest.mark.parametrize("bucket", [1 << 18, 1000])
def test_noise_is_independent_over_steps_elements_and_parameters(bucket, monkeypatch):
    # Whether parameters share a draw or not; the sampling error of a correlation over 1e5 elements is 0.003.
    monkeypatch.setattr(gradient_noise, "_BUCKET", bucket)
    found = noises(sgd_noise([parameter(100_000), parameter(400, 250)], eta=1.0), 3)
    for (one, other), (one_next, other_next) in itertools.pairwise(found):
        assert correlation(one, one_next) < 0.02
        assert correlation(other, other_next) < 0.02
        assert correlation(one, other) < 0.02
        assert correlation(one, other_next) < 0.02
        assert correlation(one[1:], one[:-1]) < 0.02
        assert correlation(other[1:], other[:-1]) < 0.02


def test_small_buckets_reach_every_parameter(monkeypatch):
    monkeypatch.setattr(gradient_noise, "_BUCKET", 10)
    shapes = [(3,), (4, 2), (0,), (), (25,), (2, 3, 1), (10,)]
    (found,) = noises(sgd_noise([nn.Parameter(torch.zeros(shape)) for shape in shapes]), 1)
    values = torch.cat([noise.flatten() for noise in found])
    assert [tuple(noise.shape) for noise in found] == shapes
    assert len(values) == 53
    assert len(values.unique()) == 53
    assert not (values == 0).any()


def test_complex_parameter_gets_the_variance_on_both_parts():
    ((noise,),) = noises(sgd_noise([nn.Parameter(torch.zeros(100_000, dtype=torch.complex128))], eta=0.5), 1)
    assert noise.real.var().item() == pytest.approx(0.5, rel=0.02)
    assert noise.imag.var().item() == pytest.approx(0.5, rel=0.02)
    assert correlation(noise.real, noise.imag) < 0.02


def test_mixed_types_each_get_noise():
    params = [parameter(50_000), parameter(50_000, dtype=torch.float32), parameter(50_000, dtype=torch.bfloat16)]
    (found,) = noises(sgd_noise(params, eta=0.5), 1)
    for noise, param in zip(found, params, strict=True):
        assert noise.dtype == param.dtype
        assert noise.double().var().item() == pytest.approx(0.5, rel=0.04)  # the sampling error is 0.6 %


def test_sgd_on_nothing_walks_at_random():
    # 20 000 coordinates: the sampling error of the variance is 1 %.
    param = parameter(20_000)
    noises(sgd_noise([param], lr=0.2, eta=0.4), 60)
    expected = 0.2**2 * sum(0.4 / (1 + t) ** 0.55 for t in range(60))
    assert param.var().item() == pytest.approx(expected, rel=0.03)


def test_steps_without_a_gradient_count():
    param = parameter(100_000)
    optimizer = sgd_noise([param], eta=1.0)
    for _ in range(9):
        optimizer.step()
    ((noise,),) = noises(optimizer, 1)
    assert noise.var().item() == pytest.approx(10**-0.55, rel=0.02)


# Generators.


def test_own_generator_follows_torchs_seed_and_no_two_wrappers_are_alike():
    def draw():
        return noises(wrapper(eta=1.0), 2)[1][0].item()

    with torch.random.fork_rng():
        torch.manual_seed(5)
        first, second = draw(), draw()
        torch.manual_seed(5)
        assert draw() == first
        assert first != second


def test_given_generator_is_the_one_drawn_from():
    source = seeded(3)
    optimizer = wrapper(generator=source)
    before = torch.random.get_rng_state()
    noises(optimizer, 1)
    assert not torch.equal(source.get_state(), seeded(3).get_state())
    assert torch.equal(before, torch.random.get_rng_state())


@pytest.mark.parametrize("steps", [0, 3])
def test_resumes_with_a_generator_of_its_own_even_one_not_used_yet(steps):
    first, second = wrapper(eta=1.0), wrapper(eta=1.0)
    noises(first, steps)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    assert [one.item() for (one,) in noises(first, 3)] == [one.item() for (one,) in noises(second, 3)]


def test_loading_takes_a_copy():
    saved = wrapper(generator=seeded(1)).state_dict()
    optimizer = wrapper(generator=seeded(2))
    optimizer.load_state_dict(saved)
    noises(optimizer, 2)
    assert torch.equal(saved["gradient_noise"]["generators"]["states"]["cpu"], seeded(1).get_state())
    assert saved["gradient_noise"]["steps"] == 0


def test_state_of_a_device_that_is_not_here_is_kept():
    # A run that drew on two GPUs, saved, loaded and saved again on a machine without: nothing is lost.
    saved = wrapper(generator=seeded(1)).state_dict()
    elsewhere = torch.arange(16, dtype=torch.uint8)
    saved["gradient_noise"]["generators"]["states"]["cuda:1"] = elsewhere
    optimizer = wrapper(generator=seeded(2))
    optimizer.load_state_dict(saved)
    kept = optimizer.state_dict()["gradient_noise"]["generators"]
    assert torch.equal(kept["states"]["cuda:1"], elsewhere)
    assert torch.equal(kept["states"]["cpu"], seeded(1).get_state())


# The wrapped optimizer.

INNER = {
    "SGD": functools.partial(torch.optim.SGD, lr=0.1, weight_decay=0.1),
    "momentum": functools.partial(torch.optim.SGD, lr=0.1, momentum=0.9, nesterov=True),
    "Adam": functools.partial(torch.optim.Adam, lr=0.1),
    "AdamW": functools.partial(torch.optim.AdamW, lr=0.1, weight_decay=0.2),
    "RMSprop": functools.partial(torch.optim.RMSprop, lr=0.1),
    "Adagrad": functools.partial(torch.optim.Adagrad, lr=0.1),
}


def trajectory(make, steps=10):
    """Steps on a fixed sequence of gradients."""
    params = [parameter(3, 2), parameter(4)]
    optimizer = make(params)
    source = seeded(9)
    for _ in range(steps):
        for param in params:
            param.grad = torch.randn(param.shape, dtype=param.dtype, generator=source)
        optimizer.step()
    return torch.cat([param.detach().flatten() for param in params])


@pytest.mark.parametrize("inner", INNER)
def test_without_noise_it_is_bitwise_the_wrapped_optimizer(inner):
    ours = trajectory(lambda params: GradientNoise(INNER[inner](params), eta=0.0))
    assert torch.equal(ours, trajectory(INNER[inner]))
    assert not torch.equal(ours, trajectory(lambda params: GradientNoise(INNER[inner](params), eta=0.1)))


def test_without_learning_rate_nothing_moves():
    ours = trajectory(lambda params: GradientNoise(torch.optim.SGD(params, lr=0.0), eta=1.0))
    assert torch.equal(ours, torch.zeros_like(ours))


def test_noise_enters_the_moments():
    param = parameter(5)
    optimizer = GradientNoise(torch.optim.Adam([param], betas=(0.9, 0.99)), eta=1.0)
    ((noise,),) = noises(optimizer, 1)
    torch.testing.assert_close(optimizer.state[param]["exp_avg"], 0.1 * noise)
    torch.testing.assert_close(optimizer.state[param]["exp_avg_sq"], 0.01 * noise**2)


def test_groups_state_and_options_are_the_wrapped_ones():
    inner = torch.optim.Adam([parameter()], lr=0.3)
    optimizer = GradientNoise(inner)
    optimizer.add_param_group({"params": [parameter(2)], "lr": 0.01})
    noises(optimizer, 1)
    assert optimizer.defaults is inner.defaults
    for _ in range(2):  # also after the wrapped one has loaded a state behind the wrapper's back
        assert optimizer.param_groups is inner.param_groups
        assert optimizer.state is inner.state
        assert [group["lr"] for group in inner.param_groups] == [0.3, 0.01]
        inner.load_state_dict(copy.deepcopy(inner.state_dict()))


def test_scheduler_and_hooks_see_the_wrapper():
    seen = []
    optimizer = wrapper()
    handle = optimizer.register_step_pre_hook(lambda *_: seen.append("before"))
    optimizer.register_step_post_hook(lambda *_: seen.append("after"))
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    noises(optimizer, 1)
    scheduler.step()
    assert seen == ["before", "after"]
    assert optimizer.optimizer.param_groups[0]["lr"] == 0.05
    handle.remove()
    noises(optimizer, 1)
    assert seen == ["before", "after", "after"]


def test_resumes_in_the_middle_from_a_file():
    def fresh(seed):
        param = parameter(6)
        return param, GradientNoise(torch.optim.Adam([param], lr=0.1), eta=1.0, generator=seeded(seed))

    param, optimizer = fresh(1)
    noises(optimizer, 5)
    file = io.BytesIO()
    torch.save({"optimizer": optimizer.state_dict(), "param": param.detach()}, file)
    noises(optimizer, 5)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    other, resumed = fresh(2)
    other.data.copy_(saved["param"])
    resumed.load_state_dict(saved["optimizer"])
    assert resumed.steps == 5
    noises(resumed, 5)
    assert torch.equal(param, other)


def test_sparse_gradient_is_refused_before_anything_changes():
    dense, table = nn.Linear(1, 1, bias=False), nn.Embedding(5, 2, sparse=True)
    optimizer = noisy_sgd([*dense.parameters(), *table.parameters()])
    (dense(torch.ones(1)).sum() + table(torch.tensor([1, 3])).sum()).backward()
    with pytest.raises(RuntimeError, match="sparse"):
        optimizer.step()
    assert dense.weight.grad.item() == 1.0


# Clipping.


def seen_by_the_inner(gradients, **options):
    """What the wrapped optimizer gets for these gradients, in two groups."""
    params = [nn.Parameter(torch.zeros_like(gradient)) for gradient in gradients]
    inner = torch.optim.SGD([{"params": params[:1]}, {"params": params[1:]}], lr=0.1)
    seen = []
    inner.register_step_pre_hook(lambda *_: seen.extend(param.grad.clone() for param in params))
    for param, gradient in zip(params, gradients, strict=True):
        param.grad = gradient.clone()
    GradientNoise(inner, generator=seeded(4), **options).step()
    return seen


def norm(tensors):
    return math.sqrt(sum(float((tensor**2).sum()) for tensor in tensors))


GRADIENTS = [torch.full((3,), 40.0), torch.tensor([[30.0, -10.0]])]


def test_clips_by_the_global_norm_and_then_adds_noise():
    noise = seen_by_the_inner([torch.zeros_like(gradient) for gradient in GRADIENTS], eta=4.0)
    noisy = seen_by_the_inner(GRADIENTS, eta=4.0, clip_norm=10.0)
    clipped = [one - other for one, other in zip(noisy, noise, strict=True)]
    for part, gradient in zip(clipped, GRADIENTS, strict=True):
        torch.testing.assert_close(part, gradient * 10 / norm(GRADIENTS), rtol=1e-5, atol=1e-5)
    assert norm(clipped) <= 10.0 * (1 + 1e-6)
    assert norm(noisy) > 10.0  # the noise was not clipped (η and generator are such that it makes the sum longer)


def test_small_gradients_are_not_scaled():
    noise = seen_by_the_inner([torch.zeros_like(gradient) for gradient in GRADIENTS], eta=4.0)
    noisy = seen_by_the_inner(GRADIENTS, eta=4.0, clip_norm=100.0)
    for one, other, gradient in zip(noisy, noise, GRADIENTS, strict=True):
        torch.testing.assert_close(one - other, gradient, rtol=0, atol=1e-5)


def test_noise_first_is_clipped_with_the_gradient():
    noise = seen_by_the_inner([torch.zeros_like(gradient) for gradient in GRADIENTS], eta=400.0)
    noisy = seen_by_the_inner(GRADIENTS, eta=400.0, clip_norm=10.0, noise_first=True)
    total = [gradient + one for gradient, one in zip(GRADIENTS, noise, strict=True)]
    assert norm(noisy) == pytest.approx(10.0, rel=1e-6)
    for one, other in zip(noisy, total, strict=True):
        torch.testing.assert_close(one, other * 10 / norm(total), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("keep", [False, True])
def test_gradient_after_a_step(keep):
    param = parameter(3)
    optimizer = sgd_noise([param], clip_norm=1.0, eta=1.0, keep_grad=keep)
    param.grad = clean = torch.tensor([3.0, 4.0, 0.0], dtype=torch.float64)
    optimizer.step()
    kept = torch.equal(param.grad, torch.tensor([3.0, 4.0, 0.0], dtype=torch.float64))
    assert kept == keep
    assert param.grad is clean  # the same tensor: buckets of distributed training hold on to it
    moved = param.detach() / -0.1
    assert not torch.equal(moved, torch.tensor([0.6, 0.8, 0.0], dtype=torch.float64))
    assert moved.norm().item() < 5  # the clipped gradient and noise of three elements; unclipped it would be near 5


def test_keep_grad_restores_after_an_error():
    class Failing(torch.optim.SGD):
        def step(self, closure=None):
            raise FloatingPointError("as asked")

    param = parameter(3)
    param.grad = torch.ones(3, dtype=torch.float64)
    optimizer = GradientNoise(Failing([param], lr=0.1), eta=1.0, keep_grad=True)
    with pytest.raises(FloatingPointError):
        optimizer.step()
    assert torch.equal(param.grad, torch.ones(3, dtype=torch.float64))
    assert optimizer.steps == 0


# Networks.


def perceptron(width=6, depth=4):
    layers = [layer for _ in range(depth) for layer in (nn.Linear(width, width), nn.ReLU())]
    return nn.Sequential(*layers, nn.Linear(width, 3)).double()


def zeroed(model):
    for param in model.parameters():
        nn.init.zeros_(param)
    return model


def train_on_classes(model, optimizer, steps):
    x = torch.randn(30, 6, generator=seeded(1), dtype=torch.float64)
    y = torch.arange(30) % 3
    for _ in range(steps):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y[torch.randint(30, (30,), generator=seeded(2))]).backward()
        optimizer.step()
    return x


def test_zero_network_moves_only_its_last_bias_without_noise():
    model = zeroed(perceptron())
    x = train_on_classes(model, torch.optim.SGD(model.parameters(), lr=0.1), 20)
    moved = [name for name, param in model.named_parameters() if (param != 0).any()]
    assert moved == [list(dict(model.named_parameters()))[-1]]
    assert torch.equal(model(x), model(x)[:1].expand(30, -1))  # the same class for every input


def test_zero_network_moves_everywhere_with_noise():
    model = zeroed(perceptron())
    train_on_classes(model, sgd_noise(model.parameters(), eta=0.1), 1)
    assert all((param != 0).all() for param in model.parameters())


def falls(model, loss, optimizer, steps):
    first = loss(model).item()
    for _ in range(steps):
        optimizer.zero_grad()
        loss(model).backward()
        optimizer.step()
    return loss(model).item() < 0.5 * first


def test_recurrent_network_learns_to_add():
    # The addition task: of a sequence of numbers, add the two that are marked.
    source = seeded(6)
    numbers = torch.rand(64, 8, generator=source)
    marks = torch.zeros(64, 8).scatter(1, torch.rand(64, 8, generator=source).argsort(1)[:, :2], 1.0)
    x, y = torch.stack([numbers, marks], dim=-1), (numbers * marks).sum(1, keepdim=True)

    class Adder(nn.Module):
        def __init__(self):
            super().__init__()
            self.memory, self.out = nn.GRU(2, 16, batch_first=True), nn.Linear(16, 1)

        def forward(self, x):
            return self.out(self.memory(x)[0][:, -1])

    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Adder()
    optimizer = GradientNoise(
        torch.optim.Adam(model.parameters(), lr=0.01), eta=0.01, clip_norm=1.0, generator=seeded()
    )
    assert falls(model, lambda m: nn.functional.mse_loss(m(x), y), optimizer, 60)


def test_attention_network_learns():
    x = torch.randn(32, 5, 8, generator=seeded(7))
    y = x[:, :, :2].amax(1)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
        model = nn.Sequential(layer, nn.Linear(8, 2))
    optimizer = GradientNoise(
        torch.optim.Adam(model.parameters(), lr=0.01), eta=0.001, clip_norm=1.0, generator=seeded()
    )
    assert falls(model, lambda m: nn.functional.mse_loss(m(x).amax(1), y), optimizer, 60)


# The initialisation.


def test_gradients_neither_shrink_nor_grow_on_average():
    # Backpropagated through 30 layers of width 20, 200 networks: at the plain gain √2 the logarithm of a gradient's
    # length falls by about 1.2 / 17.6 = 0.068 a layer; with the factor the mean is 0. The sampling error is 0.004.
    def drift(initialize):
        logs = []
        for seed in range(200):
            layers = nn.Sequential(
                *(layer for _ in range(30) for layer in (nn.Linear(20, 20), nn.ReLU())), nn.Linear(20, 20)
            )
            initialize(layers, seeded(seed))
            x = torch.randn(1, 20, generator=seeded(1000 + seed), requires_grad=True)
            direction = torch.randn(1, 20, generator=seeded(2000 + seed))
            layers(x).backward(direction)
            logs.append(math.log(x.grad.norm() / direction.norm()) / 31)
        return sum(logs) / len(logs)

    def he(layers, source):
        for layer in layers:
            if isinstance(layer, nn.Linear):
                nn.init.kaiming_normal_(layer.weight, nonlinearity="relu", generator=source)
                nn.init.zeros_(layer.bias)

    plain, ours = drift(he), drift(lambda layers, source: sussillo_abbott_(layers, generator=source))
    assert plain < -0.045
    assert abs(ours) < 0.02


def test_width_sets_the_gain_and_not_the_fan_in():
    layer = sussillo_abbott_(nn.Linear(400, 500), width=12, generator=seeded())
    # 200 000 draws: the sampling error of the deviation is 0.16 %.
    assert layer.weight.std().item() == pytest.approx(math.sqrt(2 / 400) * math.exp(1 / 8), rel=0.01)


# The claim.


def evidence(simple, zero):
    """(with noise, without) by seed for each initialisation."""
    figures = {}
    for study, values in {"simple": simple, "zero": zero}.items():
        for arm, accuracies in zip((claim.NOISE, claim.PLAIN), values, strict=True):
            figures[study, arm] = {"test_accuracy": accuracies}
    return Evidence.of(figures)


CHANCE = [0.1, 0.11, 0.1]


@pytest.mark.parametrize(
    ("simple", "zero", "outcome"),
    [
        (([0.95, 0.92, 0.96], CHANCE), ([0.95, 0.9, 0.1], CHANCE), "reproduced"),
        # One of three runs without noise may learn; two may not.
        (([0.95, 0.92, 0.96], [0.1, 0.1, 0.9]), ([0.95, 0.9, 0.1], CHANCE), "reproduced"),
        (([0.95, 0.92, 0.96], [0.2, 0.1, 0.9]), ([0.95, 0.9, 0.1], CHANCE), "partly"),
        # The mean counts: 89 % from simple, and 59 % from zero, are too little.
        (([0.89, 0.89, 0.89], CHANCE), ([0.95, 0.9, 0.1], CHANCE), "partly"),
        (([0.95, 0.92, 0.96], CHANCE), ([0.59, 0.59, 0.59], CHANCE), "partly"),
        # A gain of 30 points from one initialisation is enough for "partly"; below that from both is not.
        (([0.41, 0.41, 0.41], [0.1, 0.1, 0.1]), (CHANCE, CHANCE), "partly"),
        ((CHANCE, CHANCE), ([0.41, 0.41, 0.41], [0.1, 0.1, 0.1]), "partly"),
        (([0.39, 0.39, 0.39], [0.1, 0.1, 0.1]), ([0.39, 0.39, 0.39], [0.1, 0.1, 0.1]), "not reproduced"),
        # Both learn without noise: accurate, but no gain.
        (([0.95, 0.95, 0.95], [0.95, 0.95, 0.95]), ([0.95, 0.95, 0.95], [0.9, 0.9, 0.9]), "not reproduced"),
        # One seed, as in the smoke tier.
        (([0.95], [0.1]), ([0.95], [0.1]), "reproduced"),
        (([0.1], [0.1]), ([0.1], [0.1]), "not reproduced"),
    ],
)
def test_judge(simple, zero, outcome):
    assert claim.judge(evidence(simple, zero)).outcome == outcome


def test_judge_reports_the_share_of_accurate_runs():
    reason = claim.judge(evidence(([0.95, 0.92, 0.9], CHANCE), ([0.95, 0.1, 0.1], [0.1, 0.1, 0.91]))).reason
    assert "above 90 %: 2 of 3 with, 0 without" in reason
    assert "above 90 %: 1 of 3 with, 1 without" in reason


def test_arms_are_tuned_alike():
    for name in ("simple", "zero"):
        tuning = claim.CLAIM.studies[name].tuning
        assert [one["eta"] for one in tuning.of(claim.NOISE)] == [0.01, 0.03, 0.1]
        assert [one["lr"] for one in tuning.of(claim.PLAIN)] == [0.03, 0.1, 0.3]


def test_network_and_images_are_those_of_the_protocol():
    budget = claim.CLAIM.studies["simple"].tiers["small"].budget
    task = protocol.images(Trial("simple", claim.NOISE, 0, "small", budget))
    assert [len(part[0]) for part in (task.train, task.validation, task.test)] == [1150, 287, 360]
    rows = torch.cat([part[0] for part in (task.train, task.validation, task.test)])
    assert len(rows.unique(dim=0)) == len(torch.from_numpy(load_digits().data).unique(dim=0))
    epochs = task.epochs(10_000, 50)
    batches = task.batches(0, 10_000, 50)
    assert sum(sum(1 for _ in batches(epoch)) for epoch in range(0, epochs, epochs - 1)) == 23 + 10_000 - 434 * 23
    model = protocol.network(protocol.PROTOCOLS["simple"], 64, seed=0)
    sizes = [layer.weight.shape for layer in model if isinstance(layer, nn.Linear)]
    assert sizes == [(50, 64), *[(50, 50)] * 19, (10, 50)]
    weights = torch.cat([layer.weight.flatten() for layer in model if isinstance(layer, nn.Linear)])
    assert weights.std().item() == pytest.approx(0.1, rel=0.02)
    zero = protocol.network(protocol.PROTOCOLS["zero"], 64, seed=0)
    assert all((param == 0).all() for param in zero.parameters())


def cell(arm, settings, *, tuning=False, study="zero"):
    budget = claim.CLAIM.studies[study].tiers["smoke"].budget
    trial = Trial(study, arm, 0, "smoke", budget, settings, tuning)
    return {event.name: event.value for event in claim.run(trial) if isinstance(event, Metric)}


def test_tuning_does_not_look_at_test_data():
    assert cell(claim.PLAIN, {"lr": 0.1}, tuning=True).keys() == {"validation_accuracy", "diverged"}


def test_a_run_that_diverges_counts_with_what_it_had():
    found = cell(claim.NOISE, {"lr": 1e30, "eta": 0.1}, study="He")
    assert found["diverged"] == 1.0
    assert 0 <= found["test_accuracy"] < 0.5
    assert cell(claim.PLAIN, {"lr": 0.1})["diverged"] == 0.0
