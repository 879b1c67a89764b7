"""The convex Lipschitz layers and their controller against steps by hand, singular values, and convex programs."""

import math

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
