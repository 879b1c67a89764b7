"""Sigmoid attention's claim: it matches softmax given b = −log n and the stabilisers, and is more regular."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
from sklearn import datasets
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
    Scalar,
    Study,
    Tier,
    Trial,
    Tuning,
    Verdict,
)
from provenn.claims.nn._sigmoid_attention_models import CharacterModel, VisionTransformer
from provenn.core.experiment.accounting import median_seconds
from provenn.core.experiment.seeding import derive_seed, generator, seeded
from provenn.core.experiment.statistics import Interval
from provenn.core.experiment.training import accuracy, minibatches, predict, train
from provenn.data.language import CharacterCorpus, character_corpus, random_windows
from provenn.nn import SigmoidAttention, attention_regularity
from provenn.nn._sigmoid_attention_baselines import SoftmaxAttention
from provenn.nn.functional import sigmoid_attention

SIGMOID, SOFTMAX, UNBIASED = "sigmoid", "softmax", "sigmoid, b = 0"
ARMS = (SIGMOID, SOFTMAX, UNBIASED)
RADIUS = 5.0
ACCURACY_MARGIN, LOSS_MARGIN, SHARE = 0.01, 0.03, 0.9
Batches = Callable[[int], Iterator[tuple[Tensor, ...]]]


def attention_of(arm: str, dim: int, heads: int, length: int, **options: Any) -> nn.Module:
    """Build an arm's attention: the arms differ in the activation and its bias, and share everything else."""
    if arm == SOFTMAX:
        softmax: nn.Module = SoftmaxAttention(dim, heads, **options)
        return softmax
    bias = 0.0 if arm == UNBIASED else "-log_n"
    sigmoid: nn.Module = SigmoidAttention(dim, heads, bias=bias, max_length=length, **options)
    return sigmoid


def run(trial: Trial) -> Iterator[Event]:
    """Train a vision transformer or a character model, measure Jacobians, or time the kernel."""
    runs = {"vision": _run_vision, "language": _run_language, "regularity": _run_regularity, "kernel": _run_kernel}
    yield from runs[trial.study](trial)


@dataclass(frozen=True)
class Images:
    """Images in [−1, 1], cut in three."""

    train: tuple[Tensor, Tensor]
    validation: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]


@cache
def images(name: str, train: int, validation: int, test: int) -> Images:
    """Cut a data set: training and validation images from the shuffled training set, test images from the test set."""
    if name == "digits":
        digits = data.load("digits")
        x, y = torch.from_numpy(digits.x).float().reshape(-1, 1, 8, 8) / 8 - 1, torch.from_numpy(digits.y)
    else:
        pixels = data.load("cifar10")
        x, y = torch.from_numpy(pixels.x_train), torch.from_numpy(pixels.y_train).long()
        x_test, y_test = torch.from_numpy(pixels.x_test), torch.from_numpy(pixels.y_test).long()
    order = torch.randperm(len(x), generator=generator("split"))[: train + validation + test]
    x, y = x[order], y[order]
    held = x[train : train + validation], y[train : train + validation]
    if name == "digits":
        return Images((x[:train], y[:train]), held, (x[train + validation :], y[train + validation :]))

    def scaled(pair: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        return pair[0].float() / 127.5 - 1, pair[1]

    return Images(scaled((x[:train], y[:train])), scaled(held), scaled((x_test[:test], y_test[:test])))


def _run_vision(trial: Trial) -> Iterator[Event]:
    budget = {name: value for name, value in trial.budget.items() if name != "data"}
    sizes = {name: int(value) for name, value in budget.items()}
    found = images(str(trial.budget["data"]), sizes["train"], sizes["validation"], sizes["test"])
    held, test = ((x.to(trial.device), y.to(trial.device)) for x, y in (found.validation, found.test))
    tokens = (found.train[0].shape[-1] // sizes["patch"]) ** 2
    attention = partial(attention_of, trial.arm, sizes["dim"], sizes["heads"], tokens, layer_scale=1e-4)
    with seeded(trial.seed, "weights"):
        channels, side = found.train[0].shape[1], found.train[0].shape[-1]
        model = VisionTransformer(side, channels, sizes["patch"], sizes["dim"], sizes["depth"], attention)
    model = model.to(trial.device)

    def batches(epoch: int) -> Iterator[tuple[Tensor, ...]]:
        for batch in minibatches(found.train, sizes["batch_size"], generator(trial.seed, "order", epoch)):
            yield tuple(one.to(trial.device) for one in batch)

    def loss(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        return nn.functional.cross_entropy(model(x), y)

    steps = -(-sizes["train"] // sizes["batch_size"])
    for event in _trained(trial, model, batches, loss, sizes["epochs"], steps):
        yield event
        if isinstance(event, Point):
            yield Point("validation accuracy", event.x, accuracy(model, *held))
    yield Metric("validation_accuracy", accuracy(model, *held))
    if not trial.tuning:
        yield Metric("test_accuracy", accuracy(model, *test))


@cache
def corpus(name: str) -> CharacterCorpus:
    """Load a text: tinyshakespeare, or the descriptions of the data sets that scikit-learn brings along."""
    if name == "tinyshakespeare":
        return character_corpus(data.load("tinyshakespeare").text)
    loaders = (datasets.load_breast_cancer, datasets.load_diabetes, datasets.load_digits, datasets.load_wine)
    return character_corpus("".join(load().DESCR for load in loaders))


def _run_language(trial: Trial) -> Iterator[Event]:
    sizes = {name: int(value) for name, value in trial.budget.items() if name != "data"}
    text = corpus(str(trial.budget["data"]))
    length, batch, steps = sizes["length"], sizes["batch_size"], sizes["steps"] // sizes["epochs"]
    options = {"causal": True, "alibi": True, "qk_norm": True}
    attention = partial(attention_of, trial.arm, sizes["dim"], sizes["heads"], length, **options)
    with seeded(trial.seed, "weights"):
        model = CharacterModel(len(text.vocabulary), sizes["dim"], sizes["depth"], attention).to(trial.device)

    def batches(epoch: int) -> Iterator[tuple[Tensor, ...]]:
        draws = generator(trial.seed, "windows", epoch)
        for _ in range(steps):
            yield tuple(one.to(trial.device) for one in random_windows(text.train, batch, length, draws))

    held, test = (
        [one.to(trial.device) for one in random_windows(part, sizes["windows"], length, generator("held out"))]
        for part in (text.validation, text.test)
    )
    for event in _trained(trial, model, batches, _next_character, sizes["epochs"], steps):
        yield event
        if isinstance(event, Point):
            yield Point("validation loss", event.x, _loss_on(model, *held))
    yield Metric("validation_loss", _loss_on(model, *held))
    if not trial.tuning:
        yield Metric("test_loss", _loss_on(model, *test))


def _next_character(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return nn.functional.cross_entropy(model(x).flatten(0, 1), y.flatten())


def _loss_on(model: nn.Module, x: Tensor, y: Tensor) -> float:
    """Cross-entropy a character, in nats; a model that diverged counts as one that guesses uniformly."""
    logits = predict(model, x, batch_size=64)
    loss = nn.functional.cross_entropy(logits.flatten(0, 1), y.flatten()).item()
    return loss if math.isfinite(loss) else math.log(logits.shape[-1])


def _trained(
    trial: Trial, model: nn.Module, batches: Batches, loss: Callable[..., Tensor], epochs: int, steps: int
) -> Iterator[Event]:
    """Train by Adam: the learning rate rises over the first tenth of the steps, then falls as a cosine."""
    optimizer = torch.optim.Adam(model.parameters(), lr=float(trial.settings["lr"]))
    total = epochs * steps

    def rate(step: int) -> float:
        return min(10 * (step + 1) / total, 0.5 * (1 + math.cos(math.pi * step / total)))

    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    diverged = False
    try:
        for epoch in train(model, optimizer, batches, loss, epochs=epochs, scheduler=scheduler):
            yield Progress(epoch.step, total)
            yield Point("training loss", epoch.step, epoch.loss)
    except FloatingPointError:
        diverged = True
    yield Metric("diverged", float(diverged))


def _run_regularity(trial: Trial) -> Iterator[Event]:
    dim, heads, tokens = (int(trial.budget[name]) for name in ("dim", "heads", "tokens"))
    draws = int(trial.budget["draws"])
    lower: list[float] = []
    norms: dict[str, list[tuple[float, ...]]] = {SIGMOID: [], SOFTMAX: []}
    ratios: dict[str, list[float]] = {"-log n": [], "0": []}
    for draw in range(draws):
        with seeded(trial.seed, "weights", draw):
            layer = SigmoidAttention(dim, heads).to(trial.device)
        seed = torch.Generator().manual_seed(derive_seed(trial.seed, "tokens", draw))
        report = attention_regularity(
            layer, (1.0, RADIUS, 10.0), tokens=tokens, draws=1, tolerance=1e-4, generator=seed
        )
        for name, kept in norms.items():
            kept.append(tuple(row[0] for row in report.norms[name]))
        place = report.radius.index(RADIUS)
        lower.append(float(norms[SIGMOID][-1][place] < norms[SOFTMAX][-1][place]))
        for name, ratio in _initial_ratios(layer, tokens, seed).items():
            ratios[name].append(ratio)
        yield Progress(draw + 1, draws)
    for name, kept in norms.items():
        for index, radius in enumerate(report.radius):
            mean = sum(row[index] for row in kept) / draws
            yield Point(f"Jacobian norm, {name}", radius, mean)
            yield Metric(f"jacobian_norm_{name}_at_{radius:g}", mean)
    yield Metric("share_lower", sum(lower) / draws)
    for name, kept_ratios in ratios.items():
        yield Metric(f"initial_norm_over_softmax, b = {name}", sum(kept_ratios) / draws)


@torch.no_grad()
def _initial_ratios(layer: SigmoidAttention, tokens: int, draws: torch.Generator) -> dict[str, float]:
    """The norm of a fresh layer's output at normal tokens, over that of softmax with the same weights."""
    device = layer.q_proj.weight.device
    x = torch.randn(1, tokens, layer.embed_dim, generator=draws).to(device)
    softmax = SoftmaxAttention(layer.embed_dim, layer.num_heads).to(device)
    unbiased = SigmoidAttention(layer.embed_dim, layer.num_heads, bias=0.0).to(device)
    for twin in (softmax, unbiased):
        twin.load_state_dict(layer.state_dict())
    norm = {name: one(x, x, x)[0].norm().item() for name, one in (("-log n", layer), ("0", unbiased), ("", softmax))}
    return {name: norm[name] / norm[""] for name in ("-log n", "0")}


def _run_kernel(trial: Trial) -> Iterator[Event]:
    lengths = [2**power for power in range(10, 1 + int(trial.budget["log2_length"]))]
    dtype = torch.bfloat16 if trial.device.startswith("cuda") else torch.float32
    for done, length in enumerate(lengths, 1):
        batch = max(1, int(trial.budget["tokens"]) // length)
        draws = generator(trial.seed, "operands", length)
        shape = (batch, int(trial.budget["heads"]), length, 64)
        q, k, v = (torch.randn(shape, generator=draws).to(trial.device, dtype).requires_grad_() for _ in range(3))
        attend = sigmoid_attention if trial.arm == SIGMOID else nn.functional.scaled_dot_product_attention
        with torch.no_grad():
            forward = 1e3 * median_seconds(lambda: attend(q, k, v))  # noqa: B023 - called at once
        both = 1e3 * median_seconds(lambda: torch.autograd.grad(attend(q, k, v).sum(), (q, k, v)))  # noqa: B023
        yield Point("forward, ms", length, forward)
        yield Point("forward and backward, ms", length, both)
        yield Progress(done, len(lengths))
    yield Metric("forward_ms", forward)
    yield Metric("forward_backward_ms", both)


def judge(evidence: Evidence) -> Verdict:
    """Apply the rule: parity with softmax in both trainings; the bias helps in both; lower Jacobian norms."""
    accuracy_gap = evidence.difference("vision", SIGMOID, SOFTMAX, "test_accuracy")
    loss_gap = evidence.difference("language", SIGMOID, SOFTMAX, "test_loss")
    accuracy_lost = evidence.difference("vision", UNBIASED, SIGMOID, "test_accuracy")
    loss_added = evidence.difference("language", UNBIASED, SIGMOID, "test_loss")
    share = evidence.mean("regularity", SIGMOID, "share_lower")
    parity = abs(accuracy_gap.estimate) <= ACCURACY_MARGIN and abs(loss_gap.estimate) <= LOSS_MARGIN
    bias_matters = accuracy_lost.estimate < 0 and loss_added.estimate > 0
    regular = share >= SHARE
    outcome: Outcome = "reproduced" if parity and bias_matters and regular else "partly" if parity else "not reproduced"
    reason = (
        f"sigmoid minus softmax: accuracy {100 * accuracy_gap.estimate:+.2f} points (at most 1 either way), loss "
        f"{loss_gap.estimate:+.4f} nats (at most 0.03 either way); b = 0 minus b = −log n: accuracy "
        f"{100 * accuracy_lost.estimate:+.2f} points, loss {loss_added.estimate:+.4f} nats (worse in both asked for); "
        f"Jacobian norm at R = 5 lower than softmax's on {share:.0%} of weight draws (90 % asked for)"
    )
    margins: dict[str, Interval | float] = {
        "accuracy, sigmoid − softmax": accuracy_gap,
        "loss, sigmoid − softmax": loss_gap,
        "accuracy, b = 0 − b = −log n": accuracy_lost,
        "loss, b = 0 − b = −log n": loss_added,
        "share of draws with a lower Jacobian norm": share,
    }
    return Verdict(outcome, reason, margins)


_RATES = tuple({"lr": rate} for rate in (1e-3, 3e-3))
_VISION: dict[str, Scalar] = {"data": "cifar10", "patch": 4, "dim": 64, "depth": 3, "heads": 4, "batch_size": 32}
_LANGUAGE: dict[str, Scalar] = {
    "data": "tinyshakespeare",
    "length": 64,
    "dim": 64,
    "depth": 2,
    "heads": 4,
    "batch_size": 32,
}
_REGULARITY: dict[str, Scalar] = {"dim": 64, "heads": 4, "tokens": 64}
_TINY_VISION: dict[str, Scalar] = {"data": "digits", "patch": 2, "dim": 16, "depth": 1, "heads": 2, "batch_size": 64}
_TINY_LANGUAGE: dict[str, Scalar] = {
    "data": "descriptions",
    "length": 16,
    "dim": 16,
    "depth": 1,
    "heads": 2,
    "batch_size": 16,
}

CLAIM = Claim(
    slug="sigmoid-attention",
    statement=(
        "Sigmoid attention matches softmax attention in vision and language when its bias is −log n and LayerScale, QK "
        "norm or a norm on the output keep it stable; without the bias it is worse; and it is the more regular map."
    ),
    figures=(
        Figure(
            "FlashSigmoid's forward pass is 17 % faster than FlashAttention-2 on an H100, its backward pass 2.7 %",
            "abstract; the authors' repository, README (17.39 % and 2.7 %, full attention)",
        ),
        Figure(
            "Sigmoid matches softmax in supervised and self-supervised vision, speech recognition and language models "
            "of up to 1 B parameters",
            "section 5",
        ),
        Figure(
            "The Jacobian's bound grows polynomially with the tokens' norm, where softmax's worst case grows "
            "exponentially with its square",
            "theorem 3.2 and its remarks",
        ),
    ),
    rule=(
        "With means over seeds: parity is |sigmoid − softmax| ≤ 1 point of test accuracy on images and ≤ 0.03 nats of "
        "test loss on text. Reproduced: parity; sigmoid with b = 0 worse than with b = −log n in both; and the "
        "Jacobian's spectral norm at tokens in a ball of radius 5 lower for sigmoid than for softmax on at least 90 % "
        "of random weight draws. Partly: parity without the others. Else not reproduced."
    ),
    studies={
        "vision": Study(
            arms=ARMS,
            tiers={
                "smoke": Tier(1, {**_TINY_VISION, "train": 512, "validation": 128, "test": 128, "epochs": 1}),
                "small": Tier(3, {**_VISION, "train": 4000, "validation": 1000, "test": 4000, "epochs": 2}),
                "full": Tier(
                    3,
                    {**_VISION, "dim": 384, "depth": 12, "heads": 6, "batch_size": 256}
                    | {"train": 45_000, "validation": 5000, "test": 10_000, "epochs": 300},
                ),
            },
            tuning=Tuning(_RATES, metric="validation_accuracy"),
        ),
        "language": Study(
            arms=ARMS,
            tiers={
                "smoke": Tier(1, {**_TINY_LANGUAGE, "windows": 32, "steps": 20, "epochs": 2}),
                "small": Tier(3, {**_LANGUAGE, "windows": 512, "steps": 400, "epochs": 5}),
                "full": Tier(
                    3,
                    {**_LANGUAGE, "length": 1024, "dim": 768, "depth": 12, "heads": 12}
                    | {"windows": 128, "steps": 20_000, "epochs": 100},
                ),
            },
            tuning=Tuning(_RATES, metric="validation_loss", maximize=False),
        ),
        "regularity": Study(
            arms=(SIGMOID,),
            tiers={
                "smoke": Tier(1, {**_REGULARITY, "dim": 16, "tokens": 8, "draws": 2}),
                "small": Tier(3, {**_REGULARITY, "draws": 20}),
                "full": Tier(3, {**_REGULARITY, "draws": 100}),
            },
        ),
        "kernel": Study(
            arms=(SIGMOID, SOFTMAX),
            tiers={"full": Tier(3, {"log2_length": 14, "tokens": 16_384, "heads": 16})},
        ),
    },
    comparisons=(
        Comparison("vision", "test_accuracy", SIGMOID, SOFTMAX, "test accuracy, CIFAR-10 (JPEG)"),
        Comparison("language", "test_loss", SIGMOID, SOFTMAX, "test loss a character, tinyshakespeare", maximize=False),
        Comparison("vision", "test_accuracy", SIGMOID, UNBIASED, "what the bias gives, CIFAR-10 (JPEG)"),
        Comparison("language", "test_loss", SIGMOID, UNBIASED, "what the bias gives, tinyshakespeare", maximize=False),
        Comparison("kernel", "forward_ms", SIGMOID, SOFTMAX, "forward pass at n = 16k, against SDPA", maximize=False),
    ),
    run=run,
    judge=judge,
    deviations=(
        "Small transformers on 4 000 images of CIFAR-10 (from JPEG files) and on tinyshakespeare stand in for ViT-B on "
        "ImageNet and language models of 1 B parameters; budgets are steps.",
        "The arm with b = 0 keeps the stabiliser (LayerScale, QK norm) of the other two, so that it differs from "
        "sigmoid in the bias alone.",
        "Jacobians are those of the layer at its own initialisation, 64 tokens of 64 features, 4 heads.",
    ),
)
