"""Level set traversal against closed forms, the published steps written out anew, and brute force."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from provenn.contracts import AttackCase, BadInput, FunctionCase, ProbeCase
from provenn.core.experiment.seeding import generator
from provenn.robust import (
    LevelSetTraversal,
    LevelSetWidthProbe,
    StarShapeProbe,
    TriangleProbe,
    image_distances,
    level_set_traversal,
    project_orthogonal,
)

IMAGE = (2, 2, 3)
"""Channels, height, width: 12 entries, four for each of three classes."""


def classifier(scale=3.0):
    """Class k sums entries 4k … 4k + 3; dropout and batch statistics make the mode matter."""
    linear = nn.Linear(12, 3)
    with torch.no_grad():
        linear.weight.copy_(
            scale * torch.eye(3).repeat_interleave(4, dim=1) + 0.1 * torch.sin(torch.arange(36.0)).view(3, 12)
        )
        linear.bias.zero_()
    return nn.Sequential(nn.Flatten(), nn.BatchNorm1d(12), nn.Dropout(0.3), linear)


def images(source, dtype, batch):
    """Sources whose class is clear, with their labels, and targets of the next class."""
    y = torch.randint(3, (batch,), generator=source)

    def of(labels):
        flat = torch.rand(batch, 12, generator=source, dtype=dtype) * 0.6
        raised = nn.functional.one_hot(labels, 3).repeat_interleave(4, dim=1).to(dtype)
        return (flat + 0.3 * raised).view(batch, *IMAGE)

    return of(y), y, of((y + 1) % 3)


def drop(model, inputs, adversarial):
    x, y = inputs[:2]
    model.eval()
    with torch.no_grad():
        before, after = (model(one).double().softmax(-1)[torch.arange(len(x)), y] for one in (x, adversarial))
    return (before - after).clamp(min=0)


def still_called_so(scores, inputs):
    return scores.argmax(dim=-1) == inputs[1]


X, Y, TARGET = images(generator("case"), torch.float32, 4)
MODEL = classifier().eval()


def walk(**options):
    return level_set_traversal(classifier(), X, Y, TARGET, **{"num_steps": 3, **options})


ATTACK = {
    "part": "provenn.robust.LevelSetTraversal",
    "model": lambda: classifier(0.6),
    "inputs": images,
    "budget": 0.1,
    "distance": drop,
    "success": still_called_so,
    "bad_input": (
        BadInput("step_size", lambda: LevelSetTraversal(step_size=1.0)),
        BadInput("step_size", lambda: LevelSetTraversal(step_size=0.0)),
        BadInput("num_steps", lambda: LevelSetTraversal(num_steps=0)),
        BadInput("parallel_eps", lambda: LevelSetTraversal(parallel_eps=-1e-3)),
        BadInput("delta", lambda: LevelSetTraversal(delta=math.nan)),
        BadInput("noise", lambda: LevelSetTraversal(noise=-0.1)),
        BadInput("score", lambda: LevelSetTraversal(score="margin")),
        BadInput("log_every", lambda: LevelSetTraversal(log_every=0)),
        BadInput("x", lambda: LevelSetTraversal().attack(MODEL, X + 1, Y, TARGET)),
    ),
}


def line_by_hand(model, data):
    source, y, output = data
    model.eval()
    rows = []
    for s, label, o in zip(source, y, output, strict=True):
        points = torch.stack([s + share / 10 * (o - s) for share in range(11)])
        rows.append(model(points).softmax(-1)[:, label].detach().double().numpy())
    lowest = [row.min() for row in rows]
    kept = [bool(low >= row[0] - 0.2) for low, row in zip(lowest, rows, strict=True)]
    return {"lowest": lowest, "star_like": kept, "share": np.mean(kept), "mean_line": np.mean(rows, axis=0)}


def triangles(source):
    x, y, target = images(source, torch.float64, 4)
    return x, y, torch.stack([target, target.flip(0), x.flip(1)])


def triangles_by_hand(model, data):
    source, y, outputs = data
    model.eval()
    found = {"source": [], "mean": [], "fractions": [], "edge_mean_drop": [], "edge_largest_drop": []}
    for place, label in enumerate(y):
        start = model(source[place : place + 1]).softmax(-1)[0, label].item()
        means, fractions, edges, largest = [], [], [], []
        for a, b in ((0, 1), (0, 2), (1, 2)):
            values, on_edges = [], []
            for i in range(11):
                for j in range(11 - i):
                    point = (10 - i - j) * source[place] + i * outputs[a, place] + j * outputs[b, place]
                    value = model(point[None] / 10).softmax(-1)[0, label].item() if i + j else start
                    values.append(value)
                    on_edges += [value] * ((i == 0) + (j == 0))
            means.append(np.mean(values))
            fractions.append([np.mean([value > start - d for value in values]) for d in (0, 0.1, 0.2, 0.3)])
            edges.append(start - np.mean(on_edges))
            largest.append(start - min(on_edges))
        found["source"].append(start)
        found["mean"].append(np.mean(means))
        found["fractions"].append(tuple(np.mean(fractions, axis=0)))
        found["edge_mean_drop"].append(np.mean(edges))
        found["edge_largest_drop"].append(max(largest))
    return found


def widths_by_hand(model, data):
    """The same random numbers, by NumPy and a difference quotient of the loss."""
    points, y, target = data
    model.eval()
    draws, low, high = generator(0, "directions"), [], []
    for point, label, goal in zip(points, y, target, strict=True):
        flat = point.flatten()

        def loss(one, label=label):
            return -model(one.view(1, *IMAGE)).log_softmax(-1)[0, label].item()

        slope = np.array([(loss(flat + step) - loss(flat - step)) / 2e-5 for step in 1e-5 * torch.eye(12).double()])
        away = (goal - point).flatten().numpy()
        path = away - slope * (slope @ away) / (slope @ slope)
        drawn = torch.randn(64, *IMAGE, generator=draws, dtype=torch.float64).flatten(1).numpy()
        drawn = drawn - np.outer(drawn @ path, path) / (path @ path)
        drawn /= np.linalg.norm(drawn, axis=1, keepdims=True)
        rows = []
        for distance in (0.5, 2.0):
            moved = torch.from_numpy(np.clip(flat.numpy() + distance * drawn, 0, 1)).view(64, *IMAGE)
            values = model(moved).softmax(-1)[:, label].detach().numpy()
            rows.append(np.quantile(values, [0.05, 0.95]))
        low.append([row[0] for row in rows])
        high.append([row[1] for row in rows])
    return {"low": low, "high": high}


TRIPLE = (X, Y, TARGET)
BOTH = torch.stack([TARGET, X.flip(0)])
CASES = [
    AttackCase(
        make=lambda: LevelSetTraversal(step_size=0.05, num_steps=60, delta=0.1),
        independent_samples=False,
        independent_samples_reason="the noise on the start is drawn for the whole batch",
        **ATTACK,
    ),
    AttackCase(
        make=lambda: LevelSetTraversal(step_size=0.05, num_steps=60, delta=0.1, noise=0.0),
        random=False,
        random_reason="without noise nothing is drawn that matters",
        label="no noise",
        **ATTACK,
    ),
    FunctionCase(
        part="provenn.robust.level_set_traversal",
        call=walk,
        bad_input=(
            BadInput("x", lambda: level_set_traversal(MODEL, 2 * X - 1, Y, TARGET)),
            BadInput("x", lambda: level_set_traversal(MODEL, X * math.nan, Y, TARGET)),
            BadInput("target", lambda: level_set_traversal(MODEL, X, Y, TARGET + 0.5)),
            BadInput("target", lambda: level_set_traversal(MODEL, X, Y, TARGET[:1])),
            BadInput("y", lambda: level_set_traversal(MODEL, X, Y + 3, TARGET)),
            BadInput("y", lambda: level_set_traversal(MODEL, X, Y[:2], TARGET)),
            BadInput("y", lambda: level_set_traversal(MODEL, X, Y.float(), TARGET)),
            BadInput("step_size", lambda: walk(step_size=1.5)),
        ),
    ),
    FunctionCase(
        part="provenn.robust.project_orthogonal",
        call=lambda: project_orthogonal(X, TARGET),
        bad_input=(BadInput("grad", lambda: project_orthogonal(X, TARGET[:1])),),
    ),
    FunctionCase(
        part="provenn.robust.image_distances",
        call=lambda: image_distances(X, TARGET),
        bad_input=(BadInput("target", lambda: image_distances(X, TARGET[:1])),),
    ),
    ProbeCase(
        part="provenn.robust.StarShapeProbe",
        run=lambda model, data: StarShapeProbe()(model, data),
        model=lambda: classifier().double(),
        data=lambda source: images(source, torch.float64, 4),
        brute_force=line_by_hand,
        bad_input=(
            BadInput("num_points", lambda: StarShapeProbe(num_points=1)),
            BadInput("delta", lambda: StarShapeProbe(delta=-0.1)),
            BadInput("output", lambda: StarShapeProbe()(MODEL, (X, Y, TARGET[:2]))),
            BadInput("data", lambda: StarShapeProbe()(MODEL, (X, Y, TARGET + 1))),
            BadInput("y", lambda: StarShapeProbe()(MODEL, (X, Y + 3, TARGET))),
        ),
    ),
    ProbeCase(
        part="provenn.robust.TriangleProbe",
        run=lambda model, data: TriangleProbe()(model, data),
        model=lambda: classifier().double(),
        data=triangles,
        brute_force=triangles_by_hand,
        bad_input=(
            BadInput("spacing", lambda: TriangleProbe(spacing=0.3)),
            BadInput("drops", lambda: TriangleProbe(drops=())),
            BadInput("drops", lambda: TriangleProbe(drops=(-0.1,))),
            BadInput("outputs", lambda: TriangleProbe()(MODEL, (X, Y, BOTH[:1]))),
            BadInput("data", lambda: TriangleProbe()(MODEL, (X - 1, Y, BOTH))),
        ),
    ),
    ProbeCase(
        part="provenn.robust.LevelSetWidthProbe",
        run=lambda model, data: LevelSetWidthProbe(num_vectors=64, distances=(0.5, 2.0))(model, data),
        model=lambda: classifier().double(),
        data=lambda source: images(source, torch.float64, 3),
        brute_force=widths_by_hand,
        tolerance=1e-5,
        bad_input=(
            BadInput("num_vectors", lambda: LevelSetWidthProbe(num_vectors=0)),
            BadInput("distances", lambda: LevelSetWidthProbe(distances=())),
            BadInput("distances", lambda: LevelSetWidthProbe(distances=(0.0,))),
            BadInput("target", lambda: LevelSetWidthProbe()(MODEL, (X, Y, TARGET[:2]))),
            BadInput("data", lambda: LevelSetWidthProbe()(MODEL, (X + 1, Y, TARGET))),
        ),
    ),
]


# The projection.


def test_projection_is_orthogonal_idempotent_and_the_nearest_point():
    draws = generator("projection")
    step, slope = torch.randn(2, 5, 3, 4, 4, generator=draws)
    found = project_orthogonal(step, slope)
    for one, of, before in zip(found, slope, step, strict=True):
        assert abs((one * of).sum()) <= 1e-6 * one.norm() * of.norm()
        # What was taken away lies along the gradient: the projection is orthogonal, not just any.
        away = before - one
        torch.testing.assert_close(away * of.norm() ** 2, of * (away * of).sum(), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(project_orthogonal(found, slope), found, atol=1e-6, rtol=0)


def test_projection_of_what_is_zero_or_along_the_gradient():
    slope = torch.randn(4, 3, 5, generator=generator(1), dtype=torch.float64)
    assert torch.equal(project_orthogonal(torch.zeros_like(slope), slope), torch.zeros_like(slope))
    assert project_orthogonal(-3 * slope, slope).abs().max() < 1e-14
    assert torch.equal(project_orthogonal(slope, torch.zeros_like(slope)), slope)


@pytest.mark.parametrize("size", [1e-38, 1e-25, 1e30])
def test_projection_survives_gradients_of_any_size(size):
    step, slope = torch.randn(2, 3, 8, generator=generator(2))
    torch.testing.assert_close(
        project_orthogonal(step, slope * size), project_orthogonal(step, slope), atol=1e-5, rtol=0
    )


# Walks that are known.


class TwoClasses(nn.Module):
    """Logits (0, w·x + b): the level sets are hyperplanes."""

    def __init__(self, weight, bias):
        super().__init__()
        self.weight, self.bias = weight, bias

    def forward(self, x):
        score = x.flatten(1) @ self.weight + self.bias
        return torch.stack([torch.zeros_like(score), score], dim=1)


def affine():
    draws = generator("affine")
    weight = torch.randn(8, generator=draws, dtype=torch.float64)
    x = 0.5 + 0.1 * torch.rand(3, 2, 4, generator=draws, dtype=torch.float64)
    target = 0.5 + 0.1 * torch.rand(3, 2, 4, generator=draws, dtype=torch.float64)
    bias = 1.0 - (x.flatten(1) @ weight).min()
    return TwoClasses(weight, bias), x, torch.ones(3, dtype=torch.long), target


@pytest.mark.parametrize("score", ["confidence", "logit"])
@pytest.mark.parametrize("steps", [1, 7, 60])
def test_affine_model_is_walked_to_the_projection_of_the_target(score, steps):
    model, x, y, target = affine()
    eta = 0.1
    result = level_set_traversal(
        model, x, y, target, step_size=eta, num_steps=steps, parallel_eps=0, noise=0, score=score, log_every=1
    )
    unit = model.weight / model.weight.norm()
    along = ((target - x).flatten(1) @ unit)[:, None] * unit
    goal = target - along.view_as(target)  # the foot of the target on the source's hyperplane
    torch.testing.assert_close(result.adversarial - goal, (1 - eta) ** steps * (x - goal), atol=1e-12, rtol=0)
    assert (result.path - result.source_score).abs().max() < 1e-6
    assert result.accepted.tolist() == [steps] * 3
    assert result.success.all()


class OneEntry(nn.Module):
    def forward(self, x):
        score = torch.sin(3 * x.flatten(1)[:, 0]) * 4
        return torch.stack([torch.zeros_like(score), score], dim=1)


def test_what_the_model_ignores_becomes_the_target():
    x, target = torch.rand(2, 5, 2, 3, generator=generator(3), dtype=torch.float64)
    y = torch.ones(5, dtype=torch.long)
    result = level_set_traversal(OneEntry(), x, y, target, step_size=0.05, num_steps=40, parallel_eps=0, noise=0)
    end, before, goal = (one.flatten(1) for one in (result.adversarial, x, target))
    torch.testing.assert_close(end[:, 0], before[:, 0], atol=1e-12, rtol=0)
    torch.testing.assert_close(end[:, 1:] - goal[:, 1:], 0.95**40 * (before - goal)[:, 1:], atol=1e-12, rtol=0)


def test_target_equal_to_the_source_stays():
    result = walk(noise=0, parallel_eps=0, num_steps=20)
    stays = level_set_traversal(MODEL, X, Y, X, noise=0, parallel_eps=0, num_steps=20)
    assert torch.equal(stays.adversarial, X)
    assert not torch.equal(result.adversarial, X)


class Constant(nn.Module):
    def forward(self, x):
        return torch.tensor([1.0, 0.0, 0.0], dtype=x.dtype).repeat(len(x), 1) + 0 * x.flatten(1)[:, :1]


def test_constant_model_lets_everything_through():
    y = torch.zeros(4, dtype=torch.long)
    result = level_set_traversal(Constant(), X, y, TARGET, step_size=0.1, num_steps=30, noise=0)
    torch.testing.assert_close(result.adversarial, TARGET + 0.9**30 * (X - TARGET), atol=1e-5, rtol=0)
    assert result.adversarial.isfinite().all()
    assert result.same_class.all()


def test_correction_accumulates_and_is_clipped_entry_by_entry():
    # With the logit's constant slope −w and no way to go, only the correction moves the image: up the logit.
    weight = torch.tensor([0.5, -0.2, 3.0, 0.0], dtype=torch.float64)
    model, x = TwoClasses(weight, 2.0), torch.full((1, 1, 4), 0.5, dtype=torch.float64)
    found = level_set_traversal(
        model, x, torch.tensor([1]), x, parallel_eps=0.01, noise=0, num_steps=1, score="logit", log_every=1
    )
    first = torch.tensor([0.0025, -0.001, 0.01, 0.0], dtype=torch.float64)
    torch.testing.assert_close(found.adversarial.flatten() - 0.5, first, atol=1e-15, rtol=0)
    # The second step brings the target's pull back: η times what is orthogonal to w.
    twice = level_set_traversal(
        model, x, torch.tensor([1]), x, parallel_eps=0.01, noise=0, num_steps=2, score="logit", step_size=1e-12
    )
    second = first + torch.tensor([0.005, -0.002, 0.01, 0.0], dtype=torch.float64)
    torch.testing.assert_close(twice.adversarial.flatten() - 0.5, second, atol=1e-12, rtol=0)


# What is accepted.


class Sine(nn.Module):
    def forward(self, x):
        return torch.sin(x)


def curved():
    """A model whose level sets bend within a step, so that steps are refused."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 24), Sine(), nn.Linear(24, 3)).eval()
    with torch.no_grad():
        model[1].weight.mul_(8)
        model[3].weight.mul_(3)
        x = torch.rand(32, *IMAGE)
        y = model(x).argmax(-1)
        other = torch.stack([x[y != label][0] for label in y])
    return model, x, y, other


@pytest.mark.parametrize("delta", [0.05, 0.01])
def test_every_image_on_the_path_is_within_the_drop(delta):
    model, x, y, target = curved()
    result = level_set_traversal(
        model,
        x,
        y,
        target,
        step_size=0.2,
        num_steps=80,
        parallel_eps=1e-2,
        delta=delta,
        log_every=1,
        keep_images=True,
        generator=generator(0),
    )
    at = result.images.flatten(0, 1)
    scores = model(at).softmax(-1)[torch.arange(len(at)), y.repeat(81)].view(81, -1).detach()
    start = model(x).softmax(-1)[torch.arange(32), y].detach()
    assert (start - scores).max() < delta + 1e-6
    torch.testing.assert_close(result.path, scores)
    torch.testing.assert_close(result.source_score, start)
    assert torch.equal(result.images[-1], result.adversarial)
    assert torch.equal(result.final_score, result.path[-1])
    moved = (result.images[1:] != result.images[:-1]).flatten(2).any(2)
    assert torch.equal(moved.sum(0), result.accepted)
    # A refused step does not end the walk: some image moves on after it stood.
    stood = (~moved).cumsum(0) > 0
    assert (moved & stood).any()
    assert not moved.all()


def test_a_drop_of_one_accepts_everything():
    model, x, y, target = curved()
    saturated = nn.Sequential(model, ScaleBy(400.0))  # confidences of exactly 1 and 0 occur
    y = saturated(x).argmax(-1)
    result = level_set_traversal(saturated, x, y, target, step_size=0.3, num_steps=30, delta=1, parallel_eps=0)
    assert result.accepted.tolist() == [30] * 32
    assert (result.source_score - result.final_score).max() == 1


class ScaleBy(nn.Module):
    def __init__(self, factor):
        super().__init__()
        self.factor = factor

    def forward(self, x):
        return self.factor * x


def test_a_drop_of_zero_accepts_only_rises():
    model, x, y, target = curved()
    result = level_set_traversal(model, x, y, target, step_size=0.05, num_steps=60, delta=0, generator=generator(0))
    went = result.accepted > 0
    assert went.any()
    assert (result.final_score > result.source_score)[went].all()
    assert (result.final_score >= result.source_score).all()
    stayed = result.final_score == result.source_score
    assert torch.equal(result.adversarial[stayed], x[stayed])


def test_noise_that_leaves_the_level_set_is_dropped():
    model, x, y, _ = curved()
    result = level_set_traversal(
        model, x, y, x, noise=1.0, delta=0.02, num_steps=1, log_every=1, keep_images=True, generator=generator(0)
    )
    start = result.images[0]
    noisy = (start != x).flatten(1).any(1)
    assert not noisy.all()
    assert torch.equal(start[~noisy], x[~noisy])
    assert (result.source_score - result.path[0]).max() < 0.02


def test_noise_is_uniform_and_clipped():
    x = torch.full((50, *IMAGE), 0.5)
    x[25:] = 1.0
    y = torch.zeros(50, dtype=torch.long)
    result = level_set_traversal(Constant(), x, y, x, noise=0.2, num_steps=1, log_every=1, keep_images=True)
    change = result.images[0] - x
    assert change[:25].abs().max() <= 0.1 + 1e-6
    assert change[:25].min() < -0.098
    assert change[:25].max() > 0.098
    assert change[25:].max() == 0


# The published steps, in other words.


def published_steps(model, x, y, target, noise, step_size, delta, eps, steps):
    """One image at a time, with the derivative of the log-confidence by hand-built vectors, in NumPy's float64."""

    def confidence(image):
        return model(torch.from_numpy(image)[None]).softmax(-1)[0].detach().numpy()

    ends, kept = [], []
    for image, label, goal, add in zip(x.numpy(), y.tolist(), target.numpy(), noise.numpy(), strict=True):
        reference = confidence(image)[label]
        at, carried, taken = np.clip(image + add, 0, 1), 0.0, []
        for _ in range(steps):
            leaf = torch.from_numpy(at)[None].requires_grad_()
            nn.functional.nll_loss(model(leaf).log_softmax(-1), torch.tensor([label])).backward()
            slope = leaf.grad[0].numpy()
            wish = goal - at
            tangential = wish - slope * np.vdot(slope, wish) / np.vdot(slope, slope)
            carried = np.minimum(np.maximum(carried + slope * eps / 2, -eps), eps)
            tried = np.clip(at + step_size * tangential - carried, 0, 1)
            taken.append(bool(reference - confidence(tried)[label] < delta))
            at = tried if taken[-1] else at
        ends.append(at)
        kept.append(taken)
    return np.stack(ends), np.array(kept)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_ten_steps_as_published(dtype):
    model, x, y, target = curved()
    model, x, target = model.to(dtype), x.to(dtype), target.to(dtype)
    noise = 4 / 255 * (torch.rand(x.shape, generator=generator("noise"), dtype=dtype) - 0.5)
    found = level_set_traversal(
        model, x, y, target, step_size=0.1, num_steps=10, delta=0.02, parallel_eps=5e-3, generator=generator("noise")
    )
    ends, kept = published_steps(model, x, y, target, noise, 0.1, 0.02, 5e-3, 10)
    start = (x + noise).clamp(0, 1)
    drop = (model(x).softmax(-1) - model(start).softmax(-1))[torch.arange(32), y]
    same = drop < 0.02  # elsewhere the published code keeps a start that is outside already
    assert same.sum() > 16
    assert not kept[same.numpy()].all()
    torch.testing.assert_close(found.adversarial[same], torch.from_numpy(ends)[same], atol=1e-5, rtol=0)
    assert found.accepted[same].tolist() == kept.sum(1)[same.numpy()].tolist()


# Flags, hooks, records.


def test_misclassified_sources_and_targets_of_the_same_class_are_flagged():
    wrong = Y.clone()
    wrong[1] = (Y[1] + 1) % 3
    goals = TARGET.clone()
    goals[2] = X[2]
    result = level_set_traversal(MODEL, X, wrong, goals, num_steps=3)
    assert result.skipped.tolist() == [False, True, False, False]
    assert torch.equal(result.adversarial[1], X[1])
    assert not result.success[1]
    assert result.same_class[2]
    assert not result.same_class[0]
    assert result.accepted[1] == 0


def test_normalize_stands_before_the_model():
    shifted = nn.Sequential(ScaleBy(0.5), MODEL)
    plain = level_set_traversal(shifted, X, Y, TARGET, num_steps=5, noise=0)
    hooked = level_set_traversal(MODEL, X, Y, TARGET, num_steps=5, noise=0, normalize=lambda x: 0.5 * x)
    torch.testing.assert_close(plain.adversarial, hooked.adversarial)
    assert (plain.adversarial - walk(num_steps=5, noise=0).adversarial).abs().max() > 0
    outputs = torch.stack([TARGET, X.flip(0)])
    for probe, data in ((StarShapeProbe, TRIPLE), (TriangleProbe, (X, Y, outputs)), (LevelSetWidthProbe, TRIPLE)):
        with_hook = probe(normalize=lambda x: 0.5 * x)(MODEL, data)
        assert with_hook == probe()(shifted, data)
        assert with_hook != probe()(MODEL, data)


def test_records():
    result = walk(num_steps=25)
    assert result.steps == (0, 10, 20, 25)
    assert result.path.shape == (4, 4)
    assert result.images is None
    assert walk(num_steps=20).steps == (0, 10, 20)
    assert walk(num_steps=3, log_every=1, keep_images=True).images.shape == (4, *X.shape)


def test_longer_walks_begin_as_shorter_ones():
    short, long = (walk(num_steps=steps, log_every=1, keep_images=True, noise=0).images for steps in (4, 9))
    assert torch.equal(long[:5], short)


# The instruments.


def test_triangle_grid_and_its_vertices():
    outputs = torch.stack([TARGET, X.flip(0)])
    report = TriangleProbe()(MODEL, (X, Y, outputs))
    assert len(report.weights) == len(report.grid) == 66
    for corner, at in (((0.0, 0.0), X), ((1.0, 0.0), outputs[0]), ((0.0, 1.0), outputs[1])):
        values = MODEL(at).softmax(-1)[torch.arange(4), Y].detach()
        assert report.grid[report.weights.index(corner)] == pytest.approx(values.mean().item(), abs=1e-6)
    for row in report.fractions:
        assert list(row) == sorted(row)
    assert len(TriangleProbe(spacing=0.5)(MODEL, (X, Y, outputs)).weights) == 6


def test_triangle_of_one_point_shows_that_the_inequality_is_strict():
    report = TriangleProbe()(MODEL, (X, Y, torch.stack([X, X])))
    assert report.fractions == ((0.0, 1.0, 1.0, 1.0),) * 4
    assert report.edge_largest_drop == (0.0,) * 4


def test_directions_are_orthogonal_units():
    path = torch.randn(*IMAGE, generator=generator(4), dtype=torch.float64)
    found = LevelSetWidthProbe(num_vectors=512).directions(path, generator(5)).flatten(1)
    assert (found @ path.flatten()).abs().max() < 1e-6 * path.norm()
    torch.testing.assert_close(found.norm(dim=1), torch.ones(512).double(), atol=1e-6, rtol=0)
    # Uniform on the sphere of the other 11 dimensions: E[u uᵀ] = (I − p pᵀ)/11.
    unit = path.flatten() / path.norm()
    spread = (torch.eye(12).double() - torch.outer(unit, unit)) / 11
    assert (found.T @ found / 512 - spread).abs().max() < 5 / 11 / 512**0.5
    assert LevelSetWidthProbe(num_vectors=3).directions(torch.zeros(IMAGE), generator(5)).norm() > 1


def test_width_without_a_path_uses_all_directions():
    report = LevelSetWidthProbe(num_vectors=16)(Constant(), (X, torch.zeros(4, dtype=torch.long), X))
    assert report.low == report.high == ((report.centre[0],) * 4,) * 4


def test_distances_against_loops():
    first, second = torch.rand(2, 2, 2, 13, 14, generator=generator(6), dtype=torch.float64)
    report = image_distances(first, second, perceptual=lambda a, b: (a - b).abs().mean(dim=(1, 2, 3)))
    window = np.array([[math.exp(-(i * i + j * j) / 4.5) for j in range(-5, 6)] for i in range(-5, 6)])
    window /= window.sum()
    for pair in range(2):
        a, b = first[pair].numpy(), second[pair].numpy()
        values = []
        for channel in range(2):
            for row in range(3):
                for column in range(4):
                    p, q = (one[channel, row : row + 11, column : column + 11] for one in (a, b))
                    mp, mq = (window * p).sum(), (window * q).sum()
                    vp, vq = (window * (p - mp) ** 2).sum(), (window * (q - mq) ** 2).sum()
                    both = (window * (p - mp) * (q - mq)).sum()
                    top = (2 * mp * mq + 1e-4) * (2 * both + 9e-4)
                    values.append(top / ((mp**2 + mq**2 + 1e-4) * (vp + vq + 9e-4)))
        assert report.ssim[pair] == pytest.approx(np.mean(values), abs=1e-12)
        assert report.rmse[pair] == pytest.approx(np.linalg.norm(a - b) / math.sqrt(a.size), rel=1e-12)
        assert report.linf[pair] == np.abs(a - b).max()
        assert report.perceptual[pair] == pytest.approx(2 * np.abs(a - b).mean())
    assert image_distances(first, first).ssim == pytest.approx((1.0, 1.0))
    assert image_distances(X, TARGET).ssim == ()
    assert image_distances(X, TARGET).perceptual == ()
    report.plot()


def test_ten_steps_of_the_authors_code():
    """Images 8 to 15 at the end of their function's ten steps with ε = 5e-3, each as one number."""
    model, x, y, target = curved()
    found = level_set_traversal(
        model.double(),
        x.double(),
        y,
        target.double(),
        step_size=0.1,
        num_steps=10,
        delta=0.02,
        parallel_eps=5e-3,
        generator=generator("noise"),
    )
    numbers = (found.adversarial.flatten(1) * torch.cos(torch.arange(12.0)).double()).sum(1)[8:16]
    theirs = (
        0.05829504137279929,
        -1.0332070062140077,
        0.22898941506394596,
        0.3415463068199397,
        -0.18773382666634653,
        -0.03319595151773117,
        -0.23158879630271556,
        -0.8508538051662722,
    )
    assert numbers.tolist() == pytest.approx(theirs, abs=1e-5)
    assert found.accepted[8:16].min() < 10
