"""Zeroth-order optimizers against exact derivatives, moments, materialised directions and the authors' loops."""

import copy
import functools
import gc
import math

import numpy as np
import pytest
import torch
from torch import nn

from provenn.contracts import BadInput, FunctionCase, OptimizerCase
from provenn.core.experiment.accounting import TensorMemory
from provenn.core.experiment.seeding import derive_seed
from provenn.core.numerics.zeroth_order import QueryCounter, SeededDirection, forward_derivative
from provenn.optim import (
    ForwardGradient,
    HybridZO,
    MemoryEstimate,
    ZerothOrder,
    estimate_memory,
    parameter_blocks,
    zo_gradient,
)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def parameter(*shape, dtype=torch.float64, seed=0):
    return nn.Parameter(torch.randn(shape or (1,), dtype=dtype, generator=seeded(seed)))


def zeroth_order(params, lr=3e-3, **options):
    return ZerothOrder(params, lr=lr, **{"generator": seeded(), **options})


def forward(params, lr=3e-3, **options):
    return ForwardGradient(params, lr=lr, **{"generator": seeded(), **options})


def hybrid(params, lr=3e-3, **options):
    held = list(params)
    cut = (len(held) + 1) // 2
    zo = {"lr": lr, "generator": seeded(), **options}
    return HybridZO(held[:cut], held[cut:], zo, functools.partial(torch.optim.SGD, lr=lr))


def value_only(params, **options):
    return ZerothOrder([parameter()] if params is None else params, **options)


def twice():
    one = parameter()
    return ZerothOrder([one], blocks=[[one], [one]])


def shared():
    one = [parameter()]
    return HybridZO(one, one, {}, torch.optim.Adam)


def missing():
    params = [parameter(), parameter()]
    return ZerothOrder(params, blocks=[params[:1]])


BAD_INPUT = (
    BadInput("eps", lambda: value_only(None, eps=0.0)),
    BadInput("eps", lambda: value_only(None, eps=-1e-3)),
    BadInput("lr", lambda: value_only(None, lr=0.0)),
    BadInput("num_queries", lambda: value_only(None, num_queries=0)),
    BadInput("num_queries", lambda: value_only(None, num_queries=1.0), TypeError),
    BadInput("sparsity", lambda: value_only(None, sparsity=1.0)),
    BadInput("sparsity", lambda: value_only(None, sparsity=-0.1)),
    BadInput("sparsity_by", lambda: value_only(None, sparsity_by="tensor")),
    BadInput("resample_every", lambda: value_only(None, resample_every=0)),
    BadInput("rule", lambda: value_only(None, rule="lion")),
    BadInput("sign", lambda: value_only(None, rule="sign", sign="both")),
    BadInput("momentum", lambda: value_only(None, momentum=1.0)),
    BadInput("betas", lambda: value_only(None, betas=(0.9, 1.0))),
    BadInput("weight_decay", lambda: value_only(None, weight_decay=-0.1)),
    BadInput("weight_decay", lambda: value_only(None, weight_decay=0.1, rule="conservative")),
    BadInput("blocks", twice),
    BadInput("blocks", missing),
    BadInput("blocks", lambda: value_only([parameter()], blocks=[[parameter()]])),
    BadInput("params", lambda: value_only([nn.Parameter(torch.zeros(2, dtype=torch.complex64))])),
    BadInput("state_dict", lambda: value_only(None).load_state_dict({"state": {}, "param_groups": []})),
)

NO_GRADIENTS = {
    "none_gradients": "it reads losses, not gradients",
    "sparse_gradients": "it reads losses, not gradients",
}

RULES = {
    "sgd": {"lr": 3e-3},
    "sign": {"lr": 0.02},
    "momentum": {"lr": 1e-3},
    "adam": {"lr": 0.05},
    "conservative": {"lr": 5e-3},
}


def rule_case(rule, label=None, **options):
    lr = RULES[rule]["lr"]
    return OptimizerCase(
        part="provenn.optim.ZerothOrder",
        make=functools.partial(zeroth_order, lr=lr, rule=rule, **options),
        label=label or rule,
        closure="required",
        quadratic_steps=2000,  # 17 parameters: a step descends along one of 17 directions
        rosenbrock={"lr": lr / 5},
        rosenbrock_steps=3000,
        excluded=NO_GRADIENTS,
        bad_input=BAD_INPUT,
    )


def two():
    return [parameter(), parameter(seed=1)]


def small_model():
    return nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2))


CASES = [
    *(rule_case(rule) for rule in RULES),
    rule_case("sgd", "one-sided, sparse, exact", two_sided=False, sparsity=0.3, num_queries=2, exact_restore=True),
    OptimizerCase(
        part="provenn.optim.ForwardGradient",
        make=forward,
        closure="required",
        quadratic_steps=2000,
        rosenbrock={"lr": 6e-4},
        rosenbrock_steps=3000,
        excluded={
            **NO_GRADIENTS,
            "memory": "torch's forward-mode rules in Python renew caches of their own for a thousand steps after the "
            "tracing starts; a test of this file counts objects instead",
        },
        bad_input=(
            BadInput("lr", lambda: ForwardGradient([parameter()], lr=-1.0)),
            BadInput("num_queries", lambda: ForwardGradient([parameter()], num_queries=0)),
            BadInput("weight_decay", lambda: ForwardGradient([parameter()], weight_decay=-1.0)),
            BadInput("closure", lambda: ForwardGradient([parameter()]).step(), TypeError),
        ),
    ),
    OptimizerCase(
        part="provenn.optim.HybridZO",
        make=hybrid,
        closure="required",
        quadratic_steps=2000,
        rosenbrock={"lr": 6e-4},
        rosenbrock_steps=3000,
        excluded=NO_GRADIENTS,
        bad_input=(
            BadInput("params_zo", lambda: HybridZO([], [], {}, torch.optim.Adam)),
            BadInput("params_fo", shared),
            BadInput("eps", lambda: hybrid([parameter(), parameter()], eps=0.0)),
            BadInput("last", lambda: HybridZO.last_blocks([[parameter()]], 2, {}, torch.optim.Adam)),
            BadInput("part", lambda: hybrid([parameter()]).add_param_group({"params": [parameter()]}, part="fo")),
            BadInput("state_dict", lambda: hybrid([parameter()]).load_state_dict(hybrid(two()).state_dict())),
        ),
    ),
    FunctionCase(
        part="provenn.optim.zo_gradient",
        call=lambda: zo_gradient(lambda: torch.tensor(0.0), [parameter(3)], generator=seeded()),
        bad_input=(
            BadInput("eps", lambda: zo_gradient(lambda: 0.0, [parameter()], eps=0.0)),
            BadInput("num_queries", lambda: zo_gradient(lambda: 0.0, [parameter()], num_queries=0)),
            BadInput("params", lambda: zo_gradient(lambda: 0.0, [])),
        ),
    ),
    FunctionCase(
        part="provenn.optim.parameter_blocks",
        call=lambda: parameter_blocks(small_model()),
        bad_input=(
            BadInput("level", lambda: parameter_blocks(small_model(), "layer")),
            BadInput("model", lambda: parameter_blocks(nn.ReLU())),
        ),
    ),
    FunctionCase(
        part="provenn.optim.estimate_memory",
        call=lambda: estimate_memory(small_model(), (torch.zeros(2, 4),)),
        bad_input=(BadInput("method", lambda: estimate_memory(small_model(), (torch.zeros(2, 4),), "zo")),),
    ),
    FunctionCase(
        part="provenn.optim.MemoryEstimate",
        call=lambda: MemoryEstimate(1, 2, 3, 4, 5).total,
        bad_input_reason="it holds five numbers",
    ),
]


# The estimate.


class Quadratic:
    """½ θᵀAθ + bᵀθ over two tensors, A positive definite and not diagonal."""

    def __init__(self, dtype=torch.float64):
        draws = seeded(5)
        root = torch.randn(10, 10, generator=draws, dtype=torch.float64)
        self.a = (root @ root.T / 10 + torch.eye(10, dtype=torch.float64)).to(dtype)
        self.b = torch.randn(10, generator=draws, dtype=torch.float64).to(dtype)
        self.params = [parameter(2, 3, dtype=dtype, seed=1), parameter(4, dtype=dtype, seed=2)]

    def point(self):
        return torch.cat([one.flatten() for one in self.params])

    def loss(self):
        x = self.point()
        return x @ self.a @ x / 2 + self.b @ x

    def gradient(self):
        return (self.a @ self.point() + self.b).detach()


def flat(tensors):
    return torch.cat([one.detach().flatten() for one in tensors])


@pytest.mark.parametrize("eps", [1e-3, 0.1, 3.0])
def test_two_sided_difference_of_a_quadratic_is_exact_for_every_step(eps):
    task = Quadratic()
    found = flat(zo_gradient(task.loss, task.params, eps, generator=seeded(3)))
    # The estimate is c·z, and c = ⟨∇f, z⟩: its component along itself divided by z tells both.
    z = materialised(task.params, 3)
    torch.testing.assert_close(found, (task.gradient() @ z) * z, rtol=1e-9, atol=1e-9)


def materialised(params, generator_seed, query=0):
    """The direction of zo_gradient, drawn here tensor by tensor with torch's generator."""
    seed = derive_seed(int(torch.randint(1 << 62, (), generator=seeded(generator_seed))), query)
    pieces = [
        torch.empty(one.numel(), dtype=one.dtype).normal_(generator=seeded(derive_seed(seed, index)))
        for index, one in enumerate(params)
    ]
    return torch.cat(pieces)


def test_one_sided_difference_of_a_quadratic_has_the_curvature_for_a_bias():
    task = Quadratic()
    found = flat(zo_gradient(task.loss, task.params, 0.1, two_sided=False, generator=seeded(3)))
    z = materialised(task.params, 3)
    torch.testing.assert_close(found, (task.gradient() @ z + 0.05 * z @ task.a @ z) * z, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("queries", "count"),
    [
        (1, 2_000),
        (4, 500),
        pytest.param(1, 40_000, marks=pytest.mark.slow(reason="40 000 estimates, a minute under checked signatures")),
    ],
)
def test_mean_and_second_moment_of_the_estimate(queries, count):
    # E ĝ = ∇f and E‖ĝ‖² = (1 + (d + 1)/q)‖∇f‖², d = 10; ‖ĝ‖² varies by about 1.5 times its mean, so that 3 % are
    # four standard errors of 40 000 seeds, and fewer get three standard errors of their own.
    task = Quadratic()
    exact = task.gradient()
    draws = seeded(11)
    rows = torch.stack([flat(zo_gradient(task.loss, task.params, 1.0, queries, generator=draws)) for _ in range(count)])
    errors = (rows.mean(0) - exact) / (rows.std(0) / math.sqrt(count))
    assert errors.abs().max() < 3
    expected = (1 + 11 / queries) * float(exact.square().sum())
    squares = rows.square().sum(1)
    margin = 0.03 * expected if count >= 40_000 else 3 * float(squares.std()) / math.sqrt(count)
    assert abs(float(squares.mean()) - expected) < margin


class Curved:
    """A loss with third and fourth derivatives, as a closure and as a function of parameters."""

    def __init__(self):
        self.model = small_model().double()
        draws = seeded(4)
        for one in self.model.parameters():
            one.data.copy_(torch.randn(one.shape, generator=draws, dtype=one.dtype))
        self.x = torch.randn(5, 4, generator=draws, dtype=torch.float64)
        self.y = torch.randint(2, (5,), generator=draws)
        self.params = list(self.model.parameters())

    def loss(self):
        return nn.functional.cross_entropy(self.model(self.x), self.y)

    def of(self, values):
        return nn.functional.cross_entropy(torch.func.functional_call(self.model, values, (self.x,)), self.y)

    def slope(self, z):
        """The derivative along z, by torch.func.jvp on a function of parameters."""
        names = [name for name, _ in self.model.named_parameters()]
        cut = z.split([one.numel() for one in self.params])
        tangents = {name: t.view(one.shape) for name, t, one in zip(names, cut, self.params, strict=True)}
        return float(forward_derivative(self.of, dict(self.model.named_parameters()), tangents)[1])


@pytest.mark.parametrize(("two_sided", "order"), [(True, 2), (False, 1)])
def test_difference_approaches_the_forward_derivative_at_its_order(two_sided, order):
    task = Curved()
    z = materialised(task.params, 3)
    exact = task.slope(z)
    steps = np.array([0.08, 0.04, 0.02, 0.01, 0.005]) / (1 if two_sided else 10)
    errors = []
    for eps in steps:
        found = flat(zo_gradient(task.loss, task.params, float(eps), two_sided=two_sided, generator=seeded(3)))
        errors.append(abs(float(found @ z / (z @ z)) - exact))
    assert np.polyfit(np.log(steps), np.log(errors), 1)[0] == pytest.approx(order, abs=0.1)


def test_forward_gradient_moves_along_its_direction_by_the_exact_derivative():
    task = Curved()
    optimizer = ForwardGradient(task.params, lr=0.1, weight_decay=0.5, generator=seeded(3))
    drawn = SeededDirection(task.params, optimizer.draw_seed(0)).materialize()
    before, slope = flat(task.params), task.slope(flat(drawn))
    first = optimizer.step(task.loss)
    expected = before - 0.1 * (slope * flat(drawn) + 0.5 * before)
    torch.testing.assert_close(flat(task.params), expected, rtol=1e-12, atol=1e-12)
    assert optimizer.queries == 1
    assert not torch.autograd.forward_ad.unpack_dual(task.params[0]).tangent is not None
    assert float(first) == pytest.approx(float(Curved().loss().detach()), rel=1e-12)


def test_forward_gradients_average_their_queries_and_differ():
    task = Curved()
    optimizer = ForwardGradient(task.params, lr=1.0, num_queries=3, generator=seeded(3))
    drawn = [flat(SeededDirection(task.params, optimizer.draw_seed(query)).materialize()) for query in range(3)]
    expected = flat(task.params) - sum(task.slope(one) * one for one in drawn) / 3
    optimizer.step(task.loss)
    torch.testing.assert_close(flat(task.params), expected, rtol=1e-12, atol=1e-12)


def test_forward_gradient_takes_model_and_batch():
    task, twin = Curved(), Curved()
    model = nn.Sequential(task.model, nn.Dropout(0.5)).train()
    optimizer = ForwardGradient(
        model, lambda model, x, y: nn.functional.cross_entropy(model(x), y), lr=0.1, generator=seeded(3)
    )
    optimizer.step(batch=(task.x, task.y))
    ForwardGradient(twin.params, lr=0.1, generator=seeded(3)).step(twin.loss)
    assert torch.equal(flat(task.params), flat(twin.params))
    assert model.training
    frozen = nn.Linear(2, 2)
    frozen.bias.requires_grad_(False)
    assert ForwardGradient(frozen).tensors == [frozen.weight]


class Opaque(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x * 2

    @staticmethod
    def backward(ctx, gradient):
        return gradient * 2


def test_operations_without_a_forward_rule_are_named():
    weight = parameter(3, 3)
    optimizer = ForwardGradient([weight])
    before = weight.detach().clone()
    with pytest.raises(NotImplementedError, match="_cdist_forward"):
        optimizer.step(lambda: torch.cdist(weight, weight).sum())
    with pytest.raises(NotImplementedError, match="jvp"):
        optimizer.step(lambda: Opaque.apply(weight).sum())
    with pytest.raises(RuntimeError, match="does not depend on the parameters"):
        optimizer.step(lambda: torch.tensor(1.0))
    assert torch.equal(before, weight)
    weight.square().sum().backward()
    assert torch.equal(weight.grad, 2 * before)


def test_forward_gradients_leave_no_objects_behind():
    task = Curved()
    optimizer = ForwardGradient(task.params, lr=1e-3)
    counts = []
    for _ in range(3):
        for _ in range(100):
            optimizer.step(task.loss)
        gc.collect()
        counts.append(len(gc.get_objects()))
    assert counts[2] - counts[1] < 50


def test_forward_gradient_skips_bad_losses():
    weight = parameter(3)
    optimizer, before = ForwardGradient([weight]), weight.detach().clone()
    optimizer.step(lambda: weight.sum() * math.nan)
    assert optimizer.skipped == 1
    assert torch.equal(before, weight)


# Seeds, and what a perturbation leaves.


def test_three_moves_return_within_rounding_and_exact_restore_within_none():
    values = torch.randn(50_000, generator=seeded(8))
    for options, ulps in (({}, 4), ({"exact_restore": True}, 0)):
        weight = nn.Parameter(values.clone())
        optimizer = ZerothOrder([weight], lr=1.0, generator=seeded(1), **options)
        optimizer.step(lambda: torch.tensor(2.0))  # a constant loss: the estimate is 0
        places = torch.maximum(values.abs(), torch.tensor(1e-3 * 5))  # z reaches five, and θ ± μz rounds at that size
        moved = (weight.detach() - values).abs() / (torch.nextafter(places, torch.tensor(9.0)) - places)
        assert moved.max() <= ulps
        assert (moved.max() > 0) == (ulps > 0)


def test_exact_restore_by_layers_equals_the_one_by_copies():
    found = []
    for with_model in (False, True):
        task = Curved()
        model = task.model if with_model else None
        optimizer = ZerothOrder(task.params, lr=0.01, generator=seeded(2), exact_restore=True, model=model)
        for _ in range(20):
            optimizer.step(task.loss)
        found.append(flat(task.params))
    torch.testing.assert_close(*found, rtol=1e-9, atol=1e-9)


def test_the_memory_is_never_moved_where_layers_are():
    task = Curved()
    before, seen = flat(task.params), []

    def loss():
        value = task.loss()
        seen.append(torch.equal(before, flat(task.params)))
        return value

    ZerothOrder(task.params, lr=1e-3, exact_restore=True, model=task.model).step(loss)
    assert seen == [True, True]


def test_dropout_is_off_within_a_step_given_the_model():
    model = nn.Sequential(nn.Linear(4, 200), nn.Dropout(0.5), nn.Linear(200, 1)).train()
    x, values = torch.randn(3, 4, generator=seeded()), []
    for given in (model, None):
        optimizer = ZerothOrder(model.parameters(), lr=1e-12, eps=1e-7, model=given)
        with torch.random.fork_rng():
            values.append([float(optimizer.step(lambda: model(x).sum())) for _ in range(2)])
    assert values[0][0] == pytest.approx(values[0][1], rel=1e-3)
    assert values[1][0] != pytest.approx(values[1][1], rel=1e-3)
    assert model[1].training


# The rules, from materialised directions.


def drawn(optimizer, block, query=0, tensors=None):
    tensors = optimizer.tensors if tensors is None else tensors
    return flat(SeededDirection(tensors, optimizer.draw_seed(block, query)).materialize())


def slopes(task, optimizer, block=0):
    """The derivatives that a quadratic's two-sided differences are exactly, with their directions."""
    z = [drawn(optimizer, block, query) for query in range(optimizer.num_queries)]
    return [float(task.gradient() @ one) for one in z], z


@pytest.mark.parametrize("queries", [1, 3])
@pytest.mark.parametrize("decay", [0.0, 0.3])
@pytest.mark.parametrize("rule", ["sgd", "sign", "coordinate", "momentum", "adam"])
def test_rules_follow_their_formulas(rule, decay, queries):
    task = Quadratic()
    options = {"sign": "coordinate"} if rule == "coordinate" else {}
    optimizer = ZerothOrder(
        task.params,
        lr=0.01,
        rule="sign" if rule == "coordinate" else rule,
        num_queries=queries,
        weight_decay=decay,
        momentum=0.8,
        betas=(0.7, 0.95),
        generator=seeded(6),
        **options,
    )
    first, second = torch.zeros(10, dtype=torch.float64), torch.zeros(10, dtype=torch.float64)
    for step in range(1, 6):
        c, z = slopes(task, optimizer)
        theta = task.point().detach()
        g = sum((np.sign(a) if rule == "sign" else a) * b for a, b in zip(c, z, strict=True)) / queries
        if rule == "coordinate":
            g = g.sign()
        g = g + decay * theta
        if rule == "momentum":
            first = 0.8 * first + g
            expected = theta - 0.01 * first
        elif rule == "adam":
            first, second = 0.7 * first + 0.3 * g, 0.95 * second + 0.05 * g * g
            expected = theta - 0.01 * (first / (1 - 0.7**step)) / ((second / (1 - 0.95**step)).sqrt() + 1e-8)
        else:
            expected = theta - 0.01 * g
        optimizer.step(task.loss)
        torch.testing.assert_close(task.point().detach(), expected, rtol=1e-7, atol=1e-7)
    assert optimizer.queries == 10 * queries


def test_signs_move_by_the_noise_or_by_the_step_size():
    for sign in ("query", "coordinate"):
        task = Quadratic()
        optimizer = ZerothOrder(task.params, lr=0.02, rule="sign", sign=sign, generator=seeded(6))
        z, before = drawn(optimizer, 0), task.point().detach()
        optimizer.step(task.loss)
        moved = (task.point().detach() - before).abs() / 0.02
        torch.testing.assert_close(moved, z.abs() if sign == "query" else torch.ones(10, dtype=torch.float64))


def test_groups_have_their_own_options():
    task = Quadratic()
    groups = [{"params": task.params[:1], "lr": 0.01}, {"params": task.params[1:], "lr": 0.05, "weight_decay": 0.2}]
    optimizer = ZerothOrder(groups, generator=seeded(6))
    (c,), (z,) = slopes(task, optimizer)
    theta = task.point().detach()
    optimizer.step(task.loss)
    rates = torch.tensor([0.01] * 6 + [0.05] * 4, dtype=torch.float64)
    decay = torch.tensor([0.0] * 6 + [0.2] * 4, dtype=torch.float64)
    torch.testing.assert_close(task.point().detach(), theta - rates * (c * z + decay * theta))


@pytest.mark.parametrize(
    ("rule", "buffers"), [("sgd", 0), ("sign", 0), ("conservative", 0), ("momentum", 1), ("adam", 2)]
)
def test_buffers_are_as_many_as_the_rule_says(rule, buffers):
    task = Quadratic()
    optimizer = ZerothOrder(task.params, lr=1e-3, rule=rule)
    for _ in range(2):
        optimizer.step(task.loss)
    held = [one for kept in optimizer.state.values() for one in kept.values() if isinstance(one, torch.Tensor)]
    assert sum(one.numel() for one in held) == 10 * buffers


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("lr", [1e-3, 0.3, 30.0])
def test_conservative_never_gets_worse_and_evaluates_five_times(lr, exact):
    task = Curved()
    counter = QueryCounter(task.loss)
    optimizer = ZerothOrder(task.params, lr=lr, rule="conservative", generator=seeded(1), exact_restore=exact)
    kept = 0
    for step in range(30):
        before, place = float(task.loss().detach()), flat(task.params)
        optimizer.step(counter)
        assert counter.count == 5 * (step + 1)
        after = float(task.loss().detach())
        assert after <= before * (1 if exact else 1 + 1e-12)  # without the option, θ itself is reached by rounded moves
        kept += torch.equal(place, flat(task.params)) if exact else after >= before * (1 - 1e-12)
    assert optimizer.queries == 150
    assert kept > 0 if lr == 30.0 else kept < 30


def test_conservative_keeps_the_best_of_three():
    def line(values):
        """A step whose five losses are given: f(θ), the two of the difference, then the opposite and the step."""
        weight = nn.Parameter(torch.zeros(1, dtype=torch.float64))
        optimizer = ZerothOrder([weight], lr=1.0, rule="conservative", eps=1.0, generator=seeded(1), exact_restore=True)
        z = float(drawn(optimizer, 0))
        given = iter(values)
        optimizer.step(lambda: next(given))
        return weight.item() / z  # c is 1, so that the step is −1

    assert line([5.0, 1.0, -1.0, 6.0, 4.0]) == -1.0
    assert line([5.0, 1.0, -1.0, 4.0, 6.0]) == 1.0
    assert line([5.0, 1.0, -1.0, 6.0, 7.0]) == 0.0
    assert line([5.0, 1.0, -1.0, 5.0, 5.0]) == -1.0  # ties go to the step
    assert line([5.0, 1.0, -1.0, 4.0, 4.0]) == -1.0
    assert line([5.0, 1.0, -1.0, math.nan, 4.0]) == -1.0
    assert line([5.0, 1.0, -1.0, 4.0, math.nan]) == 1.0
    assert line([5.0, 1.0, -1.0, math.nan, math.nan]) == 0.0


@pytest.mark.parametrize(("rule", "count"), [("sgd", 4), ("conservative", 5)])
def test_one_sided_queries_share_the_base(rule, count):
    task = Curved()
    counter = QueryCounter(task.loss)
    queries = 3 if rule == "sgd" else 2
    ZerothOrder(task.params, rule=rule, two_sided=False, num_queries=queries).step(counter)
    assert counter.count == count  # 1 + q; conservative: f(θ), q, and two candidates


# Blocks.


def blockwise(immediate, one_sided=False, **options):
    task = Quadratic()
    counter = QueryCounter(task.loss)
    blocks = [[task.params[1]], [task.params[0]]]
    optimizer = ZerothOrder(
        task.params,
        lr=0.01,
        blocks=blocks,
        immediate=immediate,
        two_sided=not one_sided,
        generator=seeded(6),
        **options,
    )
    return task, counter, optimizer, blocks


@pytest.mark.parametrize("immediate", [True, False])
def test_blocks_step_one_by_one_with_the_others_as_they_are(immediate):
    task, counter, optimizer, blocks = blockwise(immediate)
    place = {id(task.params[0]): slice(0, 6), id(task.params[1]): slice(6, 10)}
    theta = task.point().detach()
    gradient = task.a @ theta + task.b
    for number, block in enumerate(blocks):
        part = place[id(block[0])]
        if immediate:
            gradient = task.a @ theta + task.b
        z = drawn(optimizer, number, tensors=block)
        theta[part] -= 0.01 * float(gradient[part] @ z) * z
    optimizer.step(counter)
    torch.testing.assert_close(task.point().detach(), theta, rtol=1e-9, atol=1e-9)
    assert counter.count == 4


def test_deferred_blocks_share_a_one_sided_base():
    for immediate, count in ((True, 4), (False, 3)):
        _, counter, optimizer, _ = blockwise(immediate, one_sided=True)
        optimizer.step(counter)
        assert counter.count == count


def test_one_block_is_the_full_estimate():
    found = []
    for blocks in (None, "all"):
        task = Curved()
        optimizer = ZerothOrder(task.params, lr=0.01, blocks=blocks and [task.params], generator=seeded(2))
        for _ in range(5):
            optimizer.step(task.loss)
        found.append(flat(task.params))
    assert torch.equal(*found)


def test_blocks_of_one_shape_draw_different_noise():
    params = [parameter(500, seed=1), parameter(500, seed=2)]
    optimizer = ZerothOrder(params, lr=1.0, rule="sign", blocks=[[one] for one in params], generator=seeded(3))
    before = [one.detach().clone() for one in params]
    optimizer.step(lambda: sum(one.sum() for one in params))
    one, other = ((now.detach() - then).abs() for now, then in zip(params, before, strict=True))
    assert torch.corrcoef(torch.stack([one, other]))[0, 1].abs() < 0.15


class Transformer(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(7, 4)
        self.layers = nn.ModuleList(nn.TransformerEncoderLayer(4, 2, 8, batch_first=True) for _ in range(2))
        self.norm = nn.LayerNorm(4)
        self.head = nn.Linear(4, 7, bias=False)
        self.head.weight = self.embed.weight


@pytest.mark.parametrize(("level", "count"), [("transformer-block", 4), ("mlp-attn", 12), ("linear", 14)])
def test_levels_partition_a_transformer(level, count):
    # Embedding, two layers and the final norm; a layer has attention, two linear layers and two norms; the attention
    # holds its input projection itself and its output projection in a child.
    model = Transformer()
    blocks = parameter_blocks(model, level)
    assert len(blocks) == count
    held = [id(one) for block in blocks for one in block]
    assert sorted(held) == sorted(id(one) for one in model.parameters())
    assert blocks[0] == [model.embed.weight]  # the tied head comes with it
    assert blocks[-1] == list(model.norm.parameters())
    ZerothOrder(model.parameters(), blocks=blocks)


def test_frozen_parameters_are_in_no_block():
    model = small_model()
    model[0].weight.requires_grad_(False)
    assert parameter_blocks(model) == [[model[0].bias], [model[2].weight, model[2].bias]]


def test_an_added_group_is_one_more_block():
    task, _, optimizer, _ = blockwise(True)
    late = parameter(3)
    optimizer.add_param_group({"params": [late]})
    counter = QueryCounter(lambda: task.loss() + late.sum())
    optimizer.step(counter)
    assert counter.count == 6
    assert optimizer.blocks[2] == [late]


# Sparsity.


def zeros_of(optimizer, loss):
    """Which entries a step leaves, as one boolean vector."""
    before = flat(optimizer.tensors)
    optimizer.step(loss)
    return flat(optimizer.tensors) == before


def test_masks_have_their_share_last_their_window_and_are_used_throughout():
    weight, other = parameter(3000, dtype=torch.float64), parameter(60, 50, dtype=torch.float64, seed=4)
    optimizer = ZerothOrder(
        [weight, other], lr=1e-3, sparsity=0.7, resample_every=3, exact_restore=True, generator=seeded(1)
    )
    task = [zeros_of(optimizer, lambda: weight.sum() + other.square().sum()) for _ in range(7)]
    assert torch.equal(task[0], task[1])
    assert torch.equal(task[0], task[2])
    assert torch.equal(task[3], task[5])
    for mask in (task[0], task[3], task[6]):
        for half in mask.split(3000):
            assert abs(half.double().mean() - 0.7) < 3 * math.sqrt(0.7 * 0.3 / 3000)
    for one, another in ((task[0], task[3]), (task[3], task[6]), (task[0][:3000], task[0][3000:])):
        agreement = (one == another).double().mean()
        assert abs(agreement - (0.7**2 + 0.3**2)) < 0.04


def test_masked_entries_are_neither_perturbed_nor_moved():
    weight = parameter(400)
    optimizer = ZerothOrder([weight], lr=1e-3, eps=0.1, sparsity=0.5, exact_restore=True, generator=seeded(1))
    before, seen = weight.detach().clone(), []

    def loss():
        seen.append(weight.detach() != before)
        return weight.square().sum()

    optimizer.step(loss)
    moved = weight.detach() != before
    assert torch.equal(seen[0], moved)
    assert torch.equal(seen[1], moved)
    assert 0 < moved.sum() < 400


def test_no_sparsity_is_the_dense_path():
    found = []
    for options in ({}, {"sparsity": 0.0, "resample_every": 7, "sparsity_by": "global"}):
        task = Curved()
        optimizer = ZerothOrder(task.params, lr=0.01, generator=seeded(2), **options)
        for _ in range(5):
            optimizer.step(task.loss)
        found.append(flat(task.params))
    assert torch.equal(*found)


def test_global_shares_are_those_of_the_small_weights():
    small, large = parameter(2000), parameter(1000, seed=1)
    with torch.no_grad():
        large.mul_(3)
    options = {"sparsity": 0.4, "sparsity_by": "global", "exact_restore": True}
    optimizer = ZerothOrder([small, large], generator=seeded(3), **options)
    sizes = np.concatenate([one.detach().abs().numpy() for one in (small, large)])
    threshold = np.quantile(sizes, 0.4)
    expected = [(one.detach().abs().numpy() <= threshold).mean() for one in (small, large)]
    assert optimizer.shares == pytest.approx(expected, abs=2e-3)
    assert sum(share * count for share, count in zip(optimizer.shares, (2000, 1000), strict=True)) == pytest.approx(
        1200
    )
    left = zeros_of(optimizer, lambda: small.sum() + large.sum())
    for mask, share in zip(left.split([2000, 1000]), optimizer.shares, strict=True):
        assert abs(mask.double().mean() - share) < 3 * math.sqrt(share * (1 - share) / len(mask))


def test_masks_and_shares_are_resumed():
    def fresh(seed, scale=1.0):
        weight = nn.Parameter(scale * torch.randn(50, generator=seeded(9), dtype=torch.float64))
        options = {"sparsity": 0.5, "sparsity_by": "global", "resample_every": 4}
        params = [weight, nn.Parameter(torch.full((50,), 0.3, dtype=torch.float64))]
        return params, ZerothOrder(params, lr=1e-2, generator=seeded(seed), **options)

    params, optimizer = fresh(1)
    loss = lambda held: lambda: sum(one.square().sum() for one in held)  # noqa: E731
    for _ in range(5):
        optimizer.step(loss(params))
    others, resumed = fresh(2, scale=50.0)
    for mine, theirs in zip(others, params, strict=True):
        mine.data.copy_(theirs)
    assert resumed.shares != optimizer.shares
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for _ in range(5):
        optimizer.step(loss(params))
        resumed.step(loss(others))
    assert torch.equal(flat(params), flat(others))


# Hybrid.


def hybrid_of(task, last, **options):
    blocks = parameter_blocks(task.model)
    zo = {"lr": 0.02, "generator": seeded(6), **options}
    return HybridZO.last_blocks(blocks, last, zo, functools.partial(torch.optim.SGD, lr=0.1, momentum=0.5))


def test_hybrid_parts_step_from_the_same_weights():
    task, twin = Curved(), Curved()
    optimizer = hybrid_of(task, 1)
    ZerothOrder(twin.params[:2], lr=0.02, generator=seeded(6)).step(twin.loss)  # the head stays for now
    reference = Curved()
    exact = torch.autograd.grad(reference.loss(), reference.params[2:])
    first = optimizer.step(task.loss)
    assert torch.equal(flat(task.params[:2]), flat(twin.params[:2]))
    expected = flat(reference.params[2:]) - 0.1 * flat(exact)
    torch.testing.assert_close(flat(task.params[2:]), expected, rtol=1e-12, atol=1e-12)
    assert float(first) == float(reference.loss().detach())
    assert all(one.requires_grad for one in task.params)


def test_hybrid_of_no_block_is_zeroth_order_and_of_all_is_first_order():
    task, twin = Curved(), Curved()
    none, plain = hybrid_of(task, 0), ZerothOrder(twin.params, lr=0.02, generator=seeded(6))
    for _ in range(3):
        assert none.step(task.loss) == plain.step(twin.loss)
    assert torch.equal(flat(task.params), flat(twin.params))
    assert none.fo is None
    task, twin = Curved(), Curved()
    every, plain = hybrid_of(task, 2), torch.optim.SGD(twin.params, lr=0.1, momentum=0.5)
    for _ in range(3):
        every.step(task.loss)
        plain.zero_grad()
        twin.loss().backward()
        plain.step()
    torch.testing.assert_close(flat(task.params), flat(twin.params), rtol=1e-12, atol=1e-12)
    assert every.zo is None


def test_hybrid_stores_activations_of_the_first_order_part_only():
    with torch.random.fork_rng():
        model = nn.Sequential(*(nn.Sequential(nn.Linear(64, 64), nn.Tanh()) for _ in range(8)))
    x, peaks = torch.randn(512, 64, generator=seeded()), []
    for last in range(9):
        optimizer = HybridZO.last_blocks(
            parameter_blocks(model), last, {"lr": 1e-6}, functools.partial(torch.optim.SGD, lr=1e-6)
        )
        with TensorMemory() as memory:
            optimizer.step(lambda: model(x).square().mean())
        peaks.append(memory.peak)
    # Every block that joins the graph keeps its Tanh's result; at the two ends other moments of the step are the peak.
    assert np.diff(peaks)[1:7].tolist() == [512 * 64 * 4] * 6


def test_hybrid_closures_may_call_backward_themselves():
    found = []
    for backward in (False, True):
        task = Curved()
        optimizer = hybrid_of(task, 1)

        def closure(task=task, optimizer=optimizer, backward=backward):
            optimizer.zero_grad()
            loss = task.loss()
            if backward and loss.requires_grad:
                loss.backward()
            return loss

        for _ in range(3):
            optimizer.step(closure)
        found.append(flat(task.params))
    assert torch.equal(*found)


def test_hybrid_skips_bad_losses_in_both_parts():
    task = Curved()
    optimizer, before = hybrid_of(task, 1), flat(task.params)
    optimizer.step(lambda: task.loss() * math.nan)
    calls = iter([1.0, math.nan, 1.0])
    optimizer.step(lambda: task.loss() * next(calls))
    assert optimizer.skipped == 2
    torch.testing.assert_close(flat(task.params), before, rtol=1e-12, atol=1e-12)
    for _ in range(7):
        optimizer.step(lambda: task.loss() * math.nan)
    with pytest.raises(RuntimeError, match="10 steps in a row"):
        optimizer.step(lambda: task.loss() * math.nan)


def test_hybrid_schedulers_reach_both_parts():
    optimizer = hybrid_of(Curved(), 1)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    optimizer.step(Curved().loss)
    scheduler.step()
    assert [group["lr"] for group in optimizer.param_groups] == [0.01, 0.05]
    assert optimizer.zo.param_groups[0]["lr"] == 0.01


# Bad losses.


@pytest.mark.parametrize("rule", RULES)
def test_nan_losses_change_nothing(rule):
    task = Quadratic()
    optimizer = ZerothOrder(task.params, rule=rule, exact_restore=True)
    before = flat(task.params)
    for _ in range(9):
        optimizer.step(lambda: task.loss() * math.nan)
    assert optimizer.skipped == 9
    assert torch.equal(before, flat(task.params))
    assert not optimizer.state
    with pytest.raises(RuntimeError, match="10 steps in a row"):
        optimizer.step(lambda: task.loss() * math.nan)


def test_a_candidate_that_raises_leaves_the_weights():
    task = Quadratic()
    optimizer = ZerothOrder(task.params, lr=0.1, rule="conservative", exact_restore=True)
    before, calls = flat(task.params), iter(range(4))
    with pytest.raises(StopIteration):
        optimizer.step(lambda: next(calls) * 1.0)
    assert torch.equal(before, flat(task.params))


# Memory.


def heavy():
    """A model of sixteen layers of 1 MiB, which outweigh its activations."""
    with torch.random.fork_rng():
        return nn.Sequential(*(nn.Sequential(nn.Linear(512, 512, bias=False), nn.ReLU()) for _ in range(16)))


def peaks(make, model, x):
    """Bytes at the peak of a forward pass and of an optimizer's second step, weights included."""
    weights = sum(one.numel() * one.element_size() for one in model.parameters())
    with torch.no_grad(), TensorMemory() as memory:
        model(x).square().mean()
    optimizer = make(model)
    with TensorMemory() as step:
        optimizer.step(lambda: model(x).square().mean())
    return weights + memory.peak, weights + step.peak


@pytest.mark.parametrize("rule", ["sgd", "sign"])
def test_a_step_needs_the_memory_of_a_forward_pass(rule):
    # One tensor's noise at once would add 6 %; all of it, 100 %.
    model = heavy()
    x = torch.randn(4, 512, generator=seeded())
    ahead, step = peaks(lambda model: ZerothOrder(model.parameters(), rule=rule), model, x)
    assert step <= 1.02 * ahead


def test_a_small_model_needs_no_more_than_its_forward_pass_either():
    # The claim's network: its first layer's noise alone would be 392 KiB, and a forward pass takes 32.
    model = nn.Sequential(nn.Linear(784, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10))
    weights = sum(one.numel() * one.element_size() for one in model.parameters())
    x = torch.randn(32, 784, generator=seeded())
    ahead, step = peaks(lambda model: ZerothOrder(model.parameters()), model, x)
    assert step - weights <= 1.2 * (ahead - weights)


def test_momentum_and_adam_pay_for_their_buffers():
    model = heavy()
    weights = sum(one.numel() * one.element_size() for one in model.parameters())
    x = torch.randn(4, 512, generator=seeded())
    for rule, buffers in (("momentum", 1), ("adam", 2)):
        ahead, step = peaks(lambda model, rule=rule: ZerothOrder(model.parameters(), rule=rule), model, x)
        assert buffers * weights <= step - ahead <= (buffers + 0.1) * weights


def test_forward_gradients_need_their_tangents():
    model = heavy()
    weights = sum(one.numel() * one.element_size() for one in model.parameters())
    x = torch.randn(4, 512, generator=seeded())
    ahead, step = peaks(lambda model: ForwardGradient(model), model, x)
    # Beside the tangents, one tensor's that is still to be taken over, and the tangents of activations.
    assert weights <= step - ahead <= 1.1 * weights
    estimated = estimate_memory(model, (x,), "forward-gradient").total
    assert estimated == pytest.approx(step, rel=0.05)


def test_estimates_of_memory_are_what_a_perceptron_holds():
    # 256 samples; Linear(64 → 32), ReLU, Linear(32 → 8), float32. Without a graph the first layer's output and the
    # ReLU's are alive together; with one, ReLU's result stays while the last layer's output comes.
    model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 8))
    batch = (torch.zeros(256, 64),)
    weights = 4 * (64 * 32 + 32 + 32 * 8 + 8)
    layer = 4 * 256 * 32 * 2
    assert estimate_memory(model, batch, "zo-sgd") == MemoryEstimate(weights, 0, 0, 0, layer)
    assert estimate_memory(model, batch, "zo-momentum") == MemoryEstimate(weights, 0, weights, 0, layer)
    assert estimate_memory(model, batch, "zo-adam") == MemoryEstimate(weights, 0, 2 * weights, 0, layer)
    assert estimate_memory(model, batch, "forward-gradient") == MemoryEstimate(weights, 0, 0, weights, 2 * layer)
    assert estimate_memory(model, batch, "fo-sgd") == MemoryEstimate(weights, weights, 0, 0, layer)
    assert estimate_memory(model, batch, "fo-adam").total == 4 * weights + layer
    deep = nn.Sequential(*(nn.Sequential(nn.Linear(32, 32), nn.ReLU()) for _ in range(10)))
    kept = estimate_memory(deep, (torch.zeros(256, 32),), "fo-sgd").activations
    assert kept == 4 * 256 * 32 * 11  # ten results, and an output before its ReLU
    assert estimate_memory(deep, (torch.zeros(256, 32),), "zo-sgd").activations == 4 * 256 * 32 * 3


def test_memory_is_estimated_without_memory():
    model = nn.Linear(100_000, 100_000, bias=False, device="meta")
    found = estimate_memory(model, (torch.zeros(2, 100_000, device="meta"),), "fo-adam")
    assert found.weights == 4 * 10**10
    assert found.total == 4 * found.weights + 2 * 100_000 * 4


def test_frozen_weights_have_no_gradients_or_moments():
    model = small_model()
    model[0].requires_grad_(False)
    found = estimate_memory(model, (torch.zeros(2, 4),), "fo-adam")
    assert (found.weights, found.gradients, found.optimizer_state) == (23 * 4, 8 * 4, 16 * 4)


# The authors' loops, on given directions.


def authors_loop(task, optimizer, lr, steps, rule="sgd", decay=0.0):
    """MeZO's step in NumPy: move by +μz, −2μz, +μz, and update; momentum and Adam are torch's on the estimate."""
    a, b = task.a.numpy(), task.b.numpy()

    def value(point):
        return point @ a @ point / 2 + b @ point

    theta, momentum = task.point().detach().numpy().copy(), np.zeros(10)
    for _ in range(steps):
        z = drawn(optimizer, 0).numpy()
        theta = theta + 1 * z * 1e-3
        ahead = value(theta)
        theta = theta + -2 * z * 1e-3
        projected = (ahead - value(theta)) / (2 * 1e-3)
        theta = theta + 1 * z * 1e-3
        g = (np.sign(projected) if rule == "sign" else projected) * z + decay * theta
        momentum = 0.9 * momentum + g
        theta = theta - lr * (momentum if rule == "momentum" else g)
        yield theta


@pytest.mark.parametrize(("rule", "decay"), [("sgd", 0.0), ("sgd", 0.1), ("sign", 0.0), ("momentum", 0.0)])
def test_trajectory_is_the_authors_loops(rule, decay):
    task = Quadratic()
    optimizer = ZerothOrder(task.params, lr=0.01, rule=rule, weight_decay=decay, generator=seeded(6))
    for theta in authors_loop(task, optimizer, 0.01, 20, rule, decay):
        optimizer.step(task.loss)
        np.testing.assert_allclose(task.point().detach().numpy(), theta, rtol=1e-9, atol=1e-9)
