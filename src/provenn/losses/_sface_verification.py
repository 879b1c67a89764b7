"""How well embeddings tell whether two images show one person, and find a person among others.

The protocols are those of Labeled Faces in the Wild (k-fold accuracy), IJB (true accept rate at a false accept rate)
and MegaFace (rank among distractors).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.nn import functional as F

from provenn.core.experiment.checks import check_integer, check_number
from provenn.core.experiment.reports import Report
from provenn.core.experiment.training import predict

FARS = (1e-2, 1e-3, 1e-4, 1e-5, 1e-6)
_CURVE = 101
"""Points of the curve that a report keeps."""


@dataclass(frozen=True)
class VerificationReport(Report):
    """How well scores of pairs tell matching pairs from others.

    Args:
        pairs: Number of pairs.
        matching: How many of them match.
        auc: Chance that a matching pair scores above another; ties count half.
        accuracy: Mean over folds of the accuracy at the threshold that is best on the other folds.
        accuracy_std: Standard deviation over folds.
        fold_accuracies: The accuracy of each fold.
        fold_thresholds: The threshold of each fold; a pair that scores as much matches.
        fars: False accept rates asked for.
        tars: The largest true accept rate at a false accept rate of at most that.
        curve_far: False accept rates from 1 down to that of one pair, evenly on a logarithmic scale.
        curve_tar: True accept rates there.
    """

    pairs: int
    matching: int
    auc: float
    accuracy: float
    accuracy_std: float
    fold_accuracies: tuple[float, ...]
    fold_thresholds: tuple[float, ...]
    fars: tuple[float, ...]
    tars: tuple[float, ...]
    curve_far: tuple[float, ...]
    curve_tar: tuple[float, ...]

    def tar(self, far: float) -> float:
        """Return the true accept rate at one of ``fars``.

        Raises:
            ValueError: It is none of them.
        """
        if far not in self.fars:
            raise ValueError(f"far must be one of {self.fars}, got {far}")
        return self.tars[self.fars.index(far)]

    def plot(self) -> Figure:
        """Draw the true accept rate by the false accept rate."""
        figure = Figure(figsize=(5, 4), layout="constrained")
        axes = figure.subplots()
        axes.semilogx(self.curve_far, self.curve_tar, drawstyle="steps-post")
        axes.set(xlabel="false accept rate", ylabel="true accept rate", ylim=(0, 1.02))
        axes.set_title(f"AUC {self.auc:.4f}, accuracy {self.accuracy:.4f} ± {self.accuracy_std:.4f}")
        return figure


def verification_report(
    embeddings: Float[Tensor, "images features"],
    labels: Int[Tensor, " images"],
    folds: int = 10,
    fars: Sequence[float] = FARS,
) -> VerificationReport:
    """Verify all pairs of images by the cosine of their embeddings.

    The matching pairs are dealt to the folds in turn, and so are the others, so that every fold has its share of both.

    Args:
        embeddings: One image a row; only directions count. Those of :func:`mirror_embedding`, say.
        labels: Who is shown.
        folds: Folds of the accuracy, at least 2.
        fars: False accept rates, in (0, 1], at which the true accept rate is reported.

    Shape:
        ``embeddings`` (N, d), ``labels`` (N,).

    Returns:
        The report.

    Raises:
        ValueError: A single person, no two images of one person, an embedding that is zero or not finite (the row is
            named), fewer pairs than folds, or a rate outside (0, 1].
        TypeError: ``labels`` are no integers, or ``embeddings`` not of floating point.

    Cost: O(N² (d + folds log N)) time and O(N²) memory, in float64.

    Source: Huang et al., "Labeled Faces in the Wild" (2007), for the accuracy; Maze et al., "IARPA Janus Benchmark C"
    (2018), for the rates.
    """
    unit = _directions("embeddings", embeddings, "labels", labels)
    labels = labels.to(unit.device)
    first, second = torch.triu_indices(len(unit), len(unit), offset=1, device=unit.device)
    same = labels[first] == labels[second]
    if bool(same.all()):
        raise ValueError(f"labels must name at least two people, got {int(labels[0])} alone")
    if not bool(same.any()):
        raise ValueError("labels must name one person twice at least, got no matching pair")
    # The i-th matching pair goes to fold i mod folds, and so does the i-th other pair.
    place = torch.where(same, same.cumsum(0), (~same).cumsum(0)) - 1
    return _report((unit @ unit.T)[first, second], same, place, folds, fars)


def pair_report(
    scores: Float[Tensor, " pairs"],
    same: Bool[Tensor, " pairs"],
    folds: int = 10,
    fars: Sequence[float] = FARS,
) -> VerificationReport:
    """Verify given pairs by their scores; the folds are stretches of the list, as of LFW's list of pairs.

    Args:
        scores: Large where two images are alike.
        same: Whether they show one person.
        folds: Folds of the accuracy, at least 2; the first ones are longer by a pair where they do not come out even.
        fars: False accept rates, in (0, 1].

    Shape:
        ``scores`` (pairs,), ``same`` (pairs,).

    Returns:
        The report.

    Raises:
        ValueError: All pairs match, or none does; a score is not finite; fewer pairs than folds; shapes that differ; or
            a rate outside (0, 1].
        TypeError: ``same`` is not of booleans, or ``scores`` not of floating point.

    Cost: O(n folds log n) time and O(n) memory for n pairs.

    Source: as :func:`verification_report`.
    """
    if same.dtype != torch.bool:
        raise TypeError(f"same must be of booleans, got {same.dtype}")
    if not scores.is_floating_point():
        raise TypeError(f"scores must be of floating point, got {scores.dtype}")
    if scores.dim() != 1 or scores.shape != same.shape:
        raise ValueError(f"scores and same must be (pairs,) both, got {tuple(scores.shape)} and {tuple(same.shape)}")
    if not bool(scores.isfinite().all()):
        raise ValueError(f"scores must be finite, got {scores[~scores.isfinite()][0]}")
    if bool(same.all()) or not bool(same.any()):
        raise ValueError(f"same must hold matching and other pairs, got {int(same.sum())} matching of {len(same)}")
    check_integer("folds", folds, at_least=2)
    short, long = divmod(len(scores), folds)
    sizes = torch.full((folds,), short)
    sizes[:long] += 1
    place = torch.repeat_interleave(torch.arange(folds), sizes).to(scores.device)
    return _report(scores.detach().double(), same.to(scores.device), place, folds, fars)


@torch.no_grad()
def _report(scores: Tensor, same: Tensor, place: Tensor, folds: int, fars: Sequence[float]) -> VerificationReport:
    check_integer("folds", folds, at_least=2)
    if len(scores) < folds:
        raise ValueError(f"folds must be at most the number of pairs, {len(scores)}, got {folds}")
    for far in fars:
        check_number("fars", far, above=0, at_most=1)
    accepted, wrongly, _ = _counts(scores, same)
    matching, others = accepted[-1], wrongly[-1]
    tpr, fpr = accepted / matching, wrongly / others
    grid = torch.logspace(0, -1, _CURVE, base=max(float(others), 2.0), dtype=torch.float64)
    results = [_fold(scores, same, place % folds == fold) for fold in range(folds)]
    accuracies = torch.tensor([accuracy for accuracy, _ in results], dtype=torch.float64)
    return VerificationReport(
        pairs=len(scores),
        matching=int(matching),
        auc=torch.trapezoid(tpr, fpr).item(),
        accuracy=accuracies.mean().item(),
        accuracy_std=accuracies.std(correction=0).item(),
        fold_accuracies=tuple(accuracies.tolist()),
        fold_thresholds=tuple(threshold for _, threshold in results),
        fars=tuple(float(far) for far in fars),
        tars=tuple(_tar(accepted, wrongly, float(far)) for far in fars),
        curve_far=tuple(grid.tolist()),
        curve_tar=tuple(_tar(accepted, wrongly, far) for far in grid.tolist()),
    )


def _counts(scores: Tensor, same: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return how many matching and other pairs score at least a threshold, at ∞ and at every score, and the scores."""
    ordered, order = scores.sort(descending=True)
    hits = same[order].double()
    last = torch.ones_like(same)
    last[:-1] = ordered[:-1] != ordered[1:]  # equal scores are accepted together
    zero = hits.new_zeros(1)
    accepted = torch.cat([zero, hits.cumsum(0)[last]])
    wrongly = torch.cat([zero, (1 - hits).cumsum(0)[last]])
    return accepted, wrongly, ordered[last]


def _tar(accepted: Tensor, wrongly: Tensor, far: float) -> float:
    allowed = far * wrongly[-1] * (1 + 1e-12)  # 1e-2 of 300 pairs is 3 pairs, whatever the product rounds to
    return (accepted[wrongly <= allowed][-1] / accepted[-1]).item()


def _fold(scores: Tensor, same: Tensor, tested: Tensor) -> tuple[float, float]:
    """Return the accuracy of a fold and its threshold, half-way between two scores of the other folds."""
    accepted, wrongly, levels = _counts(scores[~tested], same[~tested])
    best = int((accepted - wrongly).argmax())  # the strictest of equals
    if best == 0:
        threshold = levels[0].item() + 1.0
    elif best == len(levels):
        threshold = levels[-1].item() - 1.0
    else:
        threshold = ((levels[best - 1] + levels[best]) / 2).item()
    right = (scores[tested] >= threshold) == same[tested]
    return right.double().mean().item(), threshold


def identification_rate(
    embeddings: Float[Tensor, "images features"],
    labels: Int[Tensor, " images"],
    distractors: Float[Tensor, "others features"] | None = None,
    rank: int = 1,
) -> float:
    """Return how often a person's image is found by another one of the same person, among distractors.

    Every image is a probe once for each other image of its person: that one joins the distractors, and counts as found
    if fewer than ``rank`` distractors are nearer to the probe, or as near.

    Args:
        embeddings: One image a row; only directions count.
        labels: Who is shown.
        distractors: Images of other people, who are not among the probes. ``None``: the images of the other people
            among ``embeddings``.
        rank: The mate must be among so many nearest.

    Shape:
        ``embeddings`` (N, d), ``labels`` (N,), ``distractors`` (M, d).

    Returns:
        The rate, in [0, 1].

    Raises:
        ValueError: No two images of one person, no distractor, an embedding that is zero or not finite, or
            ``rank`` < 1.
        TypeError: ``labels`` are no integers, or embeddings not of floating point.

    Cost: O(N (N + M)(d + log M)) time and O(N (N + M)) memory, in float64.

    Source: Kemelmacher-Shlizerman et al., "The MegaFace benchmark" (2016), identification.
    """
    check_integer("rank", rank, at_least=1)
    unit = _directions("embeddings", embeddings, "labels", labels)
    alike = unit @ unit.T
    labels = labels.to(unit.device)
    same = labels[:, None] == labels
    mates = same & ~torch.eye(len(unit), dtype=torch.bool, device=unit.device)
    if not bool(mates.any()):
        raise ValueError("labels must name one person twice at least, got no matching pair")
    if distractors is None:
        foes = alike.masked_fill(same, -torch.inf)
        if bool(same.all()):
            raise ValueError("distractors must be given where labels name a single person")
    else:
        foes = unit @ _directions("distractors", distractors).T
    ranked = foes.sort(dim=1, descending=True).values
    if ranked.shape[1] < rank:
        return 1.0
    return (alike > ranked[:, rank - 1 : rank])[mates].double().mean().item()


def _directions(name: str, embeddings: Tensor, labels_name: str = "", labels: Tensor | None = None) -> Tensor:
    if not embeddings.is_floating_point():
        raise TypeError(f"{name} must be of floating point, got {embeddings.dtype}")
    if embeddings.dim() != 2 or len(embeddings) == 0:
        raise ValueError(f"{name} must be (images, features) with one image at least, got {tuple(embeddings.shape)}")
    if labels is not None:
        if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
            raise TypeError(f"{labels_name} must be integers, got {labels.dtype}")
        if labels.shape != embeddings.shape[:1]:
            raise ValueError(f"{labels_name} must be ({len(embeddings)},), got {tuple(labels.shape)}")
    rows = embeddings.detach().double()
    bad = ~rows.isfinite().all(dim=1) | (rows == 0).all(dim=1)
    if bool(bad.any()):
        raise ValueError(
            f"{name} must have finite directions, got zero, NaN or infinity in row {int(bad.nonzero()[0])}"
        )
    return F.normalize(rows / rows.abs().amax(dim=1, keepdim=True), eps=0.0)


def mirror_embedding(
    model: nn.Module, x: Float[Tensor, "images channels height width"], batch_size: int = 256
) -> Float[Tensor, "images features"]:
    """Return the embedding of each image plus that of its mirror image, scaled to length 1.

    Args:
        model: Maps images to embeddings; run in evaluation mode, and left as it was.
        x: Images.
        batch_size: Images a call.

    Shape:
        ``x`` (N, channels, H, W); output (N, d).

    Returns:
        The embeddings; zero where the two cancel.

    Raises:
        ValueError: ``x`` has not four dimensions, or ``batch_size`` < 1.

    Cost: two runs of the model an image.

    Source: the authors' evaluation, as in arXiv 1801.07698.
    """
    if x.dim() != 4:
        raise ValueError(f"x must be (images, channels, height, width), got {tuple(x.shape)}")
    check_integer("batch_size", batch_size, at_least=1)
    return F.normalize(predict(model, x, batch_size) + predict(model, x.flip(-1), batch_size))
