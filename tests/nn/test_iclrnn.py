"""The convex Lipschitz layers and their controller against steps by hand, singular values, and convex programs."""

import copy
import dataclasses
import math
import re

import numpy as np
import pytest
import scipy.optimize
import torch
from torch import nn

from provenn.contracts import (
    BadInput,
    Form,
    FunctionCase,
    InitCase,
    KnownProblem,
    ModuleCase,
    RefusedProblem,
    SolverCase,
    Symmetry,
)
from provenn.core.experiment.seeding import seeded
from provenn.nn import CSTR, ICLRNN, ICRNN, ICLRNNCell, LipschitzRNN, NeuralMPC
from provenn.nn.constraints import nonnegative_spectral_

LENGTH, FEATURES = 4, 3


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def away(module):
    """Draw every parameter anew so that all parts are at work, biases included, and restore the constraint."""
    with torch.no_grad():
        for parameter in module.parameters():
            nn.init.normal_(parameter, std=0.5)
    module.project_()
    return module


def positive(module):
    """Draw weights without zeros: a unit that gets nothing sits on ReLU's kink, where there is no derivative."""
    with torch.no_grad():
        for parameter in module.parameters():
            nn.init.uniform_(parameter, 0.05, 0.5)
    return module


def drawn(make, seed=0):
    with seeded(seed):
        return away(make().double())


def sequences(generator, dtype, batch):
    return (torch.randn(batch, LENGTH, FEATURES, generator=generator, dtype=torch.float64).to(dtype),)


def one_step(generator, dtype, batch):
    shapes = ((batch, FEATURES), (batch, 5))
    return tuple(torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes)


def by_steps(module, inputs):
    """Run an ICLRNN one step at a time through its cells."""
    (x,) = inputs
    states, outputs = [None] * len(module.cells), []
    for t in range(x.shape[1]):
        h = torch.cat((x[:, t], -x[:, t]), -1) if module.expand_input else x[:, t]
        for place, cell in enumerate(module.cells):
            h = states[place] = cell(h, states[place])
        outputs.append(h if module.readout is None else module.readout(h).relu())
    return torch.stack(outputs, 1)


def torch_own(module, inputs):
    """Run a two-layer ICLRNN as torch's own ReLU network."""
    (x,) = inputs
    names = [f"{kind}_l{layer}" for layer in (0, 1) for kind in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")]
    values = [
        value
        for cell in module.cells
        for value in (cell.W, cell.U, cell.b, torch.zeros_like(cell.b, requires_grad=False))
    ]
    own = nn.RNN(2 * FEATURES, module.hidden_size, 2, nonlinearity="relu", batch_first=True).to(x.dtype)
    given = torch.cat((x, -x), -1)
    h = torch.func.functional_call(own, dict(zip(names, values, strict=True)), (given,))[0]
    return module.readout(h).relu()


def step_gain(cell):
    """Bound one step by (x, h): ‖[W U]‖."""
    return float(torch.linalg.svdvals(torch.cat((cell.W, cell.U), 1).detach())[0])


def same_bad(make, **more):
    return (
        BadInput("input_size", lambda: make(0, 4)),
        BadInput("hidden_size", lambda: make(3, 2.0), TypeError),
        BadInput("num_layers", lambda: make(3, 4, num_layers=0)),
        BadInput("output_size", lambda: make(3, 4, output_size=0)),
        BadInput("x", lambda: make(3, 4)(torch.ones(2, 5, 4))),
        BadInput("x", lambda: make(3, 4)(torch.ones(2, 3))),
        BadInput("x", lambda: make(3, 4)(torch.ones(2, 0, 3))),
        BadInput("x", lambda: make(3, 4)(torch.ones(2, 5, 3, dtype=torch.int64)), TypeError),
        *(BadInput(name, call) for name, call in more.items()),
    )


class Linear(nn.Module):
    """y_t = A [x0; u_t] + b, a model whose control problem is solved by hand."""

    def __init__(self, A, b, relu=False):
        super().__init__()
        self.linear = nn.Linear(*reversed(A.shape))
        self.relu = relu
        with torch.no_grad():
            self.linear.weight.copy_(A)
            self.linear.bias.copy_(b)

    def forward(self, x):
        return self.linear(x).relu() if self.relu else self.linear(x)


SCALAR = torch.tensor([[1.0, 2.0]]), torch.tensor([0.0])
"""ŷ = x₀ + 2u: the objective (x₀ + 2u)² + u² is least at u = −2 x₀ / 5."""
WIDE = torch.tensor([[-10.0], [10.0]])
FIELDS = ("x0", "P", "level", "bounds")


def controller_of(problem, **options):
    P, level, bounds = (problem.get(name) for name in ("P", "level", "bounds"))
    return NeuralMPC(Linear(*SCALAR), 3, WIDE if bounds is None else bounds, P, level, **{"tol": 1e-8, **options})


class Controller:
    """NeuralMPC over problems that bring their own bound and box."""

    def __init__(self, **options):
        self.options = options

    def solve(self, problem):
        return controller_of(problem, **self.options).solve(problem["x0"])


def certificate_by_hand(problem, solution):
    """The objective and the stationarity of ŷ = x₀ + 2u, by hand."""
    u, x0 = solution.x.squeeze(-1), float(problem["x0"])
    y = x0 + 2 * u
    p = float(problem["P"]) if "P" in problem else 0.0
    slope = 4 * y + 2 * u + solution.certificate.multipliers * 4 * p * y
    low, high = (problem.get("bounds", WIDE)).double()
    excess = (p * y.square() - problem["level"]).amax().clamp(min=0) if "P" in problem else torch.tensor(0.0)
    ends = solution.certificate.objectives
    return {
        "objective": (y.square() + u.square()).sum().item(),
        "projected_gradient_norm": (u - torch.clamp(u - slope, low, high)).norm().item(),
        "violation": excess.item(),
        "spread": np.ptp(ends) / max(1e-12, abs(min(ends))),
    }


ONE = torch.ones(1, 1)
KNOWN = (
    KnownProblem("a free optimum", lambda: {"x0": torch.tensor([1.0])}, lambda: torch.full((3, 1), -0.4).double()),
    KnownProblem(
        "an optimum on the box",
        lambda: {"x0": torch.tensor([1.0]), "bounds": torch.tensor([[-0.25], [1.0]])},
        lambda: torch.full((3, 1), -0.25).double(),
    ),
    KnownProblem(
        "a bound of V that binds",  # (1 + 2u)² ≤ 0.01: u = −0.45
        lambda: {"x0": torch.tensor([1.0]), "P": ONE, "level": 0.01},
        lambda: torch.full((3, 1), -0.45).double(),
    ),
    KnownProblem(
        "a bound of V that does not",
        lambda: {"x0": torch.tensor([1.0]), "P": ONE, "level": 1.0},
        lambda: torch.full((3, 1), -0.4).double(),
    ),
    KnownProblem(
        "a box of one point",
        lambda: {"x0": torch.tensor([1.0]), "bounds": torch.full((2, 1), 0.5)},
        lambda: torch.full((3, 1), 0.5).double(),
    ),
)


def bad_controller(argument, error=ValueError, **options):
    given = {"model": Linear(*SCALAR), "horizon": 3, "bounds": WIDE, **options}
    return BadInput(argument, lambda: NeuralMPC(**given), error)


CASES = [
    ModuleCase(
        part="provenn.nn.ICLRNN",
        make=lambda: away(ICLRNN(FEATURES, 5, output_size=2)),
        inputs=sequences,
        causal_dim=1,
        forms=(Form("step by step", by_steps), Form("torch's own", torch_own)),
        convex=True,
        lipschitz=lambda module, inputs: module.sequence_gain(inputs[0].shape[1]),
        symmetries=(
            Symmetry(
                "permutation of the samples", lambda inputs: (inputs[0].flip(0),), lambda output: output.flip(0), 1e-12
            ),
        ),
        bad_input=(
            *same_bad(ICLRNN, activation=lambda: ICLRNN(3, activation="tanh"), lip=lambda: ICLRNN(3, lip=-1.0)),
            BadInput("lip", lambda: ICLRNN(3, lip="1"), TypeError),
            BadInput("lip", lambda: ICLRNN(3, lip=0.0)),
            BadInput("length", lambda: ICLRNN(3).sequence_gain(0)),
        ),
    ),
    ModuleCase(
        part="provenn.nn.ICLRNN",
        label="states, not expanded, gain 0.7",
        make=lambda: away(ICLRNN(FEATURES, num_layers=3, lip=0.7, expand_input=False)),
        inputs=sequences,
        causal_dim=1,
        forms=(Form("step by step", by_steps),),
        convex=True,
        lipschitz=lambda module, inputs: module.sequence_gain(inputs[0].shape[1]),
        bad_input_reason="as the first case",
    ),
    ModuleCase(
        part="provenn.nn.ICLRNNCell",
        make=lambda: away(ICLRNNCell(FEATURES, 5)),
        inputs=one_step,
        convex=True,
        lipschitz=lambda module, inputs: step_gain(module),
        bad_input=(
            BadInput("input_size", lambda: ICLRNNCell(0, 4)),
            BadInput("hidden_size", lambda: ICLRNNCell(3, 2.0), TypeError),
            BadInput("lip", lambda: ICLRNNCell(3, 4, lip=-1.0)),
            BadInput("activation", lambda: ICLRNNCell(3, 4, activation="leaky_relu")),
            BadInput("x", lambda: ICLRNNCell(3, 4)(torch.ones(2, 4))),
            BadInput("h", lambda: ICLRNNCell(3, 4)(torch.ones(2, 3), torch.ones(2, 3))),
            BadInput("x", lambda: ICLRNNCell(3, 4).unroll(torch.ones(2, 3))),
        ),
    ),
    ModuleCase(
        part="provenn.nn.ICRNN",
        make=lambda: positive(ICRNN(FEATURES, 5, output_size=2)),
        inputs=sequences,
        causal_dim=1,
        convex=True,
        bad_input=same_bad(ICRNN),
    ),
    ModuleCase(
        part="provenn.nn.LipschitzRNN",
        make=lambda: away(LipschitzRNN(FEATURES, 5, output_size=2, step=0.5)),
        inputs=sequences,
        causal_dim=1,
        bad_input=same_bad(
            LipschitzRNN,
            beta=lambda: LipschitzRNN(3, beta=1.5),
            gamma=lambda: LipschitzRNN(3, gamma=-0.1),
            step=lambda: LipschitzRNN(3, step=0.0),
        ),
    ),
    InitCase(
        part="provenn.nn.constraints.nonnegative_spectral_",
        initialize=lambda module, generator: nonnegative_spectral_(module.weight, generator=generator),
        make=lambda: nn.Linear(4, 6),
        changes=("weight",),
        moments=dict,
        returns_module=False,
        returns_module_reason="it sets one tensor, and returns that",
        forgets=False,
        forgets_reason="it projects what is there",
        random=False,
        random_reason="the start of the power iteration alone is drawn, which the end forgets",
        excluded={"moments": "a projection keeps the directions of what it is given; only its start is random"},
        bad_input=(
            BadInput("k", lambda: nonnegative_spectral_(torch.ones(2, 2), -1.0)),
            BadInput("k", lambda: nonnegative_spectral_(torch.ones(2, 2), "1"), TypeError),
            BadInput("W", lambda: nonnegative_spectral_(torch.ones(2))),
            BadInput("W", lambda: nonnegative_spectral_(torch.ones(2, 2, dtype=torch.int64)), TypeError),
        ),
    ),
    FunctionCase(
        part="provenn.nn.CSTR",
        call=lambda: CSTR().trajectories(grid=6, levels=2),
        bad_input=(
            BadInput("flow", lambda: CSTR(flow=0.0)),
            BadInput("step", lambda: CSTR(step="1"), TypeError),
            BadInput("grid", lambda: CSTR().starts(1)),
            BadInput("levels", lambda: CSTR().trajectories(5, levels=1)),
            BadInput("steps", lambda: CSTR().simulate(torch.zeros(1, 2), torch.zeros(1, 2), 7, 5)),
            BadInput("every", lambda: CSTR().simulate(torch.zeros(1, 2), torch.zeros(1, 2), 5, 0)),
            BadInput("inputs", lambda: CSTR().simulate(torch.zeros(2, 2), torch.zeros(1, 2))),
            BadInput("state", lambda: CSTR().simulate(torch.zeros(2, 3), torch.zeros(2, 2))),
            BadInput("state", lambda: CSTR().simulate(torch.zeros(1, 2).long(), torch.zeros(1, 2)), TypeError),
        ),
    ),
    SolverCase(
        part="provenn.nn.NeuralMPC",
        make=lambda **options: Controller(**options),
        known=KNOWN,
        refused=(
            RefusedProblem(
                "a level out of reach",
                lambda: {
                    "x0": torch.tensor([9.0]),
                    "P": ONE,
                    "level": 1.0,
                    "bounds": torch.tensor([[-1.0], [1.0]]),
                },
                "infeasible",
            ),
            RefusedProblem("a state of NaN", lambda: {"x0": torch.tensor([math.nan])}, "finite"),
        ),
        certificate=certificate_by_hand,
        early_stop={"max_iter": 1},
        bad_input=(
            bad_controller("model", TypeError, model=lambda x: x),
            bad_controller("horizon", horizon=0),
            bad_controller("bounds", bounds=torch.zeros(3)),
            bad_controller("bounds", bounds=torch.tensor([[1.0], [0.0]])),
            bad_controller("bounds", bounds=torch.tensor([[0.0], [math.inf]])),
            bad_controller("bounds", TypeError, bounds=(0.0, 1.0)),
            bad_controller("level", P=ONE),
            bad_controller("level", P=ONE, level=-1.0),
            bad_controller("P", P=-ONE, level=1.0),
            bad_controller("P", P=torch.tensor([[1.0, 1.0], [0.0, 1.0]]), level=1.0),
            bad_controller("starts", starts=0),
            bad_controller("tol", tol=0.0),
            bad_controller("max_iter", max_iter=0),
            BadInput("x0", lambda: NeuralMPC(Linear(*SCALAR), 3, WIDE).solve(torch.ones(1, 1))),
            BadInput("x0", lambda: NeuralMPC(Linear(*SCALAR), 3, WIDE).solve(torch.ones(1).long()), TypeError),
        ),
    ),
]


# The projection


@pytest.mark.parametrize("shape", [(6, 4), (4, 6), (5, 5), (1, 7), (7, 1)])
@pytest.mark.parametrize("k", [1.0, 0.3, 2.5])
def test_projection_is_clipping_then_scaling_to_the_norm(shape, k):
    W = normal(*shape).abs().sqrt() * normal(*shape, seed=1).sign()
    W[0, 0] = 1.0
    clipped = W.clamp(min=0)
    expected = k * clipped / (torch.linalg.svdvals(clipped)[0] + 1e-3)
    found = nonnegative_spectral_(W, k)
    assert found is W
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


def test_small_matrices_are_scaled_up():
    W = 1e-1 * torch.eye(3, dtype=torch.float64)
    torch.testing.assert_close(nonnegative_spectral_(W), torch.eye(3, dtype=torch.float64) / 1.01)


def test_clipping_comes_before_scaling():
    W = torch.tensor([[1.0, -10.0], [0.0, 1.0]], dtype=torch.float64)  # after clipping the identity
    torch.testing.assert_close(nonnegative_spectral_(W), torch.eye(2, dtype=torch.float64) / 1.001)


def test_nothing_positive_becomes_zero():
    assert not nonnegative_spectral_(-torch.ones(2, 3)).any()


def test_vector_is_the_first_that_moved_less_than_the_tolerance():
    # diag(1, 0.6): by hand, from a known start, u_n ∝ (a, b 0.36ⁿ), to the first move below 1e-3.
    source = torch.Generator().manual_seed(4)
    start = torch.rand(2, generator=torch.Generator().manual_seed(4), dtype=torch.float64).numpy()
    u = start / np.linalg.norm(start)
    moved, steps = 1.0, 0
    while moved >= 1e-3:
        new = u * np.array([1.0, 0.36])
        new /= np.linalg.norm(new)
        moved, u, steps = np.linalg.norm(new - u), new, steps + 1
    sigma = np.linalg.norm(u * np.array([1.0, 0.6]))
    W = torch.diag(torch.tensor([1.0, 0.6], dtype=torch.float64))
    found = nonnegative_spectral_(W, generator=source)
    assert 2 < steps < 10
    assert found[0, 0].item() == pytest.approx(1 / (sigma + 1e-3), rel=1e-12)


def test_power_iteration_ends_after_ten_steps():
    source = torch.Generator().manual_seed(4)
    start = torch.rand(2, generator=torch.Generator().manual_seed(4), dtype=torch.float64).numpy()
    u = start * np.array([1.0, 0.97**2]) ** 10
    u /= np.linalg.norm(u)
    sigma = np.linalg.norm(u * np.array([1.0, 0.97]))
    W = torch.diag(torch.tensor([1.0, 0.97], dtype=torch.float64))
    assert nonnegative_spectral_(W, generator=source)[0, 0].item() == pytest.approx(1 / (sigma + 1e-3), rel=1e-12)


def test_projecting_twice_is_projecting_once():
    model = drawn(lambda: ICLRNN(3, 8, output_size=2))
    before = copy.deepcopy(model)
    model.project_()
    for one, two in zip(before.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(one, two, rtol=3e-3, atol=0)


def test_matrices_of_unequal_sizes_are_projected_each_as_alone():
    model = drawn(lambda: ICLRNN(5, 3, num_layers=3, output_size=1, lip=0.5))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(normal(*parameter.shape, seed=parameter.numel()) + 0.5)
    alone = copy.deepcopy(model)
    model.project_()
    for (name, one), two in zip(model.named_parameters(), alone.parameters(), strict=True):
        expected = two if one.ndim == 1 else nonnegative_spectral_(two.detach().clone(), 0.5)
        torch.testing.assert_close(one, expected, rtol=2e-4, atol=1e-7, msg=name)


def test_agrees_with_torchlip():
    normalizers = pytest.importorskip("deel.torchlip.normalizers")
    for seed in range(5):
        W = normal(16, 24, seed=seed, dtype=torch.float32)
        with seeded(seed):
            peer = normalizers.spectral_normalization(W.clamp(min=0), None)[0]
            ours = nonnegative_spectral_(W.clone())
        found, expected = (float(torch.linalg.svdvals(one)[0]) for one in (ours, peer))
        assert found == pytest.approx(expected, abs=1e-3)


# The layers


def trained(model, steps, seed=0, lr=3e-2):
    """Train on noise with the projection behind every step, and yield after each."""
    optimizer = torch.optim.Adam(model.parameters(), lr=lr)
    optimizer.register_step_post_hook(lambda *_: model.project_())
    x, y = normal(16, 6, 3, seed=seed), normal(16, 6, 2, seed=seed + 1)
    for _ in range(steps):
        optimizer.zero_grad()
        (model(x) - y).square().mean().backward()
        optimizer.step()
        yield model


def test_weights_keep_the_constraint_at_the_start_and_after_each_step():
    with seeded(0):
        model = ICLRNN(3, 8, output_size=2).double()
    for current in (model, *trained(model, 25)):
        for weight in (one.detach() for one in current.parameters() if one.ndim == 2):
            assert weight.min() >= 0
            norm = float(torch.linalg.svdvals(weight)[0])
            assert norm <= 1
            assert norm > 0.9  # on the set, not only inside it


def test_biases_are_free():
    model = drawn(lambda: ICLRNN(3, 8, output_size=2))
    before = {name: one.clone() for name, one in model.named_parameters() if one.ndim == 1}
    model.project_()
    assert len(before) == 3
    assert min(one.detach().min().item() for one in before.values()) < 0
    for name, one in before.items():
        assert torch.equal(one, model.get_parameter(name))


@pytest.mark.parametrize("kind", [ICLRNN, ICRNN])
@pytest.mark.parametrize("steps", [0, 1, 20])
def test_outputs_are_convex_in_the_whole_sequence(kind, steps):
    model = drawn(lambda: kind(3, 8, output_size=2))
    for _ in trained(model, steps):
        pass
    a, b = 3 * normal(1000, 6, 3, seed=5), 3 * normal(1000, 6, 3, seed=6)
    with torch.no_grad():
        excess = model((a + b) / 2) - (model(a) + model(b)) / 2
        spread = (model(a) - model(b)).abs().max()
    assert excess.max() <= 1e-6
    assert spread > 0.1  # not a constant


def test_a_negative_weight_breaks_convexity():
    model = drawn(lambda: ICLRNN(3, 8, output_size=2))
    with torch.no_grad():
        model.readout.weight[0] *= -1
        model.readout.bias[0] = 50.0  # far above ReLU's kink: 50 − a convex function
    a, b = 3 * normal(1000, 6, 3, seed=5), 3 * normal(1000, 6, 3, seed=6)
    assert (model((a + b) / 2) - (model(a) + model(b)) / 2).max() > 1e-3


def test_not_expanded_outputs_never_fall():
    model = drawn(lambda: ICLRNN(3, 8, output_size=2, expand_input=False))
    x, raise_by = normal(200, 6, 3), normal(200, 6, 3, seed=1).abs()
    assert (model(x + raise_by) - model(x)).min() >= -1e-12


def test_swapping_x_and_its_negative_permutes_columns():
    model = drawn(lambda: ICLRNN(3, 8, output_size=2))
    swapped = copy.deepcopy(model)
    with torch.no_grad():
        swapped.cells[0].W.copy_(model.cells[0].W.roll(3, dims=1))
    x = normal(5, 6, 3)
    torch.testing.assert_close(swapped(-x), model(x), rtol=1e-12, atol=1e-12)
    assert (swapped(x) - model(x)).abs().max() > 1e-3


@pytest.mark.parametrize("length", [1, 2, 10, 37])
def test_gain_of_identities_is_that_of_adding_up(length):
    cell = ICLRNNCell(4, 4).double()
    with torch.no_grad():
        for weight in (cell.W, cell.U):
            weight.copy_(torch.eye(4))
    bound = 1 / (2 * math.sin(math.pi / (4 * length + 2)))
    assert cell.sequence_gain(length) == pytest.approx(bound, rel=1e-12)
    ones = np.tril(np.ones((length, length)))
    assert bound == pytest.approx(np.linalg.norm(ones, 2), rel=1e-12)
    # Attained along the ones matrix's leading direction, where every unit is at work.
    direction = torch.from_numpy(np.abs(np.linalg.svd(ones)[2][0]))[None, :, None].expand(1, length, 4)
    x = torch.ones(1, length, 4, dtype=torch.float64)
    change = (cell.unroll(x + 1e-3 * direction) - cell.unroll(x)).norm() / (1e-3 * direction).norm()
    assert change.item() == pytest.approx(bound, rel=1e-9)


def test_gain_is_known_for_ten_steps():
    assert 1 / (2 * math.sin(math.pi / 42)) == pytest.approx(6.69, abs=0.005)


@pytest.mark.parametrize("decay", [0.5, 0.9, 1.3])
def test_gain_of_other_norms_is_that_of_a_geometric_series(decay):
    cell = ICLRNNCell(2, 2).double()
    with torch.no_grad():
        cell.W.copy_(2 * torch.eye(2))
        cell.U.copy_(torch.diag(torch.tensor([decay, decay], dtype=torch.float64)))
    powers = [[decay ** (i - j) if i >= j else 0.0 for j in range(7)] for i in range(7)]
    assert cell.sequence_gain(7) == pytest.approx(2 * np.linalg.norm(powers, 2), rel=1e-12)


def test_expansion_adds_the_root_of_two_and_layers_multiply():
    wide, plain = (drawn(lambda e=e: ICLRNN(2, 2, 2, 1, expand_input=e)) for e in (True, False))
    for model in (wide, plain):
        with torch.no_grad():
            for cell in model.cells:
                cell.W.copy_(torch.eye(*cell.W.shape))
                cell.U.copy_(torch.eye(2))
            model.readout.weight.copy_(torch.tensor([[0.5, 0.0]]))
    one = 1 / (2 * math.sin(math.pi / 26))
    assert plain.sequence_gain(6) == pytest.approx(0.5 * one**2, rel=1e-12)
    assert wide.sequence_gain(6) == pytest.approx(0.5 * math.sqrt(2) * one**2, rel=1e-12)


def test_parameters_are_those_of_the_public_code():
    counts = [
        sum(one.numel() for one in model.parameters())
        for model in (ICLRNN(4, 64, output_size=2), ICRNN(4, 64, output_size=2))
    ]
    assert counts == [13058, 38530]
    assert sum(one.numel() for one in LipschitzRNN(4, 64, num_layers=1).parameters()) == 8512


def test_few_arguments_keep_the_width():
    for kind in (ICLRNN, ICRNN, LipschitzRNN):
        assert kind(6)(torch.zeros(2, 5, 6)).shape == (2, 5, 6)


@pytest.mark.parametrize("kind", [ICLRNN, ICRNN, LipschitzRNN])
def test_layers_run_under_autocast(kind):
    model, x = drawn(lambda: kind(3, 5, output_size=2)).float(), normal(2, 4, 3, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        narrow = model(x)
    assert narrow.dtype == torch.bfloat16
    torch.testing.assert_close(narrow.float(), model(x), rtol=0.05, atol=0.05)


def test_start_is_small_and_orthogonal_before_the_projection():
    with seeded(0):
        model = ICLRNNCell(40, 30)
    with seeded(0):
        W = nn.init.normal_(torch.empty(30, 40), std=0.01)
        U = nn.init.orthogonal_(torch.empty(30, 30), gain=0.1)
    for found, start in ((model.W, W), (model.U, U)):
        torch.testing.assert_close(found, nonnegative_spectral_(start), rtol=5e-3, atol=1e-6)
    assert not model.b.any()


@pytest.mark.parametrize(
    ("activation", "lost"),
    [("tanh", "convexity"), ("gelu", "monotonicity"), ("leaky_relu", "non-negative"), ("mish", "Lipschitz")],
)
def test_other_activations_are_refused_with_what_they_lose(activation, lost):
    with pytest.raises(ValueError, match=lost):
        ICLRNN(3, activation=activation)


def test_wrong_size_names_both_numbers():
    with pytest.raises(ValueError, match=r"(?s)3.*4"):
        ICLRNN(3, 4)(torch.zeros(2, 5, 4))


# The baselines


def test_convex_network_without_shortcuts_is_the_relu_network():
    model = drawn(lambda: ICRNN(3, 5, num_layers=1, expand_input=False))
    (layer,) = model.layers
    with torch.no_grad():
        for weight in (layer.D1, layer.D2, layer.D3):
            weight.zero_()
        layer.V.copy_(torch.eye(5))
    own = nn.RNN(3, 5, nonlinearity="relu", bias=False, batch_first=True).double()
    own.load_state_dict({"weight_ih_l0": layer.W, "weight_hh_l0": layer.U})
    x = normal(4, 7, 3)
    torch.testing.assert_close(model(x), own(x)[0], rtol=1e-12, atol=1e-12)


def test_convex_network_is_its_equations_step_by_step():
    model = drawn(lambda: ICRNN(3, 5, num_layers=2, output_size=2))
    x = normal(7, 3)
    values = [np.concatenate((one, -one)) for one in x.numpy()]
    for layer in model.layers:
        weights = {name: one.detach().numpy() for name, one in layer.named_parameters()}
        h, before, outputs = np.zeros(5), np.zeros(len(values[0])), []
        for value in values:
            new = np.maximum(weights["W"] @ value + weights["U"] @ h + weights["D2"] @ before, 0)
            outputs.append(np.maximum(weights["V"] @ new + weights["D1"] @ h + weights["D3"] @ value, 0))
            h, before = new, value
        values = outputs
    V, c = (one.detach().numpy() for one in (model.readout.weight, model.readout.bias))
    expected = np.maximum(np.array(values) @ V.T + c, 0)
    np.testing.assert_allclose(model(x[None]).detach().numpy()[0], expected, rtol=1e-10, atol=1e-12)


def test_convex_networks_weights_are_clipped_and_not_scaled():
    model = ICRNN(3, 5, output_size=2)
    with torch.no_grad():
        for weight in model.parameters():
            weight.fill_(-1.0)
        model.layers[0].V.fill_(7.0)
    model.project_()
    weights = dict(model.named_parameters())
    assert weights.pop("layers.0.V").eq(7).all()
    assert weights.pop("readout.bias").eq(-1).all()
    assert all(weight.eq(0).all() for weight in weights.values())


def test_lipschitz_network_is_its_equation_step_by_step():
    model = drawn(lambda: LipschitzRNN(3, 5, num_layers=1, beta=0.7, gamma=0.2, step=0.3))
    (layer,) = model.layers
    parts = {name: one.detach().numpy() for name, one in layer.named_parameters()}
    A, W = (0.7 * (M - M.T) + 0.3 * (M + M.T) - 0.2 * np.eye(5) for M in (parts["M_A"], parts["M_W"]))
    x, h, expected = normal(6, 3), np.zeros(5), []
    for value in x.numpy():
        h = h + 0.3 * A @ h + 0.3 * np.tanh(W @ h + parts["U"] @ value + parts["b"])
        expected.append(h)
    np.testing.assert_allclose(model(x[None]).detach().numpy()[0], np.array(expected), rtol=1e-10, atol=1e-12)


# The plant


def test_reactor_gives_the_authors_first_trajectory_and_their_counts():
    inputs, states = CSTR().trajectories()
    assert len(CSTR().starts()) == 772
    assert inputs.shape == (12352, 4)
    expected = [
        [1.4325163, -75.72458929],
        [1.4248451, -76.84802004],
        [1.41722366, -77.97016868],
        [1.40964998, -79.09094468],
        [1.40212216, -80.21026299],
    ]
    np.testing.assert_allclose(inputs[0].numpy(), [1.44023939, -74.5999727, -3.5, -5e5], rtol=1e-7)
    np.testing.assert_allclose(states[0, :5].numpy(), expected, rtol=1e-7)


def test_reactor_rests_at_its_steady_state():
    slope = CSTR().derivative(torch.zeros(2, dtype=torch.float64), torch.zeros(2, dtype=torch.float64))
    assert slope.abs().max() < 0.01  # the published state has four decimals
    unstable = CSTR().derivative(torch.tensor([0.0, 1.0], dtype=torch.float64), torch.zeros(2, dtype=torch.float64))
    assert unstable[1] > 0.1


def test_without_reaction_the_tank_mixes_as_an_exponential():
    plant = CSTR(rate=1e-12, step=1e-5)
    states = plant.simulate(torch.zeros(1, 2).double(), torch.tensor([[1.0, 2e5]]).double(), 1000, 1000)
    end, rate = 0.01, 5.0
    C_A = (5.0 - 1.9537) * (1 - math.exp(-rate * end))
    T = (300 + 2e5 / 231 / rate - 401.8727) * (1 - math.exp(-rate * end))
    np.testing.assert_allclose(states[0, 0].numpy(), [C_A, T], rtol=1e-3)


def test_every_constant_matters():
    start, inputs = torch.tensor([[0.5, 20.0]]).double(), torch.tensor([[1.0, 1e5]]).double()
    usual = CSTR().simulate(start, inputs)
    for field in dataclasses.fields(CSTR):
        value = field.default + 1e4 if field.name == "heat" else field.default * 1.01
        changed = CSTR(**{field.name: value}).simulate(start, inputs)
        assert (changed - usual).abs().max() > 1e-9, field.name


# The controller


def relaxed_program(model, x0, horizon, bounds):
    """Solve the control problem of a one-layer ICLRNN as a convex program in u, h and y, by SLSQP.

    All weights but the first are ≥ 0 and the objective grows with y ≥ 0, so that h and y may be relaxed to lie above
    their preactivations and above 0.
    """
    W, U, b = (one.detach().numpy() for one in (model.cells[0].W, model.cells[0].U, model.cells[0].b))
    V, c = model.readout.weight.detach().numpy(), model.readout.bias.detach().numpy()
    m, H, o = bounds.shape[1], len(b), len(c)
    sizes = np.cumsum([horizon * m, horizon * H])

    def parts(z):
        u, h, y = np.split(z, sizes)
        return u.reshape(horizon, m), h.reshape(horizon, H), y.reshape(horizon, o)

    def slack(z):
        u, h, y = parts(z)
        x = np.concatenate((np.tile(x0, (horizon, 1)), u), 1)
        before = np.vstack((np.zeros(H), h[:-1]))
        below = np.concatenate((x, -x), 1) @ W.T + before @ U.T + b
        return np.concatenate(((h - below).ravel(), (y - h @ V.T - c).ravel()))

    count = horizon * (m + H + o)
    matrix = np.stack([slack(row) - slack(np.zeros(count)) for row in np.eye(count)], 1)
    box = [*zip(*np.repeat(bounds.numpy(), horizon, 0).reshape(2, -1), strict=True)] + [(0, None)] * (horizon * (H + o))
    weights = np.concatenate([np.ones(horizon * m), np.zeros(horizon * H), np.ones(horizon * o)])
    solved = scipy.optimize.minimize(
        lambda z: float((weights * z**2).sum()),
        np.ones(count),
        jac=lambda z: 2 * weights * z,
        bounds=box,
        constraints={"type": "ineq", "fun": slack, "jac": lambda z: matrix},
        method="SLSQP",
        options={"maxiter": 500, "ftol": 1e-12},
    )
    assert solved.success
    return solved.fun


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_control_by_a_convex_network_is_the_convex_programs_optimum(seed):
    model = drawn(lambda: ICLRNN(4, 5, 1, 2), seed)
    bounds = torch.tensor([[-1.0, -1.0], [1.0, 1.0]])
    x0 = normal(2, seed=seed)
    found = NeuralMPC(model, 3, bounds).solve(x0)
    expected = relaxed_program(model, x0.numpy(), 3, bounds)
    assert found.certificate.objective == pytest.approx(expected, rel=1e-4, abs=1e-6)
    assert found.certificate.objective >= expected * (1 - 1e-6) - 1e-9
    assert found.certificate.spread <= 1e-4 or expected < 1e-6


def test_control_is_where_its_state_is():
    model, x0, bounds = drawn(lambda: ICLRNN(4, 5, 2, 2)), normal(2), torch.tensor([[-1.0, -1.0], [1.0, 1.0]])
    expected = NeuralMPC(model, 3, bounds).solve(x0)
    with torch.device("meta"):  # the default device, where what is made without one would be, without values
        assert torch.equal(NeuralMPC(model, 3, bounds).solve(x0).x, expected.x)


def test_predictions_are_the_models_at_the_answer():
    model = drawn(lambda: ICLRNN(4, 5, 2, 2))
    x0 = normal(2)
    found = NeuralMPC(model, 3, torch.tensor([[-1.0, -1.0], [1.0, 1.0]])).solve(x0)
    predicted = model(torch.cat((x0.expand(3, -1), found.x), 1)[None])[0]
    torch.testing.assert_close(found.predicted, predicted)
    objective = predicted.square().sum() + found.x.square().sum()
    assert found.certificate.objective == pytest.approx(objective.item(), rel=1e-9)
    assert len(found.certificate.objectives) == 10
    assert found.certificate.objective == min(found.certificate.objectives)


def test_spread_shows_several_minima():
    class Folded(nn.Module):
        """ŷ = u² − 4: a set point of 0 with outputs of both signs, minima near u = ±2."""

        def forward(self, x):
            return (x[..., 1:] + 0.1).square() - 4

    found = NeuralMPC(Folded(), 1, torch.tensor([[-3.0], [3.0]])).solve(torch.zeros(1))
    grid = torch.linspace(-3, 3, 600001, dtype=torch.float64)
    values = ((grid + 0.1).square() - 4).square() + grid.square()
    assert found.certificate.objective == pytest.approx(values.min().item(), rel=1e-6)
    assert found.certificate.spread > 0.01


def test_the_models_mode_precision_and_gradients_are_left_alone():
    model = drawn(lambda: ICLRNN(4, 5, 2, 2)).float().train()
    NeuralMPC(model, 3, torch.tensor([[-1.0, -1.0], [1.0, 1.0]])).solve(torch.zeros(2))
    assert model.training
    assert all(one.grad is None and one.requires_grad and one.dtype == torch.float32 for one in model.parameters())


def test_bound_of_two_outputs_is_kept_at_the_least_cost():
    # ŷ = ReLU of two maps of u, V = ŷᵀPŷ with a coupling, against a fine grid.
    A = torch.tensor([[0.5, 1.0], [0.3, -0.7]])
    model = Linear(A, torch.tensor([0.4, 0.9]), relu=True)
    P, level = torch.tensor([[2.0, 0.5], [0.5, 1.0]]), 3.6
    found = NeuralMPC(model, 1, torch.tensor([[-3.0], [3.0]]), P, level, tol=1e-8).solve(torch.ones(1))
    u = torch.linspace(-3, 3, 600001, dtype=torch.float64)
    y = model.double()(torch.stack((torch.ones_like(u), u), -1))
    V = ((y @ P.double()) * y).sum(-1)
    best = (y.square().sum(-1) + u.square())[level >= V].min().item()
    assert found.certificate.objective == pytest.approx(best, rel=1e-4)
    assert (y.square().sum(-1) + u.square()).min().item() < best - 1e-3  # the bound binds
    assert found.certificate.violation <= 1e-7
    assert found.certificate.multipliers.max() > 0
    with pytest.raises(ValueError, match=re.escape(f"smallest V found is {V.min().item():.3g}")):
        NeuralMPC(model, 1, torch.tensor([[-3.0], [3.0]]), P, 3.0, max_iter=30).solve(torch.ones(1))
