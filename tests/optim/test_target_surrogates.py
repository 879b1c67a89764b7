"""SSO against SGD, dense projections, bounds and counters; its surrogate, inner optimizer, metrics and schedules."""

import functools
import itertools
import math

import numpy as np
import pytest
import scipy.linalg
import scipy.special
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from provenn.contracts import BadInput, FunctionCase, LossCase, Minimum, OptimizerCase, TrainerCase
from provenn.core.experiment.seeding import generator
from provenn.optim import (
    SSO,
    ArmijoGD,
    BregmanDivergence,
    CartPole,
    ImitationResult,
    ImitationTrainer,
    KLDivergence,
    LQRExpert,
    SSOCalls,
    TargetSurrogate,
    constant_target_step,
    exponential_target_step,
    search_target_step,
    smooth_target_step,
    sqrt_target_step,
)

METRICS = ("euclidean", "adagrad-norm", "diag-adagrad", "adagrad", "newton")


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def parameter(*shape, seed=0):
    return nn.Parameter(normal(*(shape or (3,)), seed=seed))


def evaluated(z, params, closure):
    """A closure's loss at parameters z laid end to end, as a function of z to first order."""
    kept = [one.detach().clone() for one in params]
    pieces = z.detach().split([one.numel() for one in params])
    with torch.no_grad():
        torch._foreach_copy_(params, [piece.view_as(one) for piece, one in zip(pieces, params, strict=True)])
    with torch.enable_grad():
        loss = closure().detach()
    gradient = torch.cat([(torch.zeros_like(one) if one.grad is None else one.grad).flatten() for one in params])
    with torch.no_grad():
        torch._foreach_copy_(params, kept)
    return loss + (gradient * (z - z.detach())).sum()


class OnParameters(SSO):
    """SSO whose targets are the parameters themselves, so that a closure of a loss will do."""

    def step(self, closure=None):
        if closure is None:
            return super().step(closure)
        params = self._params

        def forward():
            return torch.cat([one.flatten() for one in params])

        return super().step(lambda: (forward, lambda z: evaluated(z, params, closure)))


def on_parameters(params, **options):
    return OnParameters(params, **{"eta": 0.1, "inner_steps": 2, "inner": quick, "reduction": "sum", **options})


WARMUP = 1500  # torch keeps up to 256 objects for the hooks around an optimizer's steps, of which here are two
quick = functools.partial(ArmijoGD, lr=0.1, shrink=0.5, max_trials=12)

NOT_ITS = {
    "none_gradients": "it computes gradients itself, by the closure",
    "sparse_gradients": "it computes gradients itself, by the closure",
    "schedulers": "its step size is of targets, not the parameters' lr; it has schedules of its own",
    "parameter_groups": "all parameters together make the targets that eta is the step size of",
}


def square_loss(z, y):
    return (z - y).square().sum() / (2 * len(z))


def pair(z=None, y=None):
    leaf = parameter(3, 1) if z is None else z
    return lambda: (lambda: leaf * 1, lambda one: square_loss(one, torch.zeros_like(one) if y is None else y))


def surrogate(**options):
    return TargetSurrogate(normal(4, 3), normal(4, 3, seed=1), **{"eta": 0.5, "loss_t": 2.0, **options})


def far(scale):
    return lambda: (scale * torch.ones(4, 3, dtype=torch.float64),)


def lowest():
    return (normal(4, 3) - 0.5 * 4 * normal(4, 3, seed=1),)


LOWEST = 2.0 - 0.5 * 0.5 * 4 * normal(4, 3, seed=1).square().sum().item()


def loss_case(label, minimum=None, **options):
    return LossCase(
        part="provenn.optim.TargetSurrogate",
        label=label,
        make=functools.partial(surrogate, **options),
        inputs=lambda generator, dtype: (torch.rand(4, 3, generator=generator, dtype=dtype) + 0.1,),
        minimum=minimum,
        extremes=(far(1e4), far(-1e4), lambda: (normal(4, 3),)),
        reductions=False,
        reductions_reason="it says how the loss was reduced whose gradient is given; the surrogate is one number",
        bad_input=(
            BadInput("eta", lambda: surrogate(eta=0.0)),
            BadInput("eta", lambda: surrogate(eta=math.nan)),
            BadInput("reduction", lambda: surrogate(reduction="none")),
            BadInput("metric", lambda: surrogate(metric=torch.ones(4))),
            BadInput("metric", lambda: surrogate(metric=torch.ones(2, 3, 3))),
            BadInput("grad_t", lambda: TargetSurrogate(normal(4, 3), normal(4, 2), 1.0)),
            BadInput("z_t", lambda: TargetSurrogate(torch.tensor(1.0), torch.tensor(1.0), 1.0)),
        ),
    )


def positive(*shape):
    return normal(*shape).abs() + 0.5


def kl_surrogate(**options):
    return TargetSurrogate(positive(4, 3), normal(4, 3, seed=1), 0.5, metric=KLDivergence(), **options)


def imitation(model, seed=0, **options):
    env = CartPole()
    optimizer = SSO(model.parameters(), inner_steps=3)
    size = {"rounds": 4, "episodes": 2, "horizon": 3}
    return ImitationTrainer(model, LQRExpert(env), env, optimizer, **{**size, "seed": seed, **options})


CASES = [
    OptimizerCase(
        part="provenn.optim.SSO",
        make=on_parameters,
        closure="required",
        step_size="eta",
        warmup_steps=WARMUP,
        rosenbrock={"target_line_search": True},
        excluded=NOT_ITS,
        bad_input=(
            BadInput("eta", lambda: SSO([parameter()], eta=0.0)),
            BadInput("eta", lambda: SSO([parameter()], eta=-1.0)),
            BadInput("inner_steps", lambda: SSO([parameter()], inner_steps=0)),
            BadInput("c", lambda: SSO([parameter()], c=0.0)),
            BadInput("c", lambda: SSO([parameter()], c=1.0)),
            BadInput("eps", lambda: SSO([parameter()], eps=-1.0)),
            BadInput("total_steps", lambda: SSO([parameter()], schedule="exponential")),
            BadInput("total_steps", lambda: SSO([parameter()], schedule="exponential", total_steps=0)),
            BadInput("schedule", lambda: SSO([parameter()], schedule="cosine")),
            BadInput("inner", lambda: SSO([parameter()], inner="adam")),
            BadInput("metric", lambda: SSO([parameter()], metric="kl")),
            BadInput("reduction", lambda: SSO([parameter()], reduction="none")),
            BadInput("target_line_search", lambda: SSO([parameter()], metric="adam", target_line_search=True)),
            BadInput(
                "eta", lambda: SSO([{"params": [parameter()], "eta": 1.0}, {"params": [parameter()], "eta": 2.0}])
            ),
            BadInput("params", lambda: SSO([nn.Parameter(torch.zeros(2, dtype=torch.complex64))])),
            BadInput("closure", lambda: SSO([parameter()]).step(lambda: torch.tensor(1.0)), TypeError),
            BadInput("closure", lambda: SSO([parameter()]).step(None), TypeError),
            BadInput("closure", lambda: SSO([parameter()]).step(lambda: (lambda: 1.0, square_loss)), TypeError),
            BadInput("closure", lambda: SSO([parameter()]).step(lambda: (parameter, lambda z: z)), TypeError),
        ),
    ),
    OptimizerCase(
        part="provenn.optim.SSO",
        label="line search",
        make=functools.partial(on_parameters, target_line_search=True, eta=1.0),
        closure="required",
        step_size="eta",
        warmup_steps=WARMUP,
        excluded=NOT_ITS,
        bad_input_reason="as in the other case",
    ),
    OptimizerCase(
        part="provenn.optim.SSO",
        label="Adam",
        make=functools.partial(on_parameters, metric="adam", schedule="sqrt"),
        closure="required",
        step_size="eta",
        warmup_steps=WARMUP,
        quadratic={"eta": 0.5},
        rosenbrock={"eta": 0.1},
        excluded=NOT_ITS,
        bad_input_reason="as in the other case",
    ),
    OptimizerCase(
        part="provenn.optim.ArmijoGD",
        make=functools.partial(ArmijoGD, lr=0.2),
        closure="required",
        excluded=dict.fromkeys(("none_gradients", "sparse_gradients"), "it evaluates the closure itself"),
        bad_input=(
            BadInput("lr", lambda: ArmijoGD([parameter()], lr=0.0)),
            BadInput("c", lambda: ArmijoGD([parameter()], c=1.0)),
            BadInput("shrink", lambda: ArmijoGD([parameter()], shrink=1.0)),
            BadInput("growth", lambda: ArmijoGD([parameter()], growth=0.9)),
            BadInput("n_batches", lambda: ArmijoGD([parameter()], n_batches=0)),
            BadInput("max_trials", lambda: ArmijoGD([parameter()], max_trials=0)),
            BadInput("closure", lambda: ArmijoGD([parameter()]).step(None), TypeError),
        ),
    ),
    loss_case("", Minimum(lowest, LOWEST)),
    loss_case("a number", metric=torch.tensor(2.0, dtype=torch.float64)),
    loss_case("diagonal", metric=positive(3)),
    loss_case("matrix", metric=torch.eye(3).double() + 0.5),
    loss_case("matrix a row", metric=torch.eye(3).double() + normal(4, 3, 1) @ normal(4, 1, 3), reduction="sum"),
    LossCase(
        part="provenn.optim.TargetSurrogate",
        label="KL",
        make=kl_surrogate,
        inputs=lambda generator, dtype: (torch.rand(4, 3, generator=generator, dtype=dtype) + 0.1,),
        extremes=(far(1e4), far(1e-4), lambda: (positive(4, 3),)),
        reductions=False,
        reductions_reason="as in the other case",
        bad_input_reason="as in the other case",
    ),
    TrainerCase(
        part="provenn.optim.ImitationTrainer",
        make=imitation,
        model=lambda: nn.Linear(4, 1),
        data=lambda generator: (),
        rounds=4,
        bad_input=(
            BadInput("rounds", lambda: imitation(nn.Linear(4, 1), rounds=0)),
            BadInput("episodes", lambda: imitation(nn.Linear(4, 1), episodes=0)),
            BadInput("horizon", lambda: imitation(nn.Linear(4, 1), horizon=0)),
            BadInput("seed", lambda: imitation(nn.Linear(4, 1), seed=0.5), TypeError),
        ),
    ),
    FunctionCase(
        part="provenn.optim.BregmanDivergence",
        call=lambda: BregmanDivergence(lambda z: z.exp().sum(1))(normal(2, 3), normal(2, 3, seed=1)),
        bad_input=(BadInput("potential", lambda: BregmanDivergence(2.0), TypeError),),
    ),
    FunctionCase(
        part="provenn.optim.KLDivergence",
        call=lambda: KLDivergence()(positive(2, 3), positive(2, 3)),
        bad_input_reason="it has no arguments",
    ),
    FunctionCase(
        part="provenn.optim.SSOCalls",
        call=lambda: SSO([parameter()]).calls._asdict(),
        bad_input_reason="a record that the optimizer makes",
    ),
    FunctionCase(
        part="provenn.optim.ImitationResult",
        call=lambda: ImitationResult([], nn.Linear(4, 1)),
        bad_input_reason="a record that the trainer makes",
    ),
    FunctionCase(
        part="provenn.optim.CartPole",
        call=lambda: CartPole().step(CartPole().reset(3, torch.Generator().manual_seed(0)), torch.zeros(3, 1).double()),
        bad_input=(BadInput("spread", lambda: CartPole(spread=0.0)), BadInput("dt", lambda: CartPole(dt=-0.1))),
    ),
    FunctionCase(
        part="provenn.optim.LQRExpert",
        call=lambda: LQRExpert(CartPole())(torch.zeros(3, 4)),
        bad_input=(
            BadInput("state_dim", lambda: LQRExpert(CartPole(), 0)),
            BadInput("action_dim", lambda: LQRExpert(CartPole(), 4, 0)),
            BadInput("action_cost", lambda: LQRExpert(CartPole(), action_cost=0.0)),
        ),
    ),
    FunctionCase(
        part="provenn.optim.constant_target_step",
        call=lambda: constant_target_step(1.0, 3),
        bad_input=(
            BadInput("eta", lambda: constant_target_step(0.0, 1)),
            BadInput("step", lambda: constant_target_step(1.0, 0)),
        ),
    ),
    FunctionCase(
        part="provenn.optim.sqrt_target_step",
        call=lambda: sqrt_target_step(1.0, 3),
        bad_input=(BadInput("step", lambda: sqrt_target_step(1.0, 0)),),
    ),
    FunctionCase(
        part="provenn.optim.exponential_target_step",
        call=lambda: exponential_target_step(1.0, 3, 10),
        bad_input=(BadInput("total_steps", lambda: exponential_target_step(1.0, 1, 0)),),
    ),
    FunctionCase(
        part="provenn.optim.smooth_target_step",
        call=lambda: smooth_target_step("squared"),
        bad_input=(BadInput("loss", lambda: smooth_target_step("hinge")),),
    ),
    FunctionCase(
        part="provenn.optim.search_target_step",
        call=lambda: search_target_step(lambda z: z.square().sum(), normal(2, 2), 2 * normal(2, 2), 4.0, 1.0),
        bad_input=(
            BadInput("last", lambda: search_target_step(torch.sum, normal(2), normal(2), 1.0, 0.0)),
            BadInput("c", lambda: search_target_step(torch.sum, normal(2), normal(2), 1.0, 1.0, c=1.0)),
        ),
    ),
]


def network(classes=3, seed=0):
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, classes)).double()
    for index, one in enumerate(model.parameters()):
        one.data.copy_(normal(*one.shape, seed=100 * seed + index))
    return model


X, Y = normal(7, 4, seed=7), torch.tensor([0, 1, 2, 0, 1, 2, 0])


def classified(model, x=X, y=Y):
    return lambda: (lambda: model(x), lambda z: cross_entropy(z, y))


def exact_inner(params):
    tight = {"tolerance_grad": 1e-12, "tolerance_change": 1e-14}
    return torch.optim.LBFGS(params, lr=1, max_iter=200, line_search_fn="strong_wolfe", **tight)


# The optimizer


@pytest.mark.parametrize("eta", [1e-4, 1.0, 1e4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_one_step_of_sgd_is_sgd_bit_by_bit_whatever_eta(eta, dtype):
    ours, plain = network().to(dtype), network().to(dtype)
    optimizer = SSO(ours.parameters(), eta, 1, functools.partial(torch.optim.SGD, lr=0.3))
    reference = torch.optim.SGD(plain.parameters(), lr=0.3)
    for index in range(5):
        x, y = normal(7, 4, seed=index, dtype=dtype), Y.roll(index)
        loss = optimizer.step(classified(ours, x, y))
        reference.zero_grad()
        expected = cross_entropy(plain(x), y)
        expected.backward()
        reference.step()
        assert loss == expected
        assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), plain.parameters(), strict=True))


def test_inner_steps_are_gradient_steps_on_the_written_surrogate():
    model, other = network(), network()
    SSO(model.parameters(), 0.7, 4, functools.partial(torch.optim.SGD, lr=0.1)).step(classified(model))
    z_t = other(X).detach().requires_grad_()
    cross_entropy(z_t, Y).backward()
    for _ in range(4):
        z = other(X)
        value = (z_t.grad * z).sum() + ((z - z_t.detach()) ** 2).sum(1).mean() / (2 * 0.7)
        slopes = torch.autograd.grad(value, list(other.parameters()))
        for one, slope in zip(other.parameters(), slopes, strict=True):
            one.data.sub_(0.1 * slope)
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_unconstrained_targets_take_a_gradient_step_of_size_eta(reduction):
    z, y = parameter(5, 2), normal(5, 2, seed=3)
    before = z.detach().clone()

    def loss(z):  # of one sample: Σ (z − y)⁴ / 4, with gradient (z − y)³
        rows = ((z - y) ** 4).sum(1) / 4
        return rows.mean() if reduction == "mean" else rows.sum()

    SSO([z], 0.05, 20, exact_inner, reduction=reduction).step(lambda: (lambda: 1 * z, loss))
    torch.testing.assert_close(z.detach(), before - 0.05 * (before - y) ** 3, rtol=0, atol=1e-6)


def test_linear_model_lands_on_the_dense_projection():
    W, x = parameter(4, 3), normal(9, 4, seed=2)
    y = torch.arange(9) % 3
    z = (x @ W).detach().numpy()
    pulled = z - 0.8 * (scipy.special.softmax(z, axis=1) - np.eye(3)[y.numpy()])
    expected = np.linalg.lstsq(x.numpy(), pulled, rcond=None)[0]
    SSO([W], 0.8, 50, exact_inner).step(lambda: (lambda: x @ W, lambda z: cross_entropy(z, y)))
    np.testing.assert_allclose(W.detach().numpy(), expected, atol=1e-5)


def test_squared_loss_of_a_linear_model_takes_one_outer_step():
    W, x, y = parameter(4, 2), normal(30, 4, seed=2), normal(30, 2, seed=3)
    optimizer = SSO([W], smooth_target_step("squared"), 500)
    optimizer.step(lambda: (lambda: x @ W, lambda z: square_loss(z, y)))
    np.testing.assert_allclose(W.detach().numpy(), np.linalg.lstsq(x.numpy(), y.numpy(), rcond=None)[0], atol=1e-5)
    assert optimizer.calls.oracle == 1


@pytest.mark.parametrize("steps", [1, 3, 12])
@pytest.mark.parametrize("seed", range(3))
def test_full_batches_never_raise_the_loss(steps, seed):
    model = network(seed=seed)
    optimizer = SSO(model.parameters(), smooth_target_step("cross-entropy"), steps)
    losses = [optimizer.step(classified(model)).item() for _ in range(12)]
    assert all(after <= before for before, after in itertools.pairwise(losses))
    assert losses[-1] < 0.9 * losses[0]


def test_calls_are_counted_apart():
    model, made = network(), []
    optimizer = SSO(model.parameters(), 1.0, 3, functools.partial(torch.optim.SGD, lr=1e-3))
    counts = {"forward": 0, "loss": 0}

    def forward():
        counts["forward"] += 1
        return model(X)

    def loss(z):
        counts["loss"] += 1
        made.append(z.requires_grad)
        return cross_entropy(z, Y)

    for _ in range(4):
        optimizer.step(lambda: (forward, loss))
    assert counts == {"forward": 4 * 3 + 1, "loss": 4}
    assert optimizer.calls == SSOCalls(oracle=4, value=0, forward=13, backward=12)
    assert made == [True] * 4


def test_the_line_search_adds_values_alone():
    model, with_gradient = network(), []
    optimizer = SSO(model.parameters(), 1.0, 2, target_line_search=True)
    plain = SSO(network().parameters(), 1.0, 2)

    def loss(z):
        with_gradient.append(z.requires_grad)
        return cross_entropy(z, Y)

    for _ in range(3):
        optimizer.step(lambda: (lambda: model(X), loss))
    assert optimizer.calls.oracle == sum(with_gradient) == 3
    assert optimizer.calls.value == len(with_gradient) - 3 >= 3
    assert optimizer.calls.backward <= 6
    assert plain.calls == (0, 0, 0, 0)


def test_armijo_inner_starts_anew_at_every_outer_step():
    model, other = network(), network()
    optimizer = SSO(model.parameters(), 1.0, 2, c=0.3)
    made = []

    def inner(params):
        made.append(ArmijoGD(params, lr=10.0, c=0.3))
        return made[-1]

    spelled = SSO(other.parameters(), 1.0, 2, inner)
    for _ in range(3):
        optimizer.step(classified(model))
        spelled.step(classified(other))
    assert len(made) == 3
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


def test_it_stops_where_the_surrogate_is_flat():
    z = nn.Parameter(torch.zeros(2, 1, dtype=torch.float64))
    optimizer = SSO([z], 1.0, 50)
    optimizer.step(pair(z))  # the start is the minimum
    assert optimizer.calls.backward == 1
    far_away = nn.Parameter(torch.full((2, 1), 3.0, dtype=torch.float64))
    optimizer = SSO([far_away], 1.0, 1000)
    optimizer.step(pair(far_away))
    assert optimizer.calls.backward < 100
    assert far_away.abs().max() < 3e-6


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, [0.5, 0.5, 0.5]),
        ({"schedule": "sqrt"}, [0.5, 0.5 / 2**0.5, 0.5 / 3**0.5]),
        ({"schedule": "exponential", "total_steps": 3}, [0.5 * 3 ** (-1 / 3), 0.5 * 3 ** (-2 / 3), 0.5 / 3]),
    ],
)
def test_schedules_count_outer_steps_from_one(options, expected):
    model = network()
    optimizer = SSO(model.parameters(), 0.5, 2, **options)
    found = []
    for _ in range(3):
        optimizer.step(classified(model))
        found.append(optimizer.eta)
    assert found == pytest.approx(expected, rel=1e-14)


def test_schedules_hold_for_the_searched_step_too():
    model, other = network(), network()
    scheduled = SSO(model.parameters(), 0.5, 1, target_line_search=True, schedule="sqrt")
    constant = SSO(other.parameters(), 0.5, 1, target_line_search=True)
    for step in (1, 2):
        other.load_state_dict(model.state_dict())
        scheduled.step(classified(model))
        constant.step(classified(other))
        assert scheduled.eta == pytest.approx(constant.eta / step**0.5, rel=1e-14)


@pytest.mark.parametrize("options", [{}, {"target_line_search": True}, *({"metric": one} for one in METRICS)])
def test_sums_and_means_of_losses_take_the_same_target_steps(options):
    pulled, weights = [], normal(6, 2, seed=3)
    for reduction in ("mean", "sum"):
        z = parameter(6, 2)
        optimizer = SSO([z], 0.4, 10, exact_inner, reduction=reduction, eps=0.1, **options)
        share = 6 if reduction == "mean" else 1
        for _ in range(3):
            optimizer.step(lambda z=z, n=share: (lambda: 1 * z, lambda one: (weights * one).cosh().sum() / n))
        pulled.append((z.detach(), optimizer.eta))
    assert pulled[0][1] == pytest.approx(pulled[1][1], rel=1e-9)
    torch.testing.assert_close(pulled[0][0], pulled[1][0], rtol=0, atol=1e-4)


def test_targets_that_change_are_refused_and_parameters_put_back():
    model = network()
    optimizer = SSO(model.parameters(), 1.0, 5)
    optimizer.step(classified(model))
    before = [one.detach().clone() for one in model.parameters()]
    rows = iter([7, 7, 6, *[7] * 1000])
    with pytest.raises(RuntimeError, match="shape"):
        optimizer.step(lambda: (lambda: model(X[: next(rows)]), lambda z: cross_entropy(z, Y)))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), before, strict=True))


def test_dropout_is_noticed_at_the_first_step():
    model = nn.Sequential(nn.Linear(4, 50), nn.Dropout(), nn.Linear(50, 3)).double()
    before = [one.detach().clone() for one in model.parameters()]
    with pytest.raises(RuntimeError, match="dropout"):
        SSO(model.parameters()).step(classified(model))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), before, strict=True))
    SSO(model.parameters()).step(classified(model.eval()))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_is_refused(bad):
    model = network()
    before = [one.detach().clone() for one in model.parameters()]
    optimizer = SSO(model.parameters())
    with pytest.raises(RuntimeError, match="finite"):
        optimizer.step(lambda: (lambda: model(X), lambda z: (z * bad).sum()))
    with pytest.raises(RuntimeError, match="finite"):  # the loss is, its gradient is not
        optimizer.step(lambda: (lambda: model(X), lambda z: (z - z.detach()).abs().sqrt().sum()))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), before, strict=True))
    assert all(one.grad is None for one in model.parameters())


def test_plain_losses_and_targets_without_graph_are_refused():
    model = network()
    with pytest.raises(TypeError, match=r"pair \(forward, target_loss\)"):
        SSO(model.parameters()).step(lambda: cross_entropy(model(X), Y))
    with pytest.raises(RuntimeError, match="graph"):
        SSO(model.parameters()).step(lambda: (lambda: model(X).detach(), lambda z: cross_entropy(z, Y)))


def test_parameters_that_targets_do_not_need_stay():
    model, aside = network(), parameter(2)
    before = aside.detach().clone()
    SSO([*model.parameters(), aside], 1.0, 3).step(classified(model))
    assert torch.equal(aside, before)


# The surrogate


@pytest.mark.parametrize("metric", METRICS)
def test_the_surrogate_touches_in_value_and_gradient(metric):
    model = network()
    params = list(model.parameters())
    found, loss = SSO(params, 0.7, metric=metric)._surrogate(model(X).detach(), lambda z: cross_entropy(z, Y))
    true = cross_entropy(model(X), Y)
    value = found(model(X))
    assert value.item() == pytest.approx(true.item(), abs=1e-12) == loss.item()
    slopes = zip(torch.autograd.grad(value, params), torch.autograd.grad(true, params), strict=True)
    assert max((a - b).abs().max().item() for a, b in slopes) < 1e-12


@pytest.mark.parametrize("kind", ["squared", "cross-entropy", "logistic"])
def test_the_surrogate_bounds_the_loss_at_random_parameters(kind):
    y = {"squared": normal(7, 3, seed=5), "cross-entropy": Y, "logistic": 2.0 * (Y > 0).double() - 1}[kind]

    def loss(z):
        if kind == "squared":
            return square_loss(z, y)
        return cross_entropy(z, y) if kind == "cross-entropy" else torch.log1p((-y * z[:, 0]).exp()).mean()

    found, _ = SSO([parameter()], smooth_target_step(kind))._surrogate((X @ normal(4, 3, seed=9)), loss)
    points = X @ (torch.logspace(-2, 1, 1000).double().view(-1, 1, 1) * normal(1000, 4, 3, seed=8))
    gaps = torch.stack([found(z) - loss(z) for z in points])
    assert gaps.min() >= -1e-12
    if kind == "squared":
        assert gaps.abs().max() < 1e-9
    else:
        assert gaps.max() > 1


@pytest.mark.parametrize("kind", ["cross-entropy", "logistic", "squared"])
def test_smoothness_is_the_largest_curvature(kind):
    y = torch.tensor([0])
    losses = {
        "cross-entropy": lambda z: cross_entropy(z, y),
        "logistic": lambda z: torch.log1p((-z[0, 0]).exp()),
        "squared": lambda z: z.square().sum() / 2,
    }
    at = torch.zeros(1, 2, dtype=torch.float64)  # where softmax of two classes and the logistic curve are steepest
    hessian = torch.autograd.functional.hessian(losses[kind], at).view(2, 2)
    assert torch.linalg.eigvalsh(hessian).max().item() == pytest.approx(1 / smooth_target_step(kind))


def test_newton_gives_the_gauss_newton_matrix():
    model = network()
    names, values = zip(*model.named_parameters(), strict=True)
    sizes = [one.numel() for one in values]
    theta = torch.cat([one.detach().flatten() for one in values])

    def f(theta):
        pieces = [piece.view(one.shape) for piece, one in zip(theta.split(sizes), values, strict=True)]
        return torch.func.functional_call(model, dict(zip(names, pieces, strict=True)), X)

    z_t = f(theta)
    found, _ = SSO(values, metric="newton", eps=0.0)._surrogate(z_t.detach(), lambda z: cross_entropy(z, Y))
    g = found.grad_t
    # The linear term of a network is curved too; the rest is the matrix.
    hessian = torch.autograd.functional.hessian(lambda theta: found(f(theta)) - (g * f(theta)).sum(), theta)
    J = torch.autograd.functional.jacobian(f, theta).flatten(0, 1)
    H_z = torch.autograd.functional.hessian(lambda z: cross_entropy(z.view(7, 3), Y), z_t.detach().flatten())
    torch.testing.assert_close(hessian, J.mT @ H_z @ J, rtol=0, atol=1e-12)


def test_newton_on_a_linear_model_is_newtons_method():
    W = parameter(4, 1)
    y = (Y > 0).double().unsqueeze(1)
    z = (X @ W).detach().numpy()
    p = scipy.special.expit(z)
    hessian = X.numpy().T @ (p * (1 - p) * X.numpy())
    expected = W.detach().numpy() - np.linalg.solve(hessian, X.numpy().T @ (p - y.numpy()))
    bce = torch.nn.functional.binary_cross_entropy_with_logits
    SSO([W], 1.0, 50, exact_inner, metric="newton").step(lambda: (lambda: X @ W, lambda z: bce(z, y)))
    np.testing.assert_allclose(W.detach().numpy(), expected, atol=1e-4)


@pytest.mark.parametrize(
    ("metric", "eta"),
    [
        ("euclidean", 2.0),
        ("adagrad-norm", 5.0),
        ("diag-adagrad", 2.0),
        ("adagrad", 2.0),
        ("adam", 0.5),
        ("newton", 0.3),
    ],
)
def test_every_metric_lowers_the_loss_of_a_full_batch(metric, eta):
    model = nn.Linear(4, 3).double()
    for one in model.parameters():
        nn.init.zeros_(one)
    optimizer = SSO(model.parameters(), eta, 10, metric=metric)
    losses = [optimizer.step(classified(model)).item() for _ in range(15)]
    assert losses[-1] < 0.6 * losses[0]


def lands_at(optimizer, z, loss, expected):
    """Whether the surrogate at z has its minimum at the expected place: there its gradient vanishes."""
    found, _ = optimizer._surrogate(z, loss)
    leaf = expected.detach().clone().requires_grad_()
    (slope,) = torch.autograd.grad(found(leaf), leaf)
    assert slope.abs().max() < 1e-10


@pytest.mark.parametrize("metric", ["adam", "diag-adagrad"])
def test_with_one_row_adaptive_metrics_are_torchs_optimizers_on_targets(metric):
    z = parameter(1, 5)
    made = {
        "adam": functools.partial(torch.optim.Adam, eps=1e-6),
        "diag-adagrad": functools.partial(torch.optim.Adagrad, eps=1e-6),
    }
    reference = made[metric]([z], lr=0.3)
    optimizer = SSO([parameter()], 0.3, metric=metric, eps=1e-6)
    for index in range(6):
        weights = normal(1, 5, seed=index)

        def loss(z, weights=weights):
            return (weights * z).sin().sum()

        before = z.detach().clone()
        z.grad = None
        loss(z).backward()
        reference.step()
        lands_at(optimizer, before, loss, z)


@pytest.mark.parametrize("metric", ["adagrad", "adagrad-norm", "diag-adagrad"])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_adagrad_sums_over_rows_and_steps(metric, reduction):
    optimizer = SSO([parameter()], 0.3, metric=metric, reduction=reduction, eps=1e-4)
    total = np.zeros((2, 2))
    for index in range(3):
        z, weights = normal(5, 2, seed=index), normal(5, 2, seed=10 + index)
        share = 5 if reduction == "mean" else 1
        rows = (weights * (weights * z).cos()).numpy()
        total += rows.T @ rows
        A = {
            "adagrad": scipy.linalg.sqrtm(total).real,
            "adagrad-norm": math.sqrt(np.trace(total)) * np.eye(2),
            "diag-adagrad": np.diag(np.sqrt(np.diag(total))),
        }[metric] + 1e-4 * np.eye(2)
        expected = torch.from_numpy(z.numpy() - 0.3 * np.linalg.solve(A, rows.T).T)
        lands_at(optimizer, z, lambda z, w=weights, n=share: (w * z).sin().sum() / n, expected)


def test_adam_averages_columns_over_rows():
    optimizer = SSO([parameter()], 0.3, metric="adam", eps=1e-6)
    z, weights = normal(4, 2), normal(4, 2, seed=1)
    rows = weights.numpy()
    lands_at(
        optimizer,
        z,
        lambda z: (weights * z).sum() / 4,
        torch.from_numpy(z.numpy() - 0.3 * rows / (np.sqrt((rows**2).mean(0)) + 1e-6)),
    )
    later = normal(4, 2, seed=2).numpy()
    square = (0.999 * 0.001 * (rows**2).mean(0) + 0.001 * (later**2).mean(0)) / (1 - 0.999**2)
    mean = (0.9 * 0.1 * rows.mean(0) + 0.1 * later) / (1 - 0.9**2)
    lands_at(
        optimizer,
        z,
        lambda z: (torch.from_numpy(later) * z).sum() / 4,
        torch.from_numpy(z.numpy() - 0.3 * mean / (np.sqrt(square) + 1e-6)),
    )


def test_kl_on_the_simplex_is_exponentiated_gradient():
    theta, costs = parameter(3, 4), normal(3, 4, seed=4)
    p = scipy.special.softmax(theta.detach().numpy(), axis=1)
    expected = p * np.exp(-0.6 * costs.numpy())
    optimizer = SSO([theta], 0.6, 100, exact_inner, metric=KLDivergence())
    optimizer.step(lambda: (lambda: theta.softmax(1), lambda z: (costs * z).sum(1).mean()))
    np.testing.assert_allclose(theta.detach().softmax(1).numpy(), expected / expected.sum(1, keepdims=True), atol=1e-5)


def test_divergences_agree_with_their_closed_forms():
    z, w = positive(5, 3), normal(5, 3, seed=1).abs() + 0.1
    half = BregmanDivergence(lambda z: z.square().sum(1) / 2)
    torch.testing.assert_close(half(z, w), (z - w).square().sum(1) / 2)
    generic = BregmanDivergence(lambda z: (z * z.log()).sum(1))
    torch.testing.assert_close(KLDivergence()(z, w), generic(z, w))
    np.testing.assert_allclose(KLDivergence()(z, w).numpy(), scipy.special.kl_div(z.numpy(), w.numpy()).sum(1))
    assert KLDivergence()(torch.zeros(1, 2).double(), w[:1, :2]).item() == pytest.approx(w[:1, :2].sum().item())
    as_metric = surrogate(metric=half)
    torch.testing.assert_close(as_metric(w[:4]), surrogate()(w[:4]))


def test_the_authors_eta_is_the_inverse_of_twice_ours():
    # Theirs: mean(g f / η + (f − f_t)²), with the gradient of a sum.
    model, theirs = nn.Linear(4, 3).double(), 4.0
    z_t = model(X).detach()
    g = normal(7, 3, seed=6)
    peer = torch.linalg.lstsq(torch.cat([X, torch.ones(7, 1).double()], 1), z_t - g / (2 * theirs)).solution
    SSO(model.parameters(), 1 / (2 * theirs), 50, exact_inner, reduction="sum").step(
        lambda: (lambda: model(X), lambda z: (g * z).sum())
    )
    torch.testing.assert_close(model.weight.detach(), peer[:4].mT, rtol=0, atol=1e-5)


# Line searches


def armijo_by_hand(f, slope, x, alpha, steps, c=0.5, shrink=0.9, growth=1.8, n_batches=1):
    """Backtracking with plain numbers: the first step tries alpha, later ones grow the last."""
    for index in range(steps):
        alpha *= growth ** (1 / n_batches) if index else 1
        g = slope(x)
        while f(x - alpha * g) > f(x) - c * alpha * g @ g:
            alpha *= shrink
        x = x - alpha * g
    return x, alpha


@pytest.mark.parametrize("options", [{}, {"c": 0.1, "shrink": 0.7, "growth": 3.0, "n_batches": 4}])
def test_backtracking_is_as_written(options):
    def f(x):
        return float(np.cosh(x).sum() + (x**2).sum())

    start = normal(4).numpy()
    expected, _ = armijo_by_hand(f, lambda x: np.sinh(x) + 2 * x, start, 2.0, 6, **options)
    x = nn.Parameter(torch.from_numpy(start.copy()))
    optimizer = ArmijoGD([x], lr=2.0, **options)

    def closure():
        loss = x.cosh().sum() + x.square().sum()
        if torch.is_grad_enabled():
            x.grad = None
            loss.backward()
        return loss

    for _ in range(6):
        before = closure().item()
        assert optimizer.step(closure).item() == before
    np.testing.assert_allclose(x.detach().numpy(), expected, rtol=1e-12)


def test_where_no_trial_holds_parameters_stay():
    x = nn.Parameter(torch.ones(2, dtype=torch.float64))
    optimizer = ArmijoGD([x], lr=1.0, max_trials=3)
    calls = []

    def closure():  # a gradient that points the wrong way
        calls.append(torch.is_grad_enabled())
        x.grad = -torch.ones_like(x)
        return x.detach().sum()

    optimizer.step(closure)
    assert torch.equal(x.detach(), torch.ones(2).double())
    assert calls == [True, False, False, False]
    assert not optimizer.accepted


def test_trials_that_are_not_finite_are_failures():
    x = nn.Parameter(torch.tensor([1.0], dtype=torch.float64))

    def closure():
        loss = -x.log().sum() + 2 * x.sum()
        if torch.is_grad_enabled():
            x.grad = None
            loss.backward()
        return loss

    ArmijoGD([x], lr=10.0).step(closure)
    assert 0.4 < x.item() < 1


@pytest.mark.parametrize("share", [1.0, 5.0])
@pytest.mark.parametrize("last", [0.01, 3.0])
def test_the_search_in_target_space_is_as_written(share, last):
    z = normal(5, 2)

    def loss(z):
        return z.cosh().sum() / share

    gradient, start, c = z.sinh() / share, loss(z).item(), 0.3
    found, values = search_target_step(loss, z, gradient, start, last, c, share)

    def holds(eta):
        # Of one sample: ℓ(z − η g) ≤ ℓ(z) − c η ‖g‖², averaged or summed.
        slopes = z.sinh()
        return loss(z - eta * slopes).item() <= start - c * eta * slopes.square().sum().item() / share

    assert holds(found)
    assert found == pytest.approx(1.8 * last * 0.9 ** (values - 1))
    assert values == 1 or not holds(found / 0.9)


def test_the_searched_step_is_clipped():
    z = torch.ones(1, 1).double()
    assert search_target_step(lambda z: z.sum(), z, z, 1.0, 1e4)[0] == 1e4
    # Nothing holds: 1.8 · 0.9^100 of 1 is below 1e-4.
    assert search_target_step(lambda z: z.sum() + 5, z, z, 1.0, 1.0) == (1e-4, 100)


def test_schedules_in_closed_form():
    assert constant_target_step(0.3, 17) == 0.3
    assert sqrt_target_step(0.3, 9) == pytest.approx(0.1)
    assert exponential_target_step(0.3, 100, 100) == pytest.approx(0.003)
    assert exponential_target_step(0.3, 50, 100) == pytest.approx(0.03)
    assert [smooth_target_step(loss) for loss in ("squared", "cross-entropy", "logistic")] == [1.0, 2.0, 4.0]


# Imitation


def energy(states):
    """Kinetic and potential energy of a cart of 1 kg and a rod of 0.1 kg and 1 m, whose moment of inertia is m l²/3."""
    _, v, angle, spin = states.unbind(1)
    m, half = 0.1, 0.5
    swing = (v + half * spin * angle.cos()) ** 2 + (half * spin * angle.sin()) ** 2
    return v**2 / 2 + m * swing / 2 + m * half**2 / 3 * spin**2 / 2 + m * 9.8 * half * angle.cos()


def test_a_free_pole_keeps_its_energy():
    env = CartPole(spread=0.5, dt=1e-4)
    states = env.reset(6, torch.Generator().manual_seed(0))
    before, first = energy(states), states
    for _ in range(3000):
        states = env.step(states, torch.zeros(6, 1).double())
    assert (states - first).abs().max() > 0.5
    torch.testing.assert_close(energy(states), before, rtol=0, atol=3e-4)  # Euler errs in proportion to dt


def test_a_push_moves_the_whole_momentum_by_its_impulse():
    env = CartPole(dt=1e-6)
    states = torch.tensor([[0.0, 0.3, 0.2, -0.4]], dtype=torch.float64)

    def momentum(states):
        _, v, angle, spin = states.unbind(1)
        return 1.1 * v + 0.1 * 0.5 * spin * angle.cos()

    for force, acts in ((3.0, 3.0), (100.0, 30.0)):
        after = env.step(states, torch.tensor([[force]], dtype=torch.float64))
        assert ((momentum(after) - momentum(states)) / 1e-6).item() == pytest.approx(acts, rel=1e-4)


def test_the_expert_is_solved_for_whatever_the_default_device():
    expected = LQRExpert(CartPole()).gain
    with torch.device("meta"):  # where what is made without a device would be, without values
        assert torch.equal(LQRExpert(CartPole()).gain, expected)


def test_the_expert_solves_riccatis_recursion_and_balances():
    env = CartPole()
    expert = LQRExpert(env, action_cost=0.5)
    h = 1e-5
    unit = torch.eye(5).double() * h
    ahead = (env.step(unit[:, :4], unit[:, 4:]) - env.step(-unit[:, :4], -unit[:, 4:])).numpy().T / (2 * h)
    A, B = ahead[:, :4], ahead[:, 4:]
    P = np.eye(4)
    for _ in range(5000):
        K = np.linalg.solve(0.5 * np.eye(1) + B.T @ P @ B, B.T @ P @ A)
        P = np.eye(4) + A.T @ P @ (A - B @ K)
    np.testing.assert_allclose(expert.gain.numpy(), K, rtol=1e-6)
    states = env.reset(20, torch.Generator().manual_seed(1))
    for _ in range(500):
        states = env.step(states, expert(states))
    assert states.abs().max() < 0.05


def test_states_stay_in_their_box():
    env = CartPole()
    states = env.reset(4, torch.Generator().manual_seed(0))
    assert states.abs().max() <= 0.2
    for _ in range(400):
        states = env.step(states, torch.full((4, 1), 1e6).double())
    assert (states.abs() <= torch.tensor([5.0, 10.0, 3.2, 20.0]).double()).all()


def test_imitation_is_the_loop_that_it_says():
    policy, other = (nn.Linear(4, 1).double() for _ in range(2))
    other.load_state_dict(policy.state_dict())
    env = CartPole()
    expert = LQRExpert(env)
    optimizer = torch.optim.SGD(policy.parameters(), lr=0.5)
    trainer = ImitationTrainer(policy, expert, env, optimizer, rounds=3, episodes=4, horizon=5, seed=3)
    result = trainer.fit()
    reference = torch.optim.SGD(other.parameters(), lr=0.5)
    for index in range(3):
        states, seen = env.reset(4, generator(3, "round", index)), []
        for _ in range(5):
            seen.append(states)
            states = env.step(states, other(states).detach())
        visited = torch.cat(seen)
        loss = ((other(visited) - expert(visited)) ** 2).mean() / 2
        assert result.history[index].loss == pytest.approx(loss.item(), rel=1e-12)
        reference.zero_grad()
        loss.backward()
        reference.step()
    torch.testing.assert_close(policy.weight, other.weight, rtol=1e-12, atol=1e-12)
    assert result.model is policy


def test_imitation_by_sso_takes_one_gradient_a_round_and_learns_the_expert():
    policy = nn.Linear(4, 1).double()
    torch.nn.init.zeros_(policy.weight)
    torch.nn.init.zeros_(policy.bias)
    env = CartPole()
    optimizer = SSO(policy.parameters(), smooth_target_step("squared"), 50)
    trainer = ImitationTrainer(policy, LQRExpert(env), env, optimizer, rounds=10)
    history = trainer.fit().history
    assert optimizer.calls.oracle == 10
    assert history[-1].loss < 0.02 * history[0].loss
