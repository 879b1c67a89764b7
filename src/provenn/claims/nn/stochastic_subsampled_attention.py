"""Subsampled attention's claim: less attention work in training, no loss of quality, and sub-models that add up."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from functools import cache

import torch
from jaxtyping import Float
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
from provenn.core.experiment.seeding import generator, seeded
from provenn.core.experiment.statistics import Interval
from provenn.core.experiment.training import predict, train
from provenn.core.sequences.language_model import LanguageModel, next_token_loss
from provenn.data.language import CharacterCorpus, character_corpus, random_windows
from provenn.nn import SubsampledAttention, SubsampledTraining, pathway_probe

DENSE, DROPOUT, LOCAL, UNBIASED = "dense", "dense, dropout 0.1", "SSA, local", "SSA, unbiased"
BASELINES, METHODS = (DENSE, DROPOUT), (LOCAL, UNBIASED)
STUDY = "language"
PARTS = 10  # of the training, the last of which is dense where SSA is fine-tuned
LOSS_MARGIN, REDUCTION, ENSEMBLE_MARGIN = 0.01, 3.5, 0.02
STAGES = (
    ("fine-tuned", "test_bits", "reduction"),
    ("sampled to the end", "test_bits_sampled", "reduction_sampled"),
)


class SelfAttention(nn.Module):
    """Subsampled attention of a sequence to itself, with one argument."""

    def __init__(self, layer: SubsampledAttention) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Float[Tensor, "batch length dim"]) -> Float[Tensor, "batch length dim"]:
        """Return the layer's output."""
        out: Tensor = self.layer(x, x, x, need_weights=False)[0]
        return out


@cache
def corpus(name: str, train_on: int) -> CharacterCorpus:
    """Load a text, tinyshakespeare or the descriptions of scikit-learn's data sets, and keep its first characters."""
    if name == "tinyshakespeare":
        text = character_corpus(data.load("tinyshakespeare").text)
    else:
        loaders = (datasets.load_breast_cancer, datasets.load_diabetes, datasets.load_digits, datasets.load_wine)
        text = character_corpus("".join(load().DESCR for load in loaders))
    return CharacterCorpus(text.vocabulary, text.train[:train_on], text.validation, text.test)


def language_model(arm: str, vocabulary: int, sizes: dict[str, int]) -> nn.Module:
    """Build an arm's decoder; the arms share everything but what attention sees and drops in training."""
    dim, heads = sizes["dim"], sizes["heads"]
    model = LanguageModel(vocabulary, dim, sizes["depth"], heads, sizes["length"])
    for block in model.blocks:
        block.attention = SelfAttention(
            SubsampledAttention(
                dim,
                heads,
                sizes["sparsity"] if arm in METHODS else 1,
                "local" if arm == LOCAL else "none",
                causal=True,
                dropout=0.1 if arm == DROPOUT else 0.0,
                projection_bias=False,
            )
        )
    return model


def reduction(length: int, sparsity: int, dense: float) -> float:
    """By how much attention's multiply–accumulates fall, own sources counted, if a share of the steps is dense."""
    share = (-(-length // sparsity) + 1) / length
    return 1 / ((1 - dense) * share + dense)


def run(trial: Trial) -> Iterator[Event]:
    """Train a character model; SSA twice through the last part, densely and sampling on."""
    sizes = {name: int(value) for name, value in trial.budget.items() if name != "data"}
    text = corpus(str(trial.budget["data"]), sizes["train"])
    steps = sizes["steps"] // PARTS
    with seeded(trial.seed, "weights"):
        model = language_model(trial.arm, len(text.vocabulary), sizes).to(trial.device)
    optimizer = torch.optim.Adam(model.parameters(), lr=float(trial.settings["lr"]))
    sampled = trial.arm in METHODS
    for part in range(PARTS - 1):
        yield from _part(trial, model, optimizer, text, sizes, part, sizes["sparsity"] if sampled else 1)
        yield Progress((part + 1) * steps, PARTS * steps)
    tuned, of_tuned = copy.deepcopy((model, optimizer))
    yield from _part(trial, tuned, of_tuned, text, sizes, PARTS - 1, 1)
    validation, test = (
        [one.to(trial.device) for one in random_windows(part, sizes["windows"], sizes["length"], generator("held out"))]
        for part in (text.validation, text.test)
    )
    yield Metric("validation_bits", _bits(tuned, *validation))
    if trial.tuning:
        return
    yield Metric("test_bits", _bits(tuned, *test))
    yield Metric("train_bits", _bits(tuned, *_training_windows(text, sizes, trial.device)))
    if not sampled:
        return
    yield Metric("reduction", reduction(sizes["length"], sizes["sparsity"], 1 / PARTS))
    yield Metric("reduction_sampled", reduction(sizes["length"], sizes["sparsity"], 0.0))
    yield from _part(trial, model, optimizer, text, sizes, PARTS - 1, sizes["sparsity"])
    report = pathway_probe(model, (test[0], test[1]), sizes["members"], seed=trial.seed)
    yield Metric("test_bits_sampled", report.dense_loss / math.log(2))
    yield Metric("sub_model_bits", sum(report.losses) / len(report.losses) / math.log(2))
    yield Metric("ensemble_bits", report.ensemble_losses[-1] / math.log(2))
    yield Metric("error_correlation", report.error_correlation)
    for members, loss in enumerate(report.ensemble_losses, 1):
        yield Point("ensemble's bits, by members", members, loss / math.log(2))


def _training_windows(text: CharacterCorpus, sizes: dict[str, int], device: str) -> list[Tensor]:
    drawn = random_windows(text.train, sizes["windows"], sizes["length"], generator("seen"))
    return [one.to(device) for one in drawn]


def _part(
    trial: Trial,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    text: CharacterCorpus,
    sizes: dict[str, int],
    part: int,
    sparsity: int,
) -> Iterator[Event]:
    """Train a tenth of the steps; the rate rises over the first tenth of all, then falls as a cosine to 0."""
    steps = sizes["steps"] // PARTS
    total = steps * PARTS
    plan = SubsampledTraining(model, sparsity, 0.0, seed=trial.seed)

    def batches(_: int) -> Iterator[tuple[Tensor, ...]]:
        draws = generator(trial.seed, "windows", part)
        with seeded(trial.seed, "dropout", part):
            for step in range(part * steps, (part + 1) * steps):
                for group in optimizer.param_groups:
                    warm, cosine = 10 * (step + 1) / total, 0.5 * (1 + math.cos(math.pi * step / total))
                    group["lr"] = float(trial.settings["lr"]) * min(warm, cosine)
                plan.prepare(step, total)
                drawn = random_windows(text.train, sizes["batch_size"], sizes["length"], draws)
                yield tuple(one.to(trial.device) for one in drawn)

    for epoch in train(model, optimizer, batches, next_token_loss, epochs=1):
        yield Point("training bits" if sparsity > 1 else "training bits, dense", part, epoch.loss / math.log(2))


def _bits(model: nn.Module, x: Tensor, y: Tensor) -> float:
    """Bits a character, by dense attention."""
    logits = predict(model, x, batch_size=64)
    return nn.functional.cross_entropy(logits.flatten(0, 1), y.flatten()).item() / math.log(2)


def judge(evidence: Evidence) -> Verdict:
    """Apply the rule: as good for less work; and the ensemble better than its members and the dense evaluation."""
    best = min(BASELINES, key=lambda arm: evidence.mean(STUDY, arm, "test_bits"))
    baseline = evidence.mean(STUDY, best, "test_bits")
    cheap, together, words = [], [], []
    margins: dict[str, Interval | float] = {}
    for arm in METHODS:
        stages = []
        for stage, bits, less in STAGES:
            gap, times = evidence.mean(STUDY, arm, bits) - baseline, evidence.mean(STUDY, arm, less)
            stages.append(gap <= LOSS_MARGIN and times >= REDUCTION)
            margins[f"bits, {arm}, {stage} − {best}"] = gap
            margins[f"attention MACs, {best} / {arm}, {stage}"] = times
            words.append(f"{arm}, {stage}: {gap:+.4f} bits (at most +0.01) at {times:.2f}× fewer attention MACs (3.5)")
        members, ensemble, dense = (
            evidence.mean(STUDY, arm, name) for name in ("sub_model_bits", "ensemble_bits", "test_bits_sampled")
        )
        cheap.append(any(stages))
        together.append(members - ensemble >= ENSEMBLE_MARGIN and ensemble <= dense)
        margins[f"bits, mean sub-model − ensemble, {arm}"] = members - ensemble
        margins[f"bits, ensemble − dense evaluation, {arm}"] = ensemble - dense
        words.append(
            f"{arm}, sub-models less their ensemble {members - ensemble:+.4f} bits (at least 0.02), ensemble less "
            f"dense evaluation {ensemble - dense:+.4f} (at most 0)"
        )
    both = any(one and other for one, other in zip(cheap, together, strict=True))
    outcome: Outcome = "reproduced" if both else "partly" if any(cheap) or any(together) else "not reproduced"
    return Verdict(outcome, f"against {best} ({baseline:.4f} bits): " + "; ".join(words), margins)


_TEXT: dict[str, Scalar] = {"data": "tinyshakespeare", "train": 30_000, "length": 128, "sparsity": 4, "members": 16}
_TINY: dict[str, Scalar] = {"data": "descriptions", "train": 2000, "length": 16, "sparsity": 4, "members": 4, "dim": 16}
_MODEL: dict[str, Scalar] = {"dim": 48, "depth": 2, "heads": 4, "batch_size": 8}

CLAIM = Claim(
    slug="stochastic-subsampled-attention",
    statement=(
        "Training with a random quarter of the sources, drawn anew in every step and layer, is as good as dense "
        "training for 4 times less attention work; and the sub-models that are sampled afterwards, averaged, beat "
        "the dense evaluation of the same weights."
    ),
    figures=(
        Figure(
            "Attention costs 4 to 8 times less in training, with results equal to or better than dense training in "
            "language modelling, image classification and graph regression",
            "abstract",
        ),
        Figure(
            "Ensembles of sub-models sampled from the trained network predict better than its dense evaluation",
            "abstract",
        ),
    ),
    rule=(
        "With means over seeds, the best dense arm being the better of those without and with attention dropout. "
        "Reproduced: for one and the same SSA arm, fine-tuned densely or sampled to the end, bits a character of the "
        "dense evaluation at most 0.01 above the best dense arm's, with at least 3.5 times fewer attention "
        "multiply–accumulates over training; and the ensemble of 16 sub-models of the model before fine-tuning better "
        "than its mean sub-model by at least 0.02 bits and not worse than its dense evaluation. Partly: one of the "
        "two, by any arm, or the two by different arms. Else not reproduced."
    ),
    studies={
        STUDY: Study(
            arms=(*METHODS, *BASELINES),
            tiers={
                "smoke": Tier(1, {**_TINY, "depth": 1, "heads": 2, "batch_size": 4, "steps": 20, "windows": 8}),
                "small": Tier(3, {**_TEXT, **_MODEL, "steps": 350, "windows": 64}),
                "full": Tier(
                    3,
                    {**_TEXT, "train": 900_000, "length": 512, "dim": 384, "depth": 6, "heads": 6}
                    | {"batch_size": 32, "steps": 20_000, "windows": 128},
                ),
            },
            tuning=Tuning(({"lr": 1e-3}, {"lr": 3e-3}), metric="validation_bits", maximize=False),
        ),
    },
    comparisons=(
        Comparison(STUDY, "test_bits", LOCAL, DENSE, "bits a character, tinyshakespeare, fine-tuned", maximize=False),
        Comparison(STUDY, "test_bits", UNBIASED, DENSE, "bits a character, unbiased, fine-tuned", maximize=False),
        Comparison(STUDY, "test_bits", LOCAL, DROPOUT, "bits a character, against attention dropout", maximize=False),
    ),
    run=run,
    judge=judge,
    deviations=(
        "A decoder of 2 layers on 30 kB of tinyshakespeare stands in for WikiText-103, enwik8, ImageNet and PCQM4Mv2.",
        "The small tier has 350 steps of 8 windows at width 48, where 600 of 16 at width 64 were planned, in all arms.",
        "At s = 4 with the last tenth of the steps dense, attention's multiply–accumulates over training can fall by "
        "3.1 at most (3.0 with the own sources), whatever the results; so the rule's first half can be met only by "
        "SSA that samples to the end, which is trained beside the fine-tuned one from the same first nine tenths.",
        "The rate is picked on the validation stretch, and figures are taken on the test stretch of the text.",
        "The rate falls as a cosine to 0 over all steps in all arms; in the dense steps it is 0.8 % of its peak on "
        "average, which hardly changes the weights.",
        "So short a training leaves every arm at what pairs of characters predict (3.88 bits), where attention does "
        "little and no arm overfits: parity here says little of longer training. In a trial outside of the record "
        "(900 steps of 12 windows, one seed, rate 3e-3) dense reached 3.77 bits, SSA-local 3.86, SSA-unbiased 3.87.",
    ),
)
