"""pLSTM: scans against brute force and closed forms, the two modes, the layers and their suites."""

import itertools
import math

import networkx as nx
import numpy as np
import pytest
import torch

from provenn.contracts import BadInput, Form, FunctionCase, ModuleCase, SamplerCase, Symmetry
from provenn.contracts.cases_results import Expectation
from provenn.core.experiment.accounting import TensorMemory
from provenn.core.experiment.seeding import seeded
from provenn.nn import (
    PLSTM1d,
    PLSTM2d,
    PLSTMGraph,
    PLSTMVision,
    PreparedDAG,
    arrow_pointing,
    plstm_graph,
    plstm_scan_1d,
    plstm_scan_2d,
)
from provenn.nn._plstm_scan_2d import Block, merge


def uniform(*shape, seed=0, low=-1.0, high=1.0):
    generator = torch.Generator().manual_seed(seed)
    return low + (high - low) * torch.rand(shape, generator=generator, dtype=torch.float64)


def sequence(length, batch=2, heads=3, states=None):
    """Operands of the scan along a sequence; with state tracking J_T = 2, J_Q = 2, J_K = 3, J_V = 2, J_O = 2."""
    lead = (batch, length, heads)
    if states is None:
        shapes = [(*lead, 4), (*lead, 4), (*lead, 5), lead, lead, lead, lead]
    else:
        tails = [(4, 2), (4, 3), (5, 2), (2, 3, 2), (2, 2), (2, 2, 2), (2, 2, 3, 2)]
        shapes = [(*lead, *tail) for tail in tails]
    return [uniform(*shape, seed=i).requires_grad_() for i, shape in enumerate(shapes)]


def grid(x, y, batch=2, heads=2, states=None):
    """Operands of the scan over a grid, flat: q, k, v, two sources, four transitions, two marks, direct."""
    lead = (batch, x, y, heads)
    tails = [(3,), (3,), (4,)] + [()] * 9
    if states is not None:
        tails = [(3, 2), (3, 3), (4, 2)] + 2 * [(2, 3, 2)] + 4 * [(2, 2)] + 2 * [(2, 2, 2)] + [(2, 2, 3, 2)]
    return [uniform(*lead, *tail, seed=i).requires_grad_() for i, tail in enumerate(tails)]


def scan_grid(flat, **options):
    return plstm_scan_2d(*flat[:3], tuple(flat[3:5]), tuple(flat[5:9]), tuple(flat[9:11]), flat[11], **options)


def gradients(output, leaves):
    found = torch.autograd.grad((output * uniform(*output.shape, seed=99)).sum(), leaves, allow_unused=True)
    return [torch.zeros_like(leaf) if one is None else one for one, leaf in zip(found, leaves, strict=True)]


def loop_1d(q, k, v, s, t, m, d):
    """One step after the other, in the general form, without any library's recurrence."""
    batch, length, heads = q.shape[:3]
    state = torch.zeros(batch, heads, q.shape[3], v.shape[3], t.shape[-1], dtype=q.dtype)
    outputs = []
    for i in range(length):
        kv = torch.einsum("bhdk,bhvl->bhdvkl", k[:, i], v[:, i])
        heard = torch.einsum("bhdq,bhoqj,bhdvj->bhvo", q[:, i], m[:, i], state)
        outputs.append(heard + torch.einsum("bhdq,bhoqkl,bhdvkl->bhvo", q[:, i], d[:, i], kv))
        kept = torch.einsum("bhij,bhdvj->bhdvi", t[:, i], state)
        state = kept + torch.einsum("bhjkl,bhdvkl->bhdvj", s[:, i], kv)
    return torch.stack(outputs, 1)


def loop_2d(q, k, v, sr, sd, rl, ru, dl, du, ml, mu, d):
    """One cell after the other, with states in dictionaries; gates are numbers."""
    zero = torch.zeros(*q.shape[:1], *q.shape[3:], v.shape[-1], dtype=q.dtype)
    right, down, rows = {}, {}, []
    for i in range(q.shape[1]):
        row = []
        for j in range(q.shape[2]):
            at = (slice(None), i, j)
            left, up = right.get((i - 1, j), zero), down.get((i, j - 1), zero)
            kv = k[at][..., :, None] * v[at][..., None, :]

            def g(gate, at=at):
                return gate[at][..., None, None]

            right[i, j] = g(rl) * left + g(ru) * up + g(sr) * kv
            down[i, j] = g(dl) * left + g(du) * up + g(sd) * kv
            read = g(ml) * left + g(mu) * up + g(d) * kv
            row.append((q[at][..., None] * read).sum(-2))
        rows.append(torch.stack(row, 1))
    return torch.stack(rows, 1)


LENGTHS = tuple(range(1, 10))


@pytest.mark.parametrize("method", ["recurrent", "parallel"])
@pytest.mark.parametrize("states", [None, 2])
def test_sequence_equals_a_loop(method, states):
    for length in LENGTHS:
        operands = sequence(length, states=states)
        as_matrices = operands if states else [
            one[(...,) + (None,) * extra] for one, extra in zip(operands, (1, 1, 1, 3, 2, 3, 4), strict=True)
        ]  # fmt: skip
        wanted = loop_1d(*as_matrices)
        wanted = wanted if states else wanted[..., 0]
        expected = gradients(wanted, operands)
        for levels in (0, 1, 6):
            found = plstm_scan_1d(*operands, method=method, levels=levels)
            torch.testing.assert_close(found, wanted, rtol=0, atol=1e-12)
            torch.testing.assert_close(gradients(found, operands), expected, rtol=0, atol=1e-11)


def test_the_parallel_forms_hold_no_state_of_every_step():
    """A state has 16 × 16 numbers; of a chunk of 8 steps, or a block's border of 8 cells, one or 16 are held."""
    along = [uniform(1, 256, 1, *tail, seed=i) for i, tail in enumerate([(16,)] * 3 + [()] * 4)]
    across = [uniform(1, 16, 16, 1, *tail, seed=i) for i, tail in enumerate([(16,)] * 3 + [()] * 9)]
    for scan in (lambda **way: plstm_scan_1d(*along, **way), lambda **way: scan_grid(across, **way)):
        peaks = []
        for way in ({"method": "recurrent"}, {"levels": 3}):
            with torch.no_grad(), TensorMemory() as memory:
                scan(**way)
            peaks.append(memory.peak)
        assert peaks[1] < peaks[0] / 2


@pytest.mark.parametrize("x", LENGTHS)
def test_grid_equals_a_loop(x):
    for y in LENGTHS:
        operands = grid(x, y, batch=1)
        wanted = loop_2d(*operands)
        expected = gradients(wanted, operands)
        for options in ({"method": "recurrent"}, {}, {"levels": (x + y) % 3}):
            found = scan_grid(operands, **options)
            torch.testing.assert_close(found, wanted, rtol=0, atol=1e-10)
            torch.testing.assert_close(gradients(found, operands), expected, rtol=0, atol=1e-9)


def test_grid_with_state_tracking_sums_paths_of_matrices():
    """Of a 3 × 2 grid: the coefficient of each pair of cells, path by path, with matrices in their order."""
    operands = [one.detach() for one in grid(3, 2, batch=1, heads=1, states=2)]
    q, k, v, sr, sd, rl, ru, dl, du, ml, mu, direct = (one[0, :, :, 0] for one in operands)
    moves = {("r", "r"): rl, ("d", "r"): ru, ("r", "d"): dl, ("d", "d"): du}  # (in, out)
    wanted = torch.zeros(3, 2, 4, 2, dtype=torch.float64)
    for here in np.ndindex(3, 2):
        total = torch.einsum("dq,oqkl,dk,vl->vo", q[here], direct[here], k[here], v[here])
        for there in np.ndindex(3, 2):
            for steps in walks(there, here):
                passed = (sr if steps[0] == "r" else sd)[there].flatten(1)
                cell = there
                for before, after in itertools.pairwise(steps):
                    cell = ahead(cell, before)
                    passed = moves[before, after][cell] @ passed
                gate = (ml if steps[-1] == "r" else mu)[here] @ passed  # (O, Q, K·V)
                total = total + torch.einsum(
                    "dq,oqkl,dk,vl->vo", q[here], gate.unflatten(-1, (3, 2)), k[there], v[there]
                )
        wanted[here] = total
    for levels in (0, 1, 2):
        for method in ("recurrent", "parallel"):
            found = scan_grid(operands, levels=levels, method=method)[0, :, :, 0]
            torch.testing.assert_close(found, wanted, rtol=0, atol=1e-12)


def ahead(cell, step):
    return (cell[0] + 1, cell[1]) if step == "r" else (cell[0], cell[1] + 1)


def walks(start, end):
    """All ways of steps right and down from one cell to another."""
    if start[0] > end[0] or start[1] > end[1] or start == end:
        return []
    found = []
    for step in "rd":
        after = ahead(start, step)
        found += [step] if after == end else [step + rest for rest in walks(after, end)]
    return found


def test_merged_block_has_the_corner_terms_of_the_paper():
    t = {name: uniform(2, 2, seed=i) for i, name in enumerate(("rl", "ru", "dl", "du"))}
    cells = [one[None, :, :, None, None] for one in (t["rl"], t["ru"], t["rl"], t["dl"], t["du"], *(4 * [t["du"]]))]
    found = merge(Block(*cells), 1, 1).rl[0, 0, 0]
    rl, ru, dl = t["rl"], t["ru"], t["dl"]
    assert found[0, 0] == pytest.approx((rl[1, 0] * rl[0, 0]).item())
    assert found[1, 1] == pytest.approx((rl[1, 1] * rl[0, 1]).item())
    assert found[0, 1] == 0
    corner = ru[1, 1] * dl[1, 0] * rl[0, 0] + rl[1, 1] * ru[0, 1] * dl[0, 0]
    assert found[1, 0] == pytest.approx(corner.item())


def grid_dag(x, y):
    """The grid as a graph, with edges named by (cell, direction)."""
    edges, names = [], {}
    for i in range(x):
        for j in range(y):
            for direction in "rd":
                end = ahead((i, j), direction)
                if end[0] < x and end[1] < y:
                    names[i, j, direction] = len(edges)
                    edges.append((i * y + j, end[0] * y + end[1]))
    return PreparedDAG(torch.tensor(edges).reshape(-1, 2).T, x * y), names


@pytest.mark.parametrize("shape", [(1, 4), (3, 5), (7, 2)])
def test_grid_equals_its_graph(shape):
    x, y = shape
    operands = grid(x, y)
    q, k, v, sr, sd, rl, ru, dl, du, ml, mu, d = operands
    dag, names = grid_dag(x, y)
    cell_of = {edge: name for name, edge in names.items()}
    moves = {("r", "r"): rl, ("d", "r"): ru, ("r", "d"): dl, ("d", "d"): du}
    edges = [cell_of[e] for e in range(dag.edges)]
    source = torch.stack([(sr if w == "r" else sd)[:, i, j] for i, j, w in edges], 1)
    mark = torch.stack([(ml if w == "r" else mu)[(slice(None), *ahead((i, j), w))] for i, j, w in edges], 1)
    pairs = [(cell_of[a], cell_of[b]) for a, b in dag.pairs.T.tolist()]
    transition = torch.stack([moves[a[2], b[2]][:, b[0], b[1]] for a, b in pairs] or [sr[:, 0, 0]], 1)[:, : len(pairs)]
    flat = [one.flatten(1, 2) for one in (q, k, v)]
    expected = scan_grid(operands)
    wanted = gradients(expected, operands)
    for method in ("recurrent", "parallel"):
        found = plstm_graph(*flat, source, transition, mark, d.flatten(1, 2), dag, method=method)
        found = found.unflatten(1, (x, y))
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
        torch.testing.assert_close(gradients(found, operands), wanted, rtol=0, atol=1e-11)


def random_dag(nodes, share, seed):
    generator = np.random.default_rng(seed)
    order = generator.permutation(nodes)
    chosen = [
        (int(order[i]), int(order[j])) for i in range(nodes) for j in range(i + 1, nodes) if generator.random() < share
    ]
    return torch.tensor(chosen).T


@pytest.mark.parametrize("method", ["recurrent", "parallel"])
@pytest.mark.parametrize("seed", range(3))
def test_coefficients_sum_over_paths(method, seed):
    edge_index = random_dag(12, 0.35, seed)
    dag = PreparedDAG(edge_index, 12)
    source, mark = (uniform(1, dag.edges, 1, seed=s) for s in (1, 2))
    transition, direct = uniform(1, dag.pairs.shape[1], 1, seed=3), uniform(1, 12, 1, seed=4)
    graph = nx.DiGraph(edge_index.T.tolist())
    graph.add_nodes_from(range(12))
    number = {edge: i for i, edge in enumerate(map(tuple, edge_index.T.tolist()))}
    gate = {pair: transition[0, i, 0].item() for i, pair in enumerate(map(tuple, dag.pairs.T.tolist()))}
    wanted = torch.zeros(12, 12, dtype=torch.float64)
    for m in range(12):
        wanted[m, m] = direct[0, m, 0]
        for n in range(12):
            for path in nx.all_simple_edge_paths(graph, m, n) if m != n else ():
                passed = [number[edge] for edge in path]
                product = source[0, passed[0], 0].item() * mark[0, passed[-1], 0].item()
                for pair in itertools.pairwise(passed):
                    product *= gate[pair]
                wanted[n, m] += product
    # Unit values tell the nodes apart; q = k = 1.
    one, value = torch.ones(1, 12, 1, 1, dtype=torch.float64), torch.eye(12, dtype=torch.float64)[None, :, None]
    found = plstm_graph(one, one, value, source, transition, mark, direct, dag, method=method)[0, :, 0]
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-12)


def mass(x, y, angle, method):
    """What enters each cell from a unit source at the origin in P-mode, τ = 1: with all marks 1 it is read out."""
    whole = torch.ones(1, x, y, 1, dtype=torch.float64)
    only = torch.zeros_like(whole)
    only[0, 0, 0] = 1
    a = angle * whole
    one = whole[..., None]
    split = (angle * only, (1 - angle) * only)
    return plstm_scan_2d(one, one, one, split, (a, a, 1 - a, 1 - a), (whole, whole), only, method=method)[0, :, :, 0, 0]


@pytest.mark.parametrize("method", ["recurrent", "parallel"])
def test_propagation_is_binomial_and_conserved(method):
    found = mass(7, 6, 0.3, method)
    for i in range(7):
        for j in range(6):
            assert found[i, j].item() == pytest.approx(math.comb(i + j, i) * 0.3**i * 0.7**j, abs=1e-12)
    for diagonal in range(6):  # those that the grid's edges do not cut
        total = sum(found[i, diagonal - i] for i in range(diagonal + 1))
        assert total.item() == pytest.approx(1, abs=1e-12)


def layer_2d(*arguments, seed=0, **options):
    with seeded(seed):
        return PLSTM2d(*arguments, **options).double()


def shaken(module, seed=0):
    """Give every parameter of a module other values."""
    for place, parameter in enumerate(module.parameters()):
        parameter.data = parameter.data + uniform(*parameter.shape, seed=seed + place)
    return module


def test_propagation_gates_of_the_layer():
    layer = layer_2d(8, 4, "P", orientations=2)
    x = uniform(1, 3, 3, 8)
    source, transition, mark = layer.gates(x)
    rl, ru, dl, du = transition
    starts = torch.sigmoid(torch.linspace(-2, 2, 4, dtype=torch.float64)) * math.tanh(5)
    torch.testing.assert_close(rl[..., 0, 0], starts.expand(1, 3, 3, 2, 4))
    shut = 1 / (1 + math.exp(5))
    angle = torch.sigmoid(torch.linspace(-2, 2, 4, dtype=torch.float64))
    torch.testing.assert_close(source[0].flatten(4), (shut * angle)[:, None].expand(1, 3, 3, 2, 4, 1).flatten(4))
    assert mark[0].eq(mark[1]).all()
    shaken(layer)
    source, (rl, ru, dl, du), _ = layer.gates(x)
    assert torch.equal(rl, ru)
    assert torch.equal(dl, du)
    torch.testing.assert_close(rl + dl, torch.ones_like(rl))
    torch.testing.assert_close(source[0] + source[1], torch.ones_like(source[0]))
    assert rl.std() > 0.05
    scaled = torch.einsum("ohd,bxyd->bxyoh", layer.angle.weight, x) / (2 * 8) + layer.angle.bias
    tau = torch.tanh(5 * torch.einsum("ohjd,bxyd->bxyohj", layer.transition[0].eigenvalues.weight, x)
                     + 5 * layer.transition[0].eigenvalues.bias)  # fmt: skip
    torch.testing.assert_close(rl[..., 0], torch.sigmoid(scaled)[..., None] * tau)


@pytest.mark.parametrize("chirality", ["L", "R"])
def test_diffusion_joins_cells_by_one_path(chirality):
    """With all gates at 1, coefficients count paths."""
    layer = layer_2d(4, 1, "D", chirality, 1, convolution=0)
    _, transition, _ = layer.gates(uniform(1, 4, 5, 4))
    counted = tuple((one[..., 0, 0, 0] != 0).double() for one in transition)
    assert [int(one.all()) for one in counted] == ([1, 1, 0, 1] if chirality == "L" else [1, 0, 1, 1])
    one = torch.ones(1, 4, 5, 1, dtype=torch.float64)
    value = torch.eye(20, dtype=torch.float64).reshape(1, 4, 5, 1, 20)
    for method in ("recurrent", "parallel"):
        count = plstm_scan_2d(
            one[..., None], one[..., None], value, (one, one), counted, (one, one), one, method=method
        )
        count = count.reshape(4, 5, 4, 5)
        for i, j, m, n in np.ndindex(4, 5, 4, 5):
            assert count[i, j, m, n] == (m <= i and n <= j)


def test_diffusion_coefficients_are_at_most_one():
    layer = shaken(layer_2d(4, 1, "D", "L", 1, convolution=0))
    for seed in range(5):
        source, transition, mark = layer.gates(10 * uniform(1, 6, 6, 4, seed=seed))
        one = torch.ones(1, 6, 6, 1, 1, dtype=torch.float64)
        value = torch.eye(36, dtype=torch.float64).reshape(1, 6, 6, 1, 36)
        plain = [tuple(g.flatten(3)[..., :1] for g in group) for group in (source, transition, mark)]
        found = plstm_scan_2d(one, one, value, *plain, torch.zeros_like(one[..., 0]))
        assert 0 < found.abs().max() <= 1


@pytest.mark.parametrize("seed", range(4))
def test_pruned_line_graph_is_a_multitree(seed):
    dag = PreparedDAG(random_dag(9, 0.7, seed), 9)
    kept = nx.DiGraph(dag.pairs.T[dag.multitree].tolist())
    kept.add_nodes_from(range(dag.edges))
    whole = nx.DiGraph(dag.pairs.T.tolist())
    for a in kept.nodes:
        for b in kept.nodes:
            assert a == b or len(list(nx.all_simple_paths(kept, a, b))) <= 1
    dropped = dag.pairs.T[~dag.multitree].tolist()
    assert dropped
    for a, b in dropped:  # greedy, but nothing is dropped for nothing
        more = kept.copy()
        more.add_edge(a, b)
        assert any(len(list(nx.all_simple_paths(more, u, b))) > 1 for u in (*nx.ancestors(kept, a), a))
    assert set(nx.descendants(kept, 0)) <= set(nx.descendants(whole, 0)) if 0 in whole else True


def test_line_graph_agrees_with_networkx():
    edge_index = random_dag(8, 0.4, 5)
    dag = PreparedDAG(edge_index)
    edges = list(map(tuple, edge_index.T.tolist()))
    wanted = {(edges.index(a), edges.index(b)) for a, b in nx.line_graph(nx.DiGraph(edges)).edges}
    assert set(map(tuple, dag.pairs.T.tolist())) == wanted
    degrees = nx.DiGraph(edges)
    assert dag.max_degree == max(max(d for _, d in degrees.in_degree), max(d for _, d in degrees.out_degree))
    for name, of in ((dag.in_slots, 1), (dag.out_slots, 0)):
        taken = [(edge[of], slot) for edge, slot in zip(edges, name.tolist(), strict=True)]
        assert len(set(taken)) == len(edges)


def graph_layer(mode, **options):
    with seeded(0):
        return shaken(PLSTMGraph(8, 2, mode, 6, **options).double())


def test_graph_propagation_is_normalised_over_the_edges_out():
    dag = PreparedDAG(random_dag(9, 0.4, 1), 9)
    layer = graph_layer("P")
    x = uniform(2, 9, 8)
    _, transition, _ = layer.gates(x, dag, 0)
    raw = layer.transition[0](x)
    for place, (a, b) in enumerate(dag.pairs.T.tolist()):
        node = dag.edge_index[1, a]
        out = torch.nonzero(dag.edge_index[0] == node).flatten()
        rows = raw[:, node, :, dag.in_slots[a]]
        total = 0.5 + rows[..., dag.out_slots[out]].abs().sum(-1)
        torch.testing.assert_close(transition[:, place], rows[..., dag.out_slots[b]] / total)


def test_graph_diffusion_keeps_one_path_between_edges():
    dag = PreparedDAG(random_dag(7, 0.5, 2), 7)
    _, transition, _ = graph_layer("D").gates(uniform(1, 7, 8), dag, 0)
    assert (transition[0, :, 0] != 0).equal(dag.multitree)
    one_path = torch.zeros(dag.edges, dag.edges, dtype=torch.float64)
    one_path[dag.pairs[1], dag.pairs[0]] = transition[0, :, 0]
    sums = torch.linalg.inv(torch.eye(dag.edges, dtype=torch.float64) - one_path)
    assert sums.abs().max() <= 1 + 1e-12


def test_graphs_side_by_side_do_not_meet():
    first, second = random_dag(5, 0.6, 0), random_dag(6, 0.6, 1)
    both = PreparedDAG(torch.cat((first, second + 5), 1), 11)
    layer = graph_layer("P", bidirectional=True)
    x = uniform(1, 11, 8)
    apart = torch.cat((layer(x[:, :5], PreparedDAG(first, 5)), layer(x[:, 5:], PreparedDAG(second, 6))), 1)
    torch.testing.assert_close(layer(x, both), apart)


def test_reversed_graph_carries_what_the_graph_does_not():
    dag = PreparedDAG(torch.tensor([[0, 1], [1, 2]]))
    for bidirectional in (False, True):
        layer = graph_layer("P", bidirectional=bidirectional)
        x = uniform(1, 3, 8).requires_grad_()
        (moved,) = torch.autograd.grad(layer(x, dag)[0, 0].sum(), x)
        assert bool(moved[0, 2].abs().max() > 0) is bidirectional


def test_gated_linear_attention():
    """s = 1 − f, and μ = δ = 1: h_t = q_tᵀ(k_t v_tᵀ + Σ_{m<t} f_{m+1} … f_{t−1} (1 − f_m) k_m v_mᵀ)."""
    q, k, v, f = (one.detach() for one in sequence(8)[:4])
    f = torch.sigmoid(f)
    one = torch.ones_like(f)
    found = plstm_scan_1d(q, k, v, 1 - f, f, one, one, levels=2)
    state, wanted = torch.zeros(2, 3, 4, 5, dtype=torch.float64), []
    for t in range(8):
        now = k[:, t, :, :, None] * v[:, t, :, None]
        wanted.append(((state + now) * q[:, t, ..., None]).sum(-2))
        state = f[:, t, :, None, None] * state + (1 - f)[:, t, :, None, None] * now
    torch.testing.assert_close(found, torch.stack(wanted, 1))
    scores = torch.einsum("bthd,bmhd->bhtm", q, k).tril()
    attention = torch.einsum("bhtm,bmhv->bthv", scores, v)
    torch.testing.assert_close(plstm_scan_1d(q, k, v, one, one, one, one), attention)


@pytest.mark.parametrize("states", [1, 2])
def test_layer_on_sequences_is_its_formula(states):
    """Convolution, gates, scan, norm of each head, projection and passthrough, written out."""
    with seeded(0):
        layer = shaken(PLSTM1d(8, 2, states=states).double())
    x = uniform(2, 6, 8)
    p, conv = layer.projections, layer.convolution
    padded = torch.cat((torch.zeros(2, 3, 8, dtype=torch.float64), x), 1)
    seen = torch.stack([(padded[:, t : t + 4] * conv.weight[:, 0].T).sum(1) + conv.bias for t in range(6)], 1)
    q, k = ((seen @ one.weight.T + one.bias).reshape(2, 6, 2, 4, 1) for one in (p.query, p.key))
    v = (x @ p.value.weight.T + p.value.bias).reshape(2, 6, 2, 4 // states, states)
    gates = [
        torch.einsum("...f,btf->bt...", one.weight, seen) + one.bias for one in (layer.source, layer.mark, layer.direct)
    ]
    source, mark, direct = map(torch.sigmoid, gates)
    eigenvalues = layer.transition.eigenvalues
    values = torch.tanh(5 * (torch.einsum("hjf,btf->bthj", eigenvalues.weight, seen) + eigenvalues.bias))
    transition = torch.diag_embed(values)
    if states > 1:
        turned = []
        for gate in (layer.transition.out_of, layer.transition.into):
            free = torch.einsum("hijf,btf->bthij", gate.weight, seen) + gate.bias
            turned.append(torch.linalg.matrix_exp(free - free.mT))
            torch.testing.assert_close(turned[-1] @ turned[-1].mT, torch.eye(2, dtype=x.dtype).expand_as(free))
        transition = turned[0] @ transition @ turned[1]
    heard = loop_1d(q / 2, k, v, source, transition, mark, direct).flatten(-2)
    normed = heard / (heard.square().mean(-1, keepdim=True) + 1e-5).sqrt() * p.norm_weight
    wanted = normed.flatten(-2) @ p.out.weight.T + p.passthrough * x
    torch.testing.assert_close(layer(x), wanted)


FLIPPED = {0: (), 1: (1,), 2: (2,), 3: (1, 2)}


@pytest.mark.parametrize("mode", ["P", "D"])
@pytest.mark.parametrize("flip", [1, 2, 3])
def test_flipping_image_and_orientations_flips_the_output(mode, flip):
    """Orientation o runs against the axes in the bits of o: flipping the image exchanges o and o xor flip."""
    layer = shaken(layer_2d(8, 2, mode))
    other = layer_2d(8, 2, mode)
    other.load_state_dict(layer.state_dict())
    for name, parameter in other.named_parameters():
        if name.split(".")[0] in ("angle", "source", "mark", "transition"):
            parameter.data = parameter.data[[o ^ flip for o in range(4)]]
    other.convolution.weight.data = other.convolution.weight.data.flip([axis + 1 for axis in FLIPPED[flip]])
    x = uniform(2, 3, 5, 8)
    torch.testing.assert_close(other(x.flip(FLIPPED[flip])), layer(x).flip(FLIPPED[flip]))
    assert (layer(x.flip(FLIPPED[flip])) - layer(x).flip(FLIPPED[flip])).abs().max() > 1e-3


def test_every_cell_hears_every_other():
    for mode in "PD":
        layer = shaken(layer_2d(8, 2, mode, convolution=0))
        x = uniform(1, 4, 3, 8).requires_grad_()
        for i, j in ((0, 0), (0, 2), (3, 0), (3, 2), (1, 1)):
            (moved,) = torch.autograd.grad(layer(x)[0, i, j].sum(), x)
            assert (moved.abs().amax(-1) > 0).all()
    one_way = shaken(layer_2d(8, 2, "P", orientations=1, convolution=0))
    (moved,) = torch.autograd.grad(one_way(x)[0, 1, 1].sum(), x)
    assert torch.nonzero(moved[0].abs().amax(-1)).tolist() == [[0, 0], [0, 1], [1, 0], [1, 1]]


def test_orientations_two_differ_from_one_by_the_first_axis():
    layer = shaken(layer_2d(8, 2, "D", orientations=2, convolution=0))
    x = uniform(1, 3, 3, 8).requires_grad_()
    (moved,) = torch.autograd.grad(layer(x)[0, 1, 1].sum(), x)
    assert torch.nonzero(moved[0].abs().amax(-1))[:, 1].max() == 1
    assert (moved[0, :, 1].abs().amax(-1) > 0).all()


def test_constant_gates_ignore_the_features():
    layer = shaken(layer_2d(8, 2, "P", constant_gates=True))
    assert not [name for name, _ in layer.named_parameters() if name.endswith("angle.weight")]
    for gates in layer.gates(uniform(1, 4, 4, 8)):
        for gate in gates:
            assert torch.equal(gate, gate[:, :1, :1].expand_as(gate))
    with seeded(0):
        free, constant = PLSTM2d(8, 2, mode="D"), PLSTM2d(8, 2, mode="D", constant_gates=True)
    fewer = sum(p.numel() for p in free.parameters()) - sum(p.numel() for p in constant.parameters())
    assert fewer == 8 * (7 * 4 * 2 + 2)  # 2 sources, 3 transitions and 2 marks a head and orientation; direct a head


def test_vision_alternates_modes_and_pools_corners():
    with seeded(0):
        model = PLSTMVision(3, 8, 3, 2, channels=2, patch=2, grid=(2, 2)).double()
    assert [block.mixer.mode for block in model.blocks] == ["P", "D", "P"]
    model.norm.register_forward_hook(lambda module, inputs, output: found.append(output))
    for side in (4, 8):
        found = []
        x = uniform(2, side, side, 2)
        corners = model(x)
        last = side // 2 - 1
        taken = torch.cat([found[0][:, i, j] for i in (0, last) for j in (0, last)], -1)
        order = [0, 2, 1, 3]  # the head sees (0, 0), (last, 0), (0, last), (last, last)
        taken = taken.unflatten(-1, (4, 8))[:, order].flatten(1)
        torch.testing.assert_close(corners, taken @ model.head.weight.T + model.head.bias)
    with seeded(0):
        mean = PLSTMVision(3, 8, 1, 2, channels=2, patch=2, pooling="mean").double()
    assert mean.head.in_features == 8
    assert mean(uniform(2, 4, 6, 2)).shape == (2, 3)


def test_position_embedding_is_added_where_asked():
    with seeded(0):
        model = PLSTMVision(2, 8, 1, 2, channels=1, patch=2, grid=(2, 2)).double()
    x = uniform(1, 4, 4, 1)
    before = model(x)
    model.position.data[0, :, 1, 0] += 1
    assert (model(x) - before).abs().max() > 1e-9


def test_autocast_runs_forward_and_backward():
    with seeded(0):
        modules = [(PLSTM1d(8), (2, 5, 8)), (PLSTM1d(8, 2, states=2), (2, 5, 8)), (PLSTM2d(8, 2), (2, 3, 3, 8)),
                   (PLSTM2d(8, 2, "D", method="recurrent"), (2, 3, 3, 8))]  # fmt: skip
    for module, shape in modules:
        x = uniform(*shape).float()
        with torch.autocast("cpu", torch.bfloat16):
            found = module(x)
        found.float().sum().backward()
        assert (found.float() - module(x)).abs().max() < 0.1


def test_arrow_images_are_drawn_where_the_generator_is():
    expected = arrow_pointing(5, 32, torch.Generator().manual_seed(0))
    with torch.device("meta"):  # the default device, where what is made without one would be, without values
        found = arrow_pointing(5, 32, torch.Generator().manual_seed(0))
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


def test_arrow_images_say_what_their_labels_say():
    """Read arrow and circle back from pixels: the circle is what is left when the arrow's strokes are cut away."""
    images, labels = arrow_pointing(64, 64, torch.Generator().manual_seed(0), length=16)
    assert images.shape == (64, 64, 64, 1)
    assert 0 < images.min().item() + 1 <= 1
    assert images.max() <= 1
    from scipy import ndimage

    right = 0
    for image, label in zip(images[..., 0].numpy(), labels.tolist(), strict=True):
        parts, count = ndimage.label(image > 0.3, np.ones((3, 3)))
        if count != 2:  # they touch
            right += 1
            continue
        clouds = [np.argwhere(parts == i + 1) + 0.5 for i in range(2)]
        hollow = [np.linalg.norm(cloud - cloud.mean(0), axis=1).min() for cloud in clouds]
        circle, arrow = clouds[int(np.argmax(hollow))], clouds[int(np.argmin(hollow))]
        middle = (arrow.min(0) + arrow.max(0)) / 2
        axis = np.linalg.svd(arrow - arrow.mean(0))[2][0]
        heavy = ((arrow - middle) @ axis).mean()  # the head is the heavier end
        direction = axis * np.sign(heavy)
        towards = circle.mean(0) - middle
        turn = math.acos(np.clip(direction @ towards / np.linalg.norm(towards), -1, 1))
        right += int((turn < math.pi / 8 + 0.1) if label else (turn > math.pi / 8 - 0.15))
    assert right >= 62


def test_cyclic_graph_names_a_cycle():
    with pytest.raises(ValueError, match=r"edge_index.*cycle.*(1 → 2 → 3 → 1|2 → 3 → 1 → 2|3 → 1 → 2 → 3)"):
        PreparedDAG(torch.tensor([[0, 1, 2, 3], [1, 2, 3, 1]]))


# The suites.


def with_method(method):
    def evaluate(module, inputs):
        usual = {one: one.method for one in module.modules() if hasattr(one, "method")}
        for one in usual:
            one.method = method
        try:
            with seeded(0):
                return module(*inputs)
        finally:
            for one, before in usual.items():
                one.method = before

    return Form(method, evaluate)


def flip_symmetry(name, axes):
    return Symmetry(
        f"flip of the {name}: fresh orientations are alike",
        before=lambda inputs: tuple(x.flip(axes) for x in inputs),
        after=lambda output: output.flip(axes),
    )


FLIP_SYMMETRIES = (
    flip_symmetry("first axis", (1,)),
    flip_symmetry("second axis", (2,)),
    flip_symmetry("image", (1, 2)),
)


def drawn(*shape):
    def inputs(generator, dtype, batch):
        return (torch.randn(batch, *shape, generator=generator, dtype=torch.float64).to(dtype),)

    return inputs


CHAIN = PreparedDAG(torch.tensor([[0, 0, 1, 1, 2], [1, 2, 2, 3, 3]]))


def on_graph(generator, dtype, batch):
    return (torch.randn(batch, 4, 4, generator=generator, dtype=torch.float64).to(dtype), CHAIN)


def bad(argument, make, *shape, error=ValueError):
    def call():
        with seeded(0):
            module = make()
        return module(torch.zeros(shape)) if shape else module

    return BadInput(argument, call, error)


def bad_scan(scan, operands, argument, place, error=ValueError, **options):
    def call():
        given = [one.detach() if isinstance(one, torch.Tensor) else one for one in operands()]
        if place is not None:
            given[place] = given[place][:, :1] if isinstance(given[place], torch.Tensor) else given[place][:1]
        scan(*given, **options)

    return BadInput(argument, call, error)


def packed_grid():
    flat = [one.detach() for one in grid(2, 3)]
    return [*flat[:3], tuple(flat[3:5]), tuple(flat[5:9]), tuple(flat[9:11]), flat[11]]


def on_chain():
    return [uniform(2, 4, 2, 3), uniform(2, 4, 2, 3), uniform(2, 4, 2, 3), uniform(2, 5, 2), uniform(2, 4, 2),
            uniform(2, 5, 2), uniform(2, 4, 2), CHAIN]  # fmt: skip


SCAN_NAMES = ("k", "v", "source", "transition", "mark", "direct")
SCALARS = (("method", {"method": "fast"}, ValueError), ("levels", {"levels": -1}, ValueError),
           ("levels", {"levels": 1.0}, TypeError))  # fmt: skip
GRAPH_NO_METHOD = [bad_scan(plstm_graph, on_chain, name, place) for place, name in enumerate(SCAN_NAMES, 1)]


def signature_cases(scan, operands):
    shapes = tuple(bad_scan(scan, operands, name, place) for place, name in enumerate(SCAN_NAMES, 1))
    return shapes + tuple(bad_scan(scan, operands, name, None, error, **given) for name, given, error in SCALARS)


CASES = [
    ModuleCase(
        "provenn.nn.PLSTM1d",
        make=lambda **options: PLSTM1d(4, 2, **{"levels": 2, **options}),
        inputs=drawn(5, 4),
        causal_dim=1,
        forms=(with_method("recurrent"),),
        bad_input=(
            bad("dim", lambda: PLSTM1d(6, 4)),
            bad("dim", lambda: PLSTM1d(8, 4, states=4)),
            bad("heads", lambda: PLSTM1d(4, 0)),
            bad("states", lambda: PLSTM1d(4, 1, states=0)),
            bad("convolution", lambda: PLSTM1d(4, convolution=-1)),
            bad("convolution", lambda: PLSTM1d(4, convolution=2.0), error=TypeError),
            bad("method", lambda: PLSTM1d(4, method="fast")),
            bad("levels", lambda: PLSTM1d(4, levels=-1)),
            bad("x", lambda: PLSTM1d(4), 2, 3, 5),
            bad("x", lambda: PLSTM1d(4), 3, 4),
        ),
    ),
    ModuleCase(
        "provenn.nn.PLSTM1d",
        label="state tracking",
        make=lambda **options: PLSTM1d(4, 1, **{"states": 2, "convolution": 2, "levels": 1, **options}),
        inputs=drawn(5, 4),  # three chunks: the order of a chunk's transitions matters from the second on
        causal_dim=1,
        forms=(with_method("recurrent"),),
        bad_input_reason="the plain layer's case refuses bad input",
    ),
    ModuleCase(
        "provenn.nn.PLSTM2d",
        make=lambda **options: PLSTM2d(4, 2, **{"convolution": 0, **options}),
        inputs=drawn(2, 3, 4),
        symmetries=FLIP_SYMMETRIES,
        forms=(with_method("recurrent"),),
        bad_input=(
            bad("dim", lambda: PLSTM2d(6, 4)),
            bad("mode", lambda: PLSTM2d(4, 2, "X")),
            bad("chirality", lambda: PLSTM2d(4, 2, chirality="X")),
            bad("orientations", lambda: PLSTM2d(4, 2, orientations=3)),
            bad("levels", lambda: PLSTM2d(4, 2, levels=-1)),
            bad("method", lambda: PLSTM2d(4, 2, method="fast")),
            bad("convolution", lambda: PLSTM2d(4, 2, convolution=2)),
            bad("x", lambda: PLSTM2d(4, 2), 2, 4, 3, 3),
            bad("x", lambda: PLSTM2d(4, 2), 2, 3, 4),
        ),
    ),
    ModuleCase(
        "provenn.nn.PLSTM2d",
        label="D-mode, in blocks",
        make=lambda **options: PLSTM2d(4, 2, "D", "R", levels=1, **options),
        inputs=drawn(3, 2, 4),
        forms=(with_method("recurrent"),),
        bad_input_reason="the plain layer's case refuses bad input",
    ),
    ModuleCase(
        "provenn.nn.PLSTMGraph",
        make=lambda **options: PLSTMGraph(4, 2, **{"mode": "P", "max_degree": 2, **options}),
        inputs=on_graph,
        forms=(with_method("parallel"),),
        compile=False,
        compile_reason="the recurrence reads the order of its rounds from the graph; the parallel form compiles",
        export=False,
        export_reason="torch.export takes tensors and plain containers, no prepared graph",
        bad_input=(
            bad("dim", lambda: PLSTMGraph(6, 4, "P", 2)),
            bad("mode", lambda: PLSTMGraph(4, 2, "X", 2)),
            bad("max_degree", lambda: PLSTMGraph(4, 2, "P", 0)),
            bad("max_degree", lambda: PLSTMGraph(4, 2, "P", 1)(torch.zeros(1, 4, 4), CHAIN)),
            bad("method", lambda: PLSTMGraph(4, 2, "P", 2, method="fast")),
            bad("x", lambda: PLSTMGraph(4, 2, "P", 2)(torch.zeros(1, 3, 4), CHAIN)),
            bad("x", lambda: PLSTMGraph(4, 2, "P", 2)(torch.zeros(4, 4), CHAIN)),
        ),
    ),
    ModuleCase(
        "provenn.nn.PLSTMGraph",
        label="D-mode, both directions",
        make=lambda **options: PLSTMGraph(4, 2, "D", 2, bidirectional=True, method="parallel", **options),
        inputs=on_graph,
        forms=(with_method("recurrent"),),
        export=False,
        export_reason="torch.export takes tensors and plain containers, no prepared graph",
        bad_input_reason="the plain layer's case refuses bad input",
    ),
    ModuleCase(
        "provenn.nn.PLSTMVision",
        make=lambda **options: PLSTMVision(2, 4, 2, 2, channels=1, patch=1, hidden=4, **options),
        inputs=drawn(3, 3, 1),
        forms=(with_method("recurrent"),),
        bad_input=(
            bad("classes", lambda: PLSTMVision(0, 4, 1, 2)),
            bad("depth", lambda: PLSTMVision(2, 4, 0, 2)),
            bad("hidden", lambda: PLSTMVision(2, 4, 1, 2, hidden=0)),
            bad("grid", lambda: PLSTMVision(2, 4, 1, 2, grid=(0, 2))),
            bad("pooling", lambda: PLSTMVision(2, 4, 1, 2, pooling="max")),
            bad("images", lambda: PLSTMVision(2, 4, 1, 2, channels=1, patch=2), 1, 3, 4, 1),
            bad("images", lambda: PLSTMVision(2, 4, 1, 2, channels=1, patch=2), 1, 1, 4, 4),
        ),
    ),
    FunctionCase(
        "provenn.nn.plstm_scan_1d",
        call=lambda: plstm_scan_1d(*[one.detach() for one in sequence(3)]),
        bad_input=(
            *signature_cases(plstm_scan_1d, lambda: sequence(3)),
            BadInput("q", lambda: plstm_scan_1d(*[torch.zeros(2, 3)] * 7)),
        ),
    ),
    FunctionCase(
        "provenn.nn.plstm_scan_2d",
        call=lambda: plstm_scan_2d(*packed_grid()),
        bad_input=(
            *signature_cases(plstm_scan_2d, packed_grid),
            BadInput("q", lambda: plstm_scan_2d(torch.zeros(2, 3), *packed_grid()[1:])),
        ),
    ),
    FunctionCase(
        "provenn.nn.plstm_graph",
        call=lambda: plstm_graph(*on_chain()),
        bad_input=(
            *GRAPH_NO_METHOD,
            bad_scan(plstm_graph, on_chain, "q", 0),
            bad_scan(plstm_graph, on_chain, "method", None, method="fast"),
        ),
    ),
    FunctionCase(
        "provenn.nn.PreparedDAG",
        call=lambda: PreparedDAG(torch.tensor([[0, 1], [1, 2]])),
        bad_input=(
            BadInput("edge_index", lambda: PreparedDAG(torch.tensor([[0, 1], [1, 0]]))),
            BadInput("edge_index", lambda: PreparedDAG(torch.tensor([[0], [3]]), 3)),
            BadInput("edge_index", lambda: PreparedDAG(torch.tensor([0, 1]))),
            BadInput("nodes", lambda: PreparedDAG(torch.tensor([[0], [1]]), -1)),
        ),
    ),
    SamplerCase(
        "provenn.nn.arrow_pointing",
        make=lambda: arrow_pointing,
        sample=lambda sampler, n, generator: sampler(n, 16, generator, length=4)[1].double()[:, None],
        shape=(1,),
        expectations=(
            Expectation("share of ones", lambda labels: labels, lambda: torch.tensor([0.5], dtype=torch.float64)),
        ),
        bad_input=(
            BadInput("n", lambda: arrow_pointing(-1, 64)),
            BadInput("size", lambda: arrow_pointing(1, 31)),
            BadInput("size", lambda: arrow_pointing(1, 64.0), TypeError),
            BadInput("length", lambda: arrow_pointing(1, 64, length=0.0)),
        ),
    ),
]
