"""The search: tournaments, window and restarts by counting; anchors and rejection by hand-made networks."""

import math
import pickle
from collections import Counter

import pytest
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional

from provenn.nn import EvoNormSearch, NormActAnchor, NormActGraph, NormActRejection, NormActSpace
from provenn.nn._evonorm_graph_layer import NormActLayer
from provenn.nn._evonorm_search import undominated

SPACE = NormActSpace(nodes=6)
CONSTANT = NormActGraph((("neg", (1,)),))
EXPLODING = NormActGraph((("exp", (0,)), ("exp", (4,)), ("square", (5,)), ("exp", (6,))))
BN = NormActGraph.named("BN-ReLU")


def random_graphs(count, seed=0):
    draws = torch.Generator().manual_seed(seed)
    return [NormActGraph.random(SPACE, draws) for _ in range(count)]


def digits(n=300, m=200):
    x, y = load_digits(return_X_y=True)
    x, y = torch.from_numpy(x).float().reshape(-1, 1, 8, 8) / 8 - 1, torch.from_numpy(y)
    return {"x": x[:n], "y": y[:n], "x_validation": x[n : n + m], "y_validation": y[n : n + m]}


def anchor(architecture="resnet", **options):
    sizes = {"width": 8, "steps": 40, "batch_size": 32, "group_size": 4}
    return NormActAnchor(architecture, **{**digits(), **sizes, **options})


def distance(child, parent):
    return sum(a != b for a, b in zip(child.nodes, parent.nodes, strict=True))


def filled(scores, **options):
    """Return a search whose window holds graphs of these scores, and the graphs."""
    graphs = random_graphs(len(scores))
    search = EvoNormSearch(SPACE, **{"population": len(scores), "restart": 0.0, **options})
    search.tell(graphs, scores)
    return search, graphs


def parents(search, graphs, count=300):
    """Count of whom the proposals are children."""
    found = Counter()
    for child in search.ask(count):
        near = [index for index, graph in enumerate(graphs) if distance(child, graph) <= 1]
        assert len(near) == 1
        found[near[0]] += 1
    return found


SCORES = [(0.9, 0.1), (0.1, 0.9), (0.5, 0.5), (0.4, 0.4), (0.5, 0.1), (0.3, 0.05)]


def test_undominated_is_the_front_by_brute_force():
    draws = torch.Generator().manual_seed(0)
    for _ in range(20):
        values = torch.randint(4, (12, 3), generator=draws).double()  # with ties and repeats
        wanted = [
            not any(all(b >= a for a, b in zip(one, other, strict=True)) and other != one for other in values.tolist())
            for one in values.tolist()
        ]
        assert undominated(values).tolist() == wanted


def test_the_pareto_winner_is_drawn_uniformly_from_the_front():
    found = parents(*filled(SCORES, tournament=1.0))
    assert set(found) == {0, 1, 2}
    assert all(abs(count / 300 - 1 / 3) < 0.12 for count in found.values())  # over four deviations


def test_other_selections_take_the_best_mean_or_the_first_anchor():
    scores = [*SCORES, (0.45, 0.6)]
    assert set(parents(*filled(scores, tournament=1.0, selection="average"))) == {6}
    assert set(parents(*filled(scores, tournament=1.0, selection="single"))) == {0}


def test_a_tournament_holds_its_share_and_at_least_two():
    scores = [float(index) for index in range(10)]
    for share, size in ((0.05, 2), (0.3, 3), (1.0, 10)):
        found = parents(*filled(scores, tournament=share), count=400)
        wanted = math.comb(9, size - 1) / math.comb(10, size)  # the best candidate is in it
        assert abs(found[9] / 400 - wanted) < 0.1
        assert min(found) >= size - 1  # the worst that can win beats all others of a tournament


def test_the_oldest_die_however_good():
    search, graphs = filled([1.0, 0.5, 0.4, 0.3], tournament=1.0)
    assert set(parents(search, graphs)) == {0}
    late = random_graphs(5, seed=9)[4:]
    search.tell(late, [0.1])
    assert set(parents(search, [*graphs[1:], *late])) == {0}
    assert search.best.point == graphs[0]


def test_the_start_population_counts_only_the_accepted():
    search, graphs = EvoNormSearch(SPACE, population=4, restart=0.0), random_graphs(10)
    search.tell(graphs[:6], [math.nan, 0.5, math.inf, 0.4, -math.inf, 0.3])
    assert search.rejected == {"told": 3}
    assert all(min(distance(child, graph) for graph in graphs) > 1 for child in search.ask(40))
    search.tell(graphs[6:7], [0.2])
    assert all(min(distance(child, graphs[index]) for index in (1, 3, 5, 6)) <= 1 for child in search.ask(40))


def test_a_score_that_is_not_finite_rejects_the_whole_candidate():
    search = EvoNormSearch(SPACE)
    search.tell(random_graphs(2), [(0.9, math.nan), (0.1, 0.2)])
    assert len(search.history) == 1
    assert search.best.values == (0.1, 0.2)


@pytest.mark.parametrize(("restart", "low", "high"), [(1.0, 1.0, 1.0), (0.3, 0.2, 0.4)])
def test_restarts(restart, low, high):
    search, graphs = filled([1.0, 0.5, 0.4], restart=restart)
    fresh = [child for child in search.ask(300) if min(distance(child, graph) for graph in graphs) > 1]
    assert low <= len(fresh) / 300 <= high


def objective(graph):
    return (float(sum(op == "max" for op, _ in graph.nodes)), float(sum(op == "mul" for op, _ in graph.nodes)))


def steps(search, count):
    made = []
    for _ in range(count):
        made += search.ask(1)
        search.tell(made[-1:], [objective(made[-1])])
    return made


def test_same_seed_same_graphs_and_a_pickle_goes_on():
    first, second, other = (EvoNormSearch(SPACE, population=8, seed=seed) for seed in (5, 5, 6))
    start = steps(first, 20)
    assert start == steps(second, 20)
    assert start != steps(other, 20)
    copied = pickle.loads(pickle.dumps(first))
    assert steps(copied, 30) == steps(first, 30)
    assert copied.history == first.history


def test_anchors_travel_with_a_pickled_search():
    search = EvoNormSearch(SPACE, [anchor(steps=2)], rejection=None)
    assert pickle.loads(pickle.dumps(search)).evaluate(BN) == search.evaluate(BN)


def test_front_finalists_and_a_graph_told_twice():
    graphs = random_graphs(6)
    search = EvoNormSearch(SPACE)
    search.tell(graphs, SCORES)
    assert [one.point for one in search.front] == graphs[:3]
    swapped = NormActGraph((("add", (0, 3)), ("mul", (0, 4)))), NormActGraph((("add", (3, 0)), ("mul", (4, 0))))
    search.tell(list(swapped), [(0.6, 0.8), (0.5, 0.7)])
    best = search.finalists(3)
    assert [one.value for one in best] == pytest.approx([0.7, 0.5, 0.5])
    assert best[0].point == swapped[0]
    assert search.finalists(1)[0] == search.best
    assert EvoNormSearch(SPACE).front == []


def test_evolution_raises_both_objectives():
    search = EvoNormSearch(SPACE, population=20, tournament=0.25, seed=1)
    steps(search, 250)
    first, last = search.history[:20], search.history[-20:]
    for place in range(2):
        means = [sum(one.values[place] for one in part) / 20 for part in (first, last)]
        assert means[1] > means[0] + 0.5


# Anchors.


@pytest.mark.parametrize("architecture", ["resnet", "mobilenet", "efficientnet"])
def test_anchors_learn_and_repeat_themselves(architecture):
    one, state = anchor(architecture, momentum=0.3, steps=35), torch.random.get_rng_state()
    assert one.accuracy(BN) > 0.5
    assert one.accuracy(BN, 4) == one.accuracy(BN, 4)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert one.accuracy(CONSTANT, 10) < 0.25


def test_where_layers_stand_in_the_anchors():
    built = {name: anchor(name).build(BN) for name in ("resnet", "mobilenet", "efficientnet")}
    layers = {
        name: [(one.num_features, one.apply_act) for one in model.modules() if isinstance(one, NormActLayer)]
        for name, model in built.items()
    }
    assert layers["resnet"] == [(width, True) for width in (8, 8, 8, 16, 16, 32, 32)]
    assert layers["mobilenet"] == layers["efficientnet"]
    assert [wide for wide, act in layers["mobilenet"] if not act] == [8, 16, 32]  # linear bottlenecks
    assert [wide for wide, act in layers["mobilenet"] if act] == [8, 24, 24, 24, 24, 48, 48, 64]
    depthwise = [one for one in built["mobilenet"].modules() if isinstance(one, nn.Conv2d) and one.groups > 1]
    assert [one.groups for one in depthwise] == [24, 24, 48]
    x = digits()["x"][:2]
    assert all(model(x).shape == (2, 10) for model in built.values())


def test_squeeze_and_excitation_weighs_channels():
    block = anchor("efficientnet").build(BN)[2].branch[4]
    x = torch.rand(2, 24, 4, 4)
    inner = functional.silu(block.weigh[1](x.mean((2, 3), keepdim=True)))
    assert torch.allclose(block(x), x * torch.sigmoid(block.weigh[3](inner)), atol=1e-6)


def test_a_diverging_training_scores_zero():
    assert anchor().accuracy(EXPLODING) == 0.0


# Rejection.


def test_quality_turns_down_what_does_not_learn():
    learns, tests = NormActGraph.named("S1"), NormActRejection(quality_steps=12, stability_steps=1)
    assert tests.reason(CONSTANT, [anchor()]) == "quality"
    assert tests.reason(learns, [anchor()]) is None
    found = anchor().accuracy(learns, 12)
    assert found > 0.2
    assert NormActRejection(12, found, 0).reason(learns, [anchor()]) is None  # reached is enough
    assert NormActRejection(12, math.nextafter(found, 1), 0).reason(learns, [anchor()]) == "quality"
    assert NormActRejection(0, 1.0, 0).reason(CONSTANT, [anchor()]) is None


def test_quality_asks_every_anchor():
    split = anchor(y_validation=(digits()["y_validation"] + 1) % 10)  # where no answer is right
    assert NormActRejection(12, 0.2, 0).reason(NormActGraph.named("S1"), [anchor(), split]) == "quality"


def test_the_ascent_by_finite_differences():
    """A small step of rate r along d = ∂g/∂θ raises the norm g by r |d|², d taken coordinate by coordinate."""
    graph, wide = NormActGraph.named("S1"), {name: one.double() for name, one in digits().items() if name[0] == "x"}
    tiny = anchor(width=1, group_size=1, batch_size=8, **wide)
    model = tiny.build(graph)
    weights = [module.weight for module in model.modules() if isinstance(module, nn.Conv2d)]
    x, y = next(tiny.batches())

    def norm():
        gradients = torch.autograd.grad(functional.cross_entropy(model(x), y), weights)
        return math.sqrt(sum(gradient.square().sum().item() for gradient in gradients))

    first, slope, step = norm(), 0.0, 1e-6
    assert NormActRejection(stability_steps=1).worst_gradient_norm(graph, tiny) == pytest.approx(first, rel=1e-9)
    for weight in weights:
        entries = weight.detach().view(-1)
        for slot, before in enumerate(entries.tolist()):
            ends = []
            for sign in (1, -1):
                entries[slot] = before + sign * step
                ends.append(norm())
            entries[slot] = before
            slope += ((ends[0] - ends[1]) / (2 * step)) ** 2
    rate = 1e-9
    found = NormActRejection(stability_steps=2, stability_lr=rate).worst_gradient_norm(graph, tiny)
    assert (found - first) / rate == pytest.approx(slope, rel=0.02)


def test_stability_turns_down_what_explodes():
    tests = NormActRejection(quality_steps=0, stability_steps=3)
    assert tests.reason(EXPLODING, [anchor()]) == "stability"
    assert tests.worst_gradient_norm(EXPLODING, anchor()) == math.inf
    assert tests.reason(BN, [anchor()]) is None
    assert tests.reason(CONSTANT, [anchor()]) is None
    assert tests.worst_gradient_norm(CONSTANT, anchor()) == 0.0
    worst = tests.worst_gradient_norm(BN, anchor())
    limited = NormActRejection(0, 0.2, 3, max_gradient_norm=worst)
    assert limited.reason(BN, [anchor()]) is None  # the limit itself is allowed
    limited = NormActRejection(0, 0.2, 3, max_gradient_norm=math.nextafter(worst, 0))
    assert limited.reason(BN, [anchor()]) == "stability"


def test_the_papers_constants():
    tests = NormActRejection()
    assert (tests.quality_steps, tests.min_accuracy) == (100, 0.2)
    assert (tests.stability_steps, tests.stability_lr, tests.max_gradient_norm) == (100, 0.1, 1e8)
    assert EvoNormSearch(SPACE).rejection == tests
    assert EvoNormSearch(SPACE).tournament == 0.05
    assert NormActSpace().nodes == 10


def test_a_whole_search():
    anchors = [anchor(steps=4), anchor("mobilenet", steps=4)]
    search = EvoNormSearch(NormActSpace(nodes=8), anchors, population=2, rejection=NormActRejection(4, 0.12, 1))
    known = [BN, NormActGraph.named("S1")]
    scores = [search.evaluate(graph) for graph in known]
    assert scores[1] == tuple(one.accuracy(known[1]) for one in anchors)
    search.tell(known, scores)
    best = search.run(4)
    assert len(search.history) + search.rejected["told"] == 6
    assert search.rejected["quality"] + search.rejected["stability"] == search.rejected["told"] > 0
    assert best.value >= sum(scores[1]) / 2
    larger = [anchor(steps=6, width=16)]
    ranked = search.rerank(larger, count=2)
    assert [one.value for one in ranked] == sorted((one.value for one in ranked), reverse=True)
    assert {one.point for one in ranked} == {one.point for one in search.finalists(2)}
    assert all(one.values == (larger[0].accuracy(one.point),) for one in ranked)


def test_a_rejected_graph_scores_nan_on_every_anchor():
    anchors = [anchor(steps=2), anchor("mobilenet", steps=2)]
    search = EvoNormSearch(SPACE, anchors, rejection=NormActRejection(2, 1.0, 0))
    assert len(search.evaluate(BN)) == 2
    assert all(map(math.isnan, search.evaluate(BN)))
    assert search.rejected == {"quality": 2}
    everything = EvoNormSearch(SPACE, anchors, rejection=None)
    assert everything.evaluate(CONSTANT) == tuple(one.accuracy(CONSTANT) for one in anchors)


def test_proposals_are_drawn_whatever_the_default_device():
    scores = [(1.0, 0.0), (0.0, 1.0), (0.5, 0.5), (0.0, 0.0)]

    def found():
        search, graphs = filled(scores, selection="pareto", restart=0.5)
        return search.ask(20), [graphs.index(one.point) for one in search.front]

    expected = found()
    with torch.device("meta"):
        assert found() == expected
