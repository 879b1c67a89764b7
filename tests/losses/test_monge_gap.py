"""The Monge gap's parts under the contracts of their kinds."""

import math

import torch
from torch import nn

from provenn.contracts import BadInput, FunctionCase, LossCase, Minimum, ModuleCase, TrainerCase
from provenn.losses import (
    ElasticCost,
    EnergyDistance,
    GradientMap,
    InputConvexNetwork,
    MaximumMeanDiscrepancy,
    MongeGap,
    MongeMapEstimator,
    PNormCost,
    SinkhornDivergence,
    TransportMLP,
    entropic_map,
    gaussian_ot_map,
    l2_uvp,
    transport_cost_ratio,
)
from provenn.losses._monge_gap_costs import COSTS


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def cloud(n, d=2, seed=0, dtype=torch.float64):
    return torch.randn(n, d, generator=seeded(seed), dtype=torch.float64).to(dtype)


X, Y = cloud(6), cloud(6, seed=1)
SHEAR = torch.tensor([[1.0, 0.8], [-0.3, 0.6]], dtype=torch.float64)


def pair(generator, dtype):
    return tuple(torch.randn(2, 6, 2, generator=generator, dtype=torch.float64).to(dtype))


def unequal(generator, dtype):
    x, y = torch.randn(2, 6, 2, generator=generator, dtype=torch.float64).to(dtype)
    return x, y[:4] + 1


def extremes(gap):
    """Pairs of clouds far away, in one point, equal, and of a single point."""
    x, y = X.float(), Y.float()
    one = torch.ones(6, 2)
    pairs = [(1e4 * x, y), (x, -1e4 * y), (1e4 * x, 1e4 * y), (one, one), (x, x), (x[:1], y[:1])]
    return tuple(lambda a=a, b=b: (a, b) for a, b in (pairs if gap else [*pairs, (x, y[:1])]))


WHOLE = "a number of whole samples, no mean over them"


def not_finite(x, y):
    return torch.full((len(x), len(y)), math.nan)


def bad_options(make):
    return (
        BadInput("epsilon", lambda: make(epsilon=-0.1)),
        BadInput("epsilon", lambda: make(epsilon=math.nan)),
        BadInput("relative_epsilon", lambda: make(relative_epsilon=0.0)),
        BadInput("max_iters", lambda: make(max_iters=0)),
        BadInput("max_iters", lambda: make(max_iters=2.5), TypeError),
        BadInput("tol", lambda: make(tol=0.0)),
        BadInput("cost", lambda: make(cost="manhattan")),
        BadInput("cost", lambda: make(cost=2.0), TypeError),
        BadInput("cost", lambda: make(cost=lambda x, y: (x - y).square().sum(1))(X, Y)),
        BadInput("cost", lambda: make(cost=not_finite)(X, Y)),
        BadInput("cost", lambda: make(cost=lambda x, y: 1.0)(X, Y), TypeError),
        BadInput("y", lambda: make()(X, cloud(6, 3))),
        BadInput("x", lambda: make()(X[:0], Y)),
        BadInput("x", lambda: make()(X[0], Y)),
        BadInput("x", lambda: make()(X.long(), Y), TypeError),
    )


def weights(*values):
    return torch.tensor(values, dtype=torch.float64) / sum(values)


GAP_BAD = (
    *bad_options(MongeGap),
    BadInput("y", lambda: MongeGap()(X, Y[:5])),
    BadInput("entropy", lambda: MongeGap(entropy="renyi")),
    BadInput("relative_to", lambda: MongeGap(relative_to="median")),
    BadInput("scaling", lambda: MongeGap(scaling=0.0)),
    BadInput("relaxation", lambda: MongeGap(relaxation=2.0)),
    BadInput("gradient", lambda: MongeGap(gradient="none")),
    BadInput("weights", lambda: MongeGap()(X, Y, weights(1, 1, 1, 1, 1, -1))),
    BadInput("weights", lambda: MongeGap(epsilon=0)(X, Y, weights(1, 1, 1, 1, 1, 2))),
    BadInput("max_iters", lambda: MongeGap(max_iters=2, tol=1e-9, strict=True)(X, Y)),
)
X32 = X.float()
ZERO, EYE = torch.zeros(2, dtype=torch.float64), torch.eye(2, dtype=torch.float64)


def points(generator, dtype, batch):
    return (torch.randn(batch, 3, generator=generator, dtype=torch.float64).to(dtype),)


def estimator(model, seed=0, **options):
    given = {"lr": 1e-2, "steps": 7, "batch": 8, "log_every": 2, "seed": seed, **options}
    return MongeMapEstimator(model, SinkhornDivergence(), MongeGap(relative_epsilon=0.1), **given)


def bad_estimators():
    make, net = estimator, TransportMLP(2, (4,))
    return (
        BadInput("map", lambda: make(lambda x: x), TypeError),
        BadInput("fitting_loss", lambda: MongeMapEstimator(net, None, None), TypeError),
        BadInput("gap", lambda: MongeMapEstimator(net, EnergyDistance(), 1.0), TypeError),
        BadInput("gap_weight", lambda: make(net, gap_weight=-1.0)),
        BadInput("gap_weight", lambda: make(net, gap_weight=lambda step: -1.0).fit(X32, X32)),
        BadInput("lr", lambda: make(net, lr=0.0)),
        BadInput("steps", lambda: make(net, steps=0)),
        BadInput("batch", lambda: make(net, batch=1)),
        BadInput("batch", lambda: make(net, batch=8.0), TypeError),
        BadInput("log_every", lambda: make(net, log_every=0)),
        BadInput("seed", lambda: make(net, seed=0.5), TypeError),
        BadInput("reference", lambda: make(net, reference=X32[0])),
        BadInput("reference", lambda: make(net, reference=cloud(5, 3).float()).fit(X32, X32)),
        BadInput("source", lambda: make(net).fit(X32[:1], X32)),
        BadInput("target", lambda: make(net).fit(X32, X32[:1])),
        BadInput("target", lambda: make(net).fit(X32, cloud(5, 3).float())),
        BadInput("source", lambda: make(net).fit(X32.long(), X32), TypeError),
        BadInput("batch_size", lambda: make(net).transform(X32, batch_size=0)),
    )


def bad_widths(make):
    return (
        BadInput("dim", lambda: make(0)),
        BadInput("hidden", lambda: make(3, ())),
        BadInput("hidden", lambda: make(3, (4, 0))),
    )


def map_case(part, make, label="", bad=(), **options):
    return ModuleCase(part=f"provenn.losses.{part}", make=make, inputs=points, label=label, bad_input=bad, **options)


NESTED = "torch.func.grad inside a traced graph is not promised"

CASES = [
    LossCase(
        part="provenn.losses.MongeGap",
        make=lambda **options: MongeGap(**{"epsilon": 0.5, "tol": 1e-6, **options}),
        inputs=pair,
        extremes=(),
        excluded={"extremes": "an absolute ε is no scale for them; the case of the relative ε has them"},
        reductions=False,
        reductions_reason=WHOLE,
        bad_input=GAP_BAD,
    ),
    LossCase(
        part="provenn.losses.MongeGap",
        label="relative ε",
        make=MongeGap,
        inputs=pair,
        extremes=extremes(gap=True),
        excluded={
            "gradcheck": "ε follows the costs but counts as a constant; the case of the absolute ε has the check"
        },
        reductions=False,
        reductions_reason=WHOLE,
        bad_input=GAP_BAD[:1],
        float32_tolerance=1e-3,  # the tolerance of the iteration
    ),
    *(
        LossCase(
            part="provenn.losses.MongeGap",
            label=f"assignment, {name}",
            make=lambda name=name, **options: MongeGap(**{"cost": name, "epsilon": 0, **options}),
            inputs=pair,
            extremes=extremes(gap=True),
            minimum=Minimum(lambda: (X.clone(), X.clone()), 0.0, tolerance=1e-7),  # the identity is optimal
            reductions=False,
            reductions_reason=WHOLE,
            bad_input=GAP_BAD[:1],
        )
        for name in COSTS
    ),
    LossCase(
        part="provenn.losses.SinkhornDivergence",
        make=lambda **options: SinkhornDivergence(**{"tol": 1e-6, **options}),
        inputs=unequal,
        extremes=extremes(gap=False),
        reductions=False,
        reductions_reason=WHOLE,
        bad_input=(
            *bad_options(SinkhornDivergence),
            BadInput("epsilon", lambda: SinkhornDivergence(epsilon=0)),
            BadInput("y_weights", lambda: SinkhornDivergence()(X, Y, None, weights(1, 1, 1, 1, 1, -1))),
        ),
    ),
    *(
        LossCase(
            part=f"provenn.losses.{make.__name__}",
            make=make,
            inputs=unequal,
            extremes=extremes(gap=False),
            reductions=False,
            reductions_reason=WHOLE,
            bad_input=(
                BadInput("y", lambda make=make: make()(X, cloud(6, 3))),
                BadInput("x", lambda make=make: make()(X[:0], Y)),
                BadInput("y", lambda make=make: make()(X, Y.int()), TypeError),
                *(
                    (BadInput("bandwidth", lambda: MaximumMeanDiscrepancy(bandwidth=0.0)),)
                    if make is MaximumMeanDiscrepancy
                    else ()
                ),
            ),
        )
        for make in (EnergyDistance, MaximumMeanDiscrepancy)
    ),
    FunctionCase(
        part="provenn.losses.PNormCost",
        call=lambda: PNormCost(1.5)(X, Y),
        bad_input=(BadInput("p", lambda: PNormCost(0.5)),),
    ),
    FunctionCase(
        part="provenn.losses.ElasticCost",
        call=lambda: ElasticCost(0.5)(X, Y),
        bad_input=(BadInput("tau", lambda: ElasticCost(-0.5)),),
    ),
    map_case(
        "TransportMLP",
        lambda: TransportMLP(3, (8, 5)),
        bad=(*bad_widths(TransportMLP), BadInput("identity_init", lambda: TransportMLP(2, identity_init=True))),
    ),
    map_case(
        "TransportMLP",
        lambda: TransportMLP(3, (8,), residual=True, identity_init=True, spherical=True),
        "residual, spherical",
        bad_widths(TransportMLP),
    ),
    map_case("InputConvexNetwork", lambda: InputConvexNetwork(3, (8, 5)), bad=bad_widths(InputConvexNetwork)),
    ModuleCase(
        part="provenn.losses.GradientMap",
        make=lambda: GradientMap(InputConvexNetwork(3, (8, 5))),
        inputs=points,
        compile=False,
        compile_reason=NESTED,
        export=False,
        export_reason=NESTED,
        bad_input_reason="any module is a potential; what it returns is checked by torch.func.grad",
    ),
    TrainerCase(
        part="provenn.losses.MongeMapEstimator",
        make=lambda model, seed: estimator(model, seed),
        model=lambda: TransportMLP(2, (8,)),
        data=lambda generator: tuple(torch.randn(2, 20, 2, generator=generator)),
        rounds=4,
        bad_input=bad_estimators(),
    ),
    TrainerCase(
        part="provenn.losses.MongeMapEstimator",
        label="reference, schedule, dropout",
        make=lambda model, seed: estimator(
            model, seed, gap_weight=lambda step: step / 4, reference=X[:9].to(next(model.parameters()))
        ),
        model=lambda: nn.Sequential(nn.Linear(2, 8), nn.Dropout(0.3), nn.GELU(), nn.Linear(8, 2)),
        data=lambda generator: tuple(torch.randn(2, 20, 2, generator=generator)),
        rounds=4,
        bad_input=bad_estimators()[:1],
    ),
    FunctionCase(
        part="provenn.losses.l2_uvp",
        call=lambda: l2_uvp(lambda x: x, lambda x: 2 * x, X),
        bad_input=(
            BadInput("map", lambda: l2_uvp(lambda x: x[:, :1], lambda x: x, X)),
            BadInput("true_map", lambda: l2_uvp(lambda x: x, lambda x: x[:3], X)),
            BadInput("true_map", lambda: l2_uvp(lambda x: x, lambda x: 0 * x, X)),
            BadInput("x", lambda: l2_uvp(lambda x: x, lambda x: x, X[0])),
        ),
    ),
    FunctionCase(
        part="provenn.losses.transport_cost_ratio",
        call=lambda: transport_cost_ratio(lambda x: x + 2, X, Y),
        bad_input=(
            BadInput("target", lambda: transport_cost_ratio(lambda x: x, X, Y[:5])),
            BadInput("target", lambda: transport_cost_ratio(lambda x: x, X, X, "euclidean")),
            BadInput("map", lambda: transport_cost_ratio(lambda x: x[:3], X, Y)),
            BadInput("cost", lambda: transport_cost_ratio(lambda x: x, X, Y, "taxi")),
        ),
    ),
    FunctionCase(
        part="provenn.losses.gaussian_ot_map",
        call=lambda: gaussian_ot_map(ZERO, EYE, ZERO + 1, 2 * EYE)(X),
        bad_input=(
            BadInput("m0", lambda: gaussian_ot_map(EYE, EYE, ZERO, EYE)),
            BadInput("m1", lambda: gaussian_ot_map(ZERO, EYE, ZERO[:1], EYE)),
            BadInput("S0", lambda: gaussian_ot_map(ZERO, EYE[:1], ZERO, EYE)),
            BadInput("S0", lambda: gaussian_ot_map(ZERO, torch.diag(torch.tensor([1.0, 0.0])).double(), ZERO, EYE)),
            BadInput("S1", lambda: gaussian_ot_map(ZERO, EYE, ZERO, EYE + torch.triu(EYE + 1, 1))),
            BadInput("S1", lambda: gaussian_ot_map(ZERO, EYE, ZERO, -EYE)),
        ),
    ),
    FunctionCase(
        part="provenn.losses.entropic_map",
        call=lambda: entropic_map(X, Y, relative_epsilon=0.1)(X),
        bad_input=(
            BadInput("epsilon", lambda: entropic_map(X, Y, epsilon=0.0)),
            BadInput("relative_epsilon", lambda: entropic_map(X, Y, relative_epsilon=-1.0)),
            BadInput("max_iters", lambda: entropic_map(X, Y, max_iters=0)),
            BadInput("tol", lambda: entropic_map(X, Y, tol=0.0)),
            BadInput("target", lambda: entropic_map(X, cloud(5, 3))),
            BadInput("cost", lambda: entropic_map(X, Y, "taxi")),
        ),
    ),
]
