"""Dale–Langevin's claim: purely multiplicative updates sample positive data about as well as additive diffusion."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache

import torch
from torch import Tensor, nn

from provenn import data
from provenn.claims.claim import (
    Claim,
    Comparison,
    Event,
    Evidence,
    Figure,
    Metric,
    Outcome,
    Point,
    Progress,
    Study,
    Tier,
    Trial,
    Tuning,
    Verdict,
)
from provenn.claims.generative._dale_langevin_networks import ImageBody, PlaneBody, ScoreNetwork
from provenn.core.experiment.networks import mlp
from provenn.core.experiment.seeding import generator, seeded
from provenn.core.experiment.statistics import Interval
from provenn.core.experiment.training import minibatches, predict, train
from provenn.core.generation.metrics import frechet_distance, sliced_wasserstein
from provenn.data.toys import noisy_digits
from provenn.generative import (
    AdditiveScoreBaseline,
    DaleLangevinSampler,
    GeometricBrownianSDE,
    MultiplicativeDiffusionTrainer,
    PositiveTransform,
)

MIXTURE, IMAGES = "mixture of log-normals", "digits"
STEPS = (25, 50, 100, 200)
BATCH, AVERAGING = 128, 0.99
CENTRES = torch.tensor([[0.6, 0.6], [0.6, -0.6], [-0.6, 0.6], [-0.6, -0.6]])
DEVIATION = 0.15


def run(trial: Trial) -> Iterator[Event]:
    """Train a score network and sample from it."""
    yield from (_run_mixture if trial.study == MIXTURE else _run_images)(trial)


def _mixture(count: int, draws: torch.Generator) -> Tensor:
    """Draw from four log-normals of equal weight in the plane."""
    component = torch.randint(4, (count,), generator=draws)
    return torch.exp(CENTRES[component] + DEVIATION * torch.randn(count, 2, generator=draws))


def _run_mixture(trial: Trial) -> Iterator[Event]:
    budget = trial.budget
    sde = GeometricBrownianSDE(mu="half_variance", sigma=(0.5, 6.0))
    x = _mixture(int(budget["samples"]), generator(trial.seed, "data")).to(trial.device)
    with seeded(trial.seed, "weights"):
        body = PlaneBody(int(budget["width"]))
    model = ScoreNetwork(body, lambda t: sde.moments(t).variance.sqrt(), x.log().mean(0), x.log().std().item(), -1.0)
    epochs = int(budget["epochs"])
    trainer = MultiplicativeDiffusionTrainer(
        model.to(trial.device), sde, AVERAGING, batch_size=BATCH, epochs=epochs, seed=trial.seed
    )
    yield from _trained(trainer, x)
    fresh, other = (_mixture(int(budget["drawn"]), generator(trial.seed, "fresh", name)) for name in ("one", "two"))
    yield Metric("floor", _apart(fresh, other, trial.seed))
    for steps in STEPS:
        sampler = DaleLangevinSampler(
            trainer.average, sde, (2,), steps, trial.arm, log_mean=x.log().mean(0), log_variance=x.log().var(0)
        )
        drawn = sampler.sample(len(fresh), generator(trial.seed, "sampling", steps)).cpu()
        distance = _apart(drawn.abs(), fresh, trial.seed)
        yield Point("distance", steps, distance)
        yield Metric(f"distance at {steps} steps", distance)
        yield Metric(f"non-positive at {steps} steps", (drawn <= 0).double().mean().item())


def _trained(trainer: MultiplicativeDiffusionTrainer | AdditiveScoreBaseline, x: Tensor) -> Iterator[Event]:
    """Train, yielding the loss of every epoch; ``trainer.average`` is what samples."""
    for epoch in trainer.epochs_on(x):
        yield Progress(epoch.index + 1, trainer.epochs)
        yield Point("loss", epoch.step, epoch.loss)


def _apart(x: Tensor, y: Tensor, seed: int) -> float:
    """Sliced Wasserstein-1 distance of logarithms, in directions that depend on the seed alone."""
    return sliced_wasserstein(x.log().double(), y.log().double(), generator=generator(seed, "directions")).item()


@cache
def _image_sets(name: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return training, validation and test images, (n, 1, side, side) in [0, 1], and the training labels."""
    if name == "digits":
        digits = noisy_digits(shift=0, sigma=0.0)
        return digits.x_train, digits.x_validation, digits.x_test, digits.y_train
    mnist = data.load("mnist")
    x = torch.from_numpy(mnist.x_train).float().div(255).unsqueeze(1)
    x_test = torch.from_numpy(mnist.x_test).float().div(255).unsqueeze(1)
    return x[:-5000], x[-5000:], x_test, torch.from_numpy(mnist.y_train[:-5000]).long()


@cache
def _features(name: str) -> nn.Module:
    """Train a classifier, once a process and the same for all, and return it up to its last hidden layer."""
    x, _, _, y = _image_sets(name)
    with seeded("features"):
        layers = [nn.Flatten(), *mlp([x[0].numel(), 64, 32, 10])]
    classifier = nn.Sequential(*layers)
    optimizer = torch.optim.Adam(classifier.parameters(), lr=1e-3)

    def loss(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
        return nn.functional.cross_entropy(model(images), labels)

    for _ in train(
        classifier, optimizer, lambda epoch: minibatches((x, y), 50, generator("features", epoch)), loss, epochs=30
    ):
        pass
    return nn.Sequential(*layers[:-1])


def _run_images(trial: Trial) -> Iterator[Event]:
    budget, settings = trial.budget, trial.settings
    x, validation, test, _ = _image_sets(str(budget["images"]))
    transform = PositiveTransform()
    positive = transform(x).to(trial.device)
    with seeded(trial.seed, "weights"):
        body = ImageBody(int(budget["width"]), blocks=3)
    common = {
        "ema": AVERAGING,
        "lr": float(settings["lr"]),
        "batch_size": BATCH,
        "epochs": int(budget["epochs"]),
        "seed": trial.seed,
    }
    draws, shape = generator(trial.seed, "sampling"), (int(budget["drawn"]), *x.shape[1:])
    if trial.arm == "Dale–Langevin":
        sde = GeometricBrownianSDE(mu="half_variance", sigma=(0.05, float(settings["final noise"])))
        y = positive.log()
        model = ScoreNetwork(body, lambda t: sde.moments(t).variance.sqrt(), y.mean(0), y.std().item(), -1.0)
        trainer = MultiplicativeDiffusionTrainer(model.to(trial.device), sde, t_min=0.02, **common)
        yield from _trained(trainer, positive)
        sampler = DaleLangevinSampler(
            trainer.average, sde, shape[1:], int(budget["steps"]), log_mean=y.mean(0), log_variance=y.var(0), t_min=0.02
        )
        drawn = sampler.sample(shape[0], draws)
        yield Metric("non-positive", (drawn <= 0).double().mean().item())
    else:
        sigma = (0.01, float(settings["final noise"]))
        baseline = AdditiveScoreBaseline(nn.Identity(), sigma)
        model = ScoreNetwork(body, baseline.noise_level, positive.mean(0), positive.std().item(), 0.0)
        trainer = AdditiveScoreBaseline(model.to(trial.device), sigma, **common)
        yield from _trained(trainer, positive)
        drawn = trainer.sample(trainer.average, shape, int(budget["steps"]), positive.mean(0), generator=draws)
        yield Metric("non-positive", (drawn <= 0).double().mean().item())
    known = validation if trial.tuning else test
    network = _features(str(budget["images"]))
    features = predict(network, transform.inverse(drawn).cpu())
    yield Metric("Fréchet distance", frechet_distance(features, predict(network, known)).item())
    yield Metric("floor", frechet_distance(predict(network, x), predict(network, known)).item())


def judge(evidence: Evidence) -> Verdict:
    """Apply the rule: (a) both samplers on the mixture, (b) digits against additive noise."""
    kept, agnostic = "sign_preserving", "sign_agnostic"
    floor = evidence.mean(MIXTURE, kept, "floor")
    distance = {arm: evidence.mean(MIXTURE, arm, "distance at 200 steps") for arm in (kept, agnostic)}
    lost = max(evidence.values(MIXTURE, kept, f"non-positive at {steps} steps").max() for steps in STEPS)
    flipped = evidence.mean(MIXTURE, agnostic, "non-positive at 25 steps")
    ratio = distance[agnostic] / distance[kept]
    first = lost == 0 and distance[kept] <= 2 * floor and flipped > 0 and ratio <= 1.2
    ours = evidence.mean(IMAGES, "Dale–Langevin", "Fréchet distance")
    theirs = evidence.mean(IMAGES, "additive", "Fréchet distance")
    second = ours <= 1.2 * theirs
    outcome: Outcome = "not reproduced"
    if first:
        outcome = "reproduced" if second else "partly"
    reason = (
        f"(a) at 200 steps the sign-preserving sampler is {distance[kept] / floor:.2f} floors away with "
        f"{100 * lost:.2g} % non-positive values; the sign-agnostic one has {100 * flipped:.2g} % at 25 steps and "
        f"{ratio:.2f} times the distance at 200; (b) Fréchet distance {ours:.3g} against {theirs:.3g} by additive noise"
    )
    margins: dict[str, Interval | float] = {
        "distance / floor": distance[kept] / floor,
        "sign-agnostic / sign-preserving": ratio,
        "Fréchet distance, method − additive": evidence.difference(
            IMAGES, "Dale–Langevin", "additive", "Fréchet distance"
        ),
    }
    return Verdict(outcome, reason, margins)


def _grid(noises: tuple[float, float]) -> list[dict[str, float]]:
    return [{"lr": lr, "final noise": noise} for lr in (1e-3, 3e-4) for noise in noises]


CLAIM = Claim(
    slug="dale-langevin",
    statement=(
        "A diffusion model whose noise and whose updates are multiplicative generates recognisable, diverse images "
        "about as good as an additive one of the same kind, and its exponential sampler never flips a sign."
    ),
    figures=(
        Figure(
            "samples on MNIST, Fashion-MNIST and Kuzushiji-MNIST near an additive NCSN's quality (scores not checked)",
            "the experiments on images; single figures could not be read",
        ),
    ),
    rule=(
        "Reproduced: (a) on a mixture of four log-normals the sign-preserving sampler gives no non-positive value and "
        "at 200 steps a sliced Wasserstein-1 distance in log space of at most 2 times the data-to-data floor, the "
        "sign-agnostic one gives non-positive values at 25 steps and at most 1.2 times the other's distance at 200; "
        "and (b) on digits the Fréchet distance of classifier features is at most 1.2 times that of additive noise. "
        "Partly: (a) only. Else not reproduced."
    ),
    studies={
        MIXTURE: Study(
            arms=("sign_preserving", "sign_agnostic"),
            tiers={
                "smoke": Tier(1, {"samples": 1280, "epochs": 6, "width": 32, "drawn": 300}),
                "small": Tier(3, {"samples": 7680, "epochs": 50, "width": 128, "drawn": 4000}),
                "full": Tier(5, {"samples": 76_800, "epochs": 50, "width": 128, "drawn": 20_000}),
            },
        ),
        IMAGES: Study(
            arms=("Dale–Langevin", "additive"),
            tiers={
                "smoke": Tier(1, {"images": "digits", "epochs": 2, "width": 8, "drawn": 60, "steps": 10}),
                "small": Tier(3, {"images": "digits", "epochs": 100, "width": 24, "drawn": 600, "steps": 200}),
                "full": Tier(5, {"images": "mnist", "epochs": 100, "width": 96, "drawn": 10_000, "steps": 1000}),
            },
            tuning=Tuning(
                {"Dale–Langevin": _grid((2.0, 4.0)), "additive": _grid((2.0, 5.0))},
                metric="Fréchet distance",
                maximize=False,
            ),
        ),
    },
    comparisons=(
        Comparison(IMAGES, "Fréchet distance", "Dale–Langevin", "additive", maximize=False),
        Comparison(IMAGES, "floor", "Dale–Langevin", "additive", "Fréchet distance of training images", False),
        *(
            Comparison(MIXTURE, f"distance at {steps} steps", "sign_preserving", "sign_agnostic", maximize=False)
            for steps in reversed(STEPS)
        ),
        Comparison(MIXTURE, "non-positive at 25 steps", "sign_preserving", "sign_agnostic", maximize=False),
    ),
    run=run,
    judge=judge,
    deviations=(
        "A sign-agnostic sample that is not positive counts by the logarithm of its magnitude.",
        "The paper's address of code is not confirmed and its schedules could not be read: σ is geometric, μ = σ²/2.",
        "Training on digits takes 100 epochs of batch 128 (800 steps), and 600 images are drawn, to fit five minutes.",
        "Both kinds of network predict the noise, divided by its level: the same body, input scaling and tuning.",
    ),
)
