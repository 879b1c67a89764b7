"""Linear recurrences in parallel against the loop that their equation is."""

import math
from itertools import pairwise

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from provenn.core.sequences.graph_scans import AcyclicSchedule, GridTransitions, acyclic_recurrence, grid_recurrence
from provenn.core.sequences.scans import associative_scan, linear_recurrence, matrix_recurrence

METHODS = ("sequential", "chunked", "associative", "auto")
LENGTHS = (1, 2, 3, 4, 7, 9, 16, 17, 33, 64, 101)
TYPES = (torch.float64, torch.complex128)


def randn(*shape, seed=0, dtype=torch.float64, grad=False):
    draws = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=draws, dtype=dtype).requires_grad_(grad)


def loop(gates, inputs, initial):
    state, states = initial, []
    for step in range(inputs.shape[1]):
        state = gates[:, step] * state + inputs[:, step]
        states.append(state)
    return torch.stack(states, 1)


def gradients(output, *inputs, seed=9):
    weights = randn(*output.shape, seed=seed, dtype=output.dtype)
    return torch.autograd.grad((output * weights).sum().abs(), inputs)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("length", LENGTHS)
def test_every_method_is_the_loop_and_so_are_its_gradients(method, dtype, length):
    a, x = (randn(2, length, 3, seed=seed, dtype=dtype, grad=True) for seed in (1, 2))
    start = randn(2, 3, seed=3, dtype=dtype, grad=True)
    ours, theirs = linear_recurrence(a, x, start, method=method), loop(a, x, start)
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)
    for one, other in zip(gradients(ours, a, x, start), gradients(theirs, a, x, start), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("method", METHODS)
def test_float32_stays_within_1e_5_over_a_thousand_steps(method):
    a = randn(2, 1000, 8, seed=1).sigmoid()
    x = randn(2, 1000, 8, seed=2)
    exact = loop(a, x, torch.zeros(2, 8, dtype=torch.float64))
    ours = linear_recurrence(a.float(), x.float(), method=method)
    assert (ours.double() - exact).abs().max() <= 1e-5 * exact.abs().max()


@pytest.mark.parametrize("method", METHODS)
def test_gates_and_start_broadcast_and_real_gates_meet_complex_inputs(method):
    a, x = randn(3, 20, 1, seed=1, grad=True), randn(3, 20, 4, seed=2, dtype=torch.complex128, grad=True)
    start = randn(4, seed=3, grad=True)
    ours, theirs = linear_recurrence(a, x, start, method=method), loop(a, x, start.expand(3, 4))
    torch.testing.assert_close(ours, theirs)
    for one, other in zip(gradients(ours, a, x, start), gradients(theirs, a, x, start), strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("method", METHODS)
def test_a_closed_gate_forgets_and_a_growing_one_grows(method):
    a = torch.full((1, 60, 1), 2.0, dtype=torch.float64)
    a[0, 40] = 0.0
    x = torch.zeros(1, 60, 1, dtype=torch.float64)
    h = linear_recurrence(a, x, torch.ones(1, 1, dtype=torch.float64), method=method)[0, :, 0]
    assert torch.equal(h[:40], 2.0 ** torch.arange(1, 41, dtype=torch.float64))
    assert torch.equal(h[40:], torch.zeros(20, dtype=torch.float64))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("length", [1, 2, 5, 17, 50])
def test_matrices_as_gates_are_the_loop(method, length):
    a, x = randn(2, length, 3, 3, seed=1, grad=True), randn(length, 3, 2, seed=2, grad=True)
    start = randn(2, 3, 2, seed=3, grad=True)
    ours = matrix_recurrence(a, x, start, method=method)
    state, states = start, []
    for step in range(length):
        state = a[:, step] @ state + x[step]
        states.append(state)
    theirs = torch.stack(states, 1)
    scale = theirs.detach().abs().max()
    torch.testing.assert_close(ours / scale, theirs / scale, rtol=1e-9, atol=1e-11)
    found, expected = gradients(ours, a, x, start), gradients(theirs, a, x, start)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one / scale, other / scale, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("method", METHODS)
def test_second_derivatives(method):
    a, x, start = (randn(*shape, seed=1, grad=True) for shape in ((1, 6, 2), (1, 6, 2), (1, 2)))
    assert torch.autograd.gradgradcheck(lambda *args: linear_recurrence(*args, method=method), (a, x, start))


def test_time_may_lie_anywhere_and_be_empty():
    a, x = randn(5, 3, 7, seed=1), randn(5, 3, 7, seed=2)
    for dim in (0, 1, 2, -1):
        ours = linear_recurrence(a, x, dim=dim, method="chunked").movedim(dim, 1)
        start = torch.zeros_like(x.movedim(dim, 1)[:, 0])
        torch.testing.assert_close(ours, loop(a.movedim(dim, 1), x.movedim(dim, 1), start))
    assert linear_recurrence(a[:0], x[:0], dim=0).shape == (0, 3, 7)


def test_it_runs_compiled():
    a, x = randn(2, 70, 3, seed=1).sigmoid(), randn(2, 70, 3, seed=2)
    compiled = torch.compile(lambda a, x: linear_recurrence(a, x), backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(a, x), linear_recurrence(a, x))


@pytest.mark.parametrize("length", [5, 60])
def test_an_exported_recurrence_takes_any_batch(length):
    class Recurrence(torch.nn.Module):
        def forward(self, a, x):
            return linear_recurrence(a, x)

    a, x = randn(300, length, 2, seed=1).sigmoid(), randn(300, length, 2, seed=2)
    first = {0: torch.export.Dim("batch", min=1)}
    program = torch.export.export(Recurrence(), (a, x), dynamic_shapes=(first, first)).module()
    torch.testing.assert_close(program(a[:2], x[:2]), linear_recurrence(a[:2], x[:2]))


@pytest.mark.parametrize("method", METHODS)
def test_per_sample_gradients_and_jacobians_under_torch_func(method):
    a, x = randn(4, 6, 2, seed=1), randn(4, 6, 2, seed=2)

    def energy(a, x):
        return (linear_recurrence(a, x, dim=0, method=method) ** 2).sum()

    mapped = torch.func.vmap(torch.func.grad(energy, argnums=(0, 1)))(a, x)
    alone = [torch.func.grad(energy, argnums=(0, 1))(*pair) for pair in zip(a, x, strict=True)]
    for place in (0, 1):
        torch.testing.assert_close(mapped[place], torch.stack([one[place] for one in alone]))
    jacobian = torch.func.jacrev(lambda a: linear_recurrence(a, x[0], dim=0, method=method))(a[0])
    theirs = torch.autograd.functional.jacobian(lambda a: loop(a[None], x[:1], torch.zeros(1, 2))[0], a[0])
    torch.testing.assert_close(jacobian, theirs)
    matrices, vectors = randn(4, 6, 2, 2, seed=3), randn(4, 6, 2, 1, seed=4)
    together = torch.func.vmap(lambda A, X: matrix_recurrence(A, X, method=method))(matrices, vectors)
    torch.testing.assert_close(together, matrix_recurrence(matrices, vectors, method=method))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("mapped", [(0, None, None), (None, 1, None), (None, None, 0), (2, 0, None), (0, None, 1)])
def test_mapping_over_some_of_the_operands(mapped, method):
    sizes = ((6, 1), (6, 2), (2,))
    operands = [randn(*size, seed=seed) for seed, size in enumerate(sizes, 1)]
    operands = [
        one if dim is None else torch.stack([one, 2 * one, -one], dim)
        for one, dim in zip(operands, mapped, strict=True)
    ]

    def energy(a, x, start):
        return (linear_recurrence(a, x, start, dim=0, method=method) ** 2).sum()

    solve = torch.func.grad_and_value(energy, argnums=(0, 1, 2))
    found = torch.func.vmap(solve, mapped)(*operands)
    for place in range(3):
        chosen = [one if dim is None else one.select(dim, place) for one, dim in zip(operands, mapped, strict=True)]
        gradients, value = solve(*chosen)
        torch.testing.assert_close(value, (loop(*(one[None] for one in chosen)) ** 2).sum())
        torch.testing.assert_close([one[place] for one in found[0]], list(gradients))
        torch.testing.assert_close(found[1][place], value)


@pytest.mark.parametrize("method", METHODS)
def test_many_starts_of_one_sequence_of_matrices(method):
    a, x, starts = randn(5, 3, 3, seed=1), randn(5, 3, 2, seed=2), randn(4, 3, 2, seed=3)
    apart = torch.stack([matrix_recurrence(a, x, start, method=method) for start in starts])
    torch.testing.assert_close(matrix_recurrence(a, x, starts, method=method), apart)


def test_a_complex_start_of_a_real_recurrence_keeps_its_imaginary_part():
    a, x, start = randn(2, 5, 3, seed=1), randn(2, 5, 3, seed=2), randn(2, 3, seed=3, dtype=torch.complex128)
    torch.testing.assert_close(linear_recurrence(a, x, start), loop(a, x, start))


def test_step_by_step_the_product_of_gates_may_leave_the_range():
    a = torch.full((1, 60, 1), 1e20)
    assert torch.equal(linear_recurrence(a, torch.zeros(1, 60, 1), method="sequential"), torch.zeros(1, 60, 1))


def test_the_scan_of_any_associative_map():
    words = torch.arange(1, 12)[:, None]
    assert torch.equal(associative_scan(lambda one, two: (one[0] + two[0],), (words,))[0], words.cumsum(0))
    latest = associative_scan(lambda one, two: (torch.where(two[0] > 0, two[0], one[0]),), (words * (words % 3 == 0),))
    assert latest[0].flatten().tolist() == [0, 0, 3, 3, 3, 6, 6, 6, 9, 9, 9]


class Calls(TorchDispatchMode):
    """Counts the operations that are called."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("method", "growth"), [("auto", 2.2), ("chunked", 2.2), ("associative", 1.4)])
def test_rounds_grow_as_the_root_or_the_logarithm_of_the_length_in_both_passes(method, growth):
    for recur, tail in ((linear_recurrence, ((2,), (2,))), (matrix_recurrence, ((2, 2), (2, 1)))):
        counts = []
        for length in (1024, 4096):
            operands = [randn(1, length, *one, seed=seed, grad=True) for seed, one in enumerate(tail)]
            with Calls() as calls:
                torch.autograd.grad(recur(*operands, method=method).sum(), operands)
            counts.append(calls.count)
        assert counts[1] <= growth * counts[0]


@pytest.mark.parametrize(("tail", "wide"), [((4, 64), False), ((16, 256), True)])
def test_chunks_are_for_narrow_steps(tail, wide):
    """Chunks go through memory more often than a loop, which costs more than its calls where a step is wide."""
    a, x = (randn(128, *tail, seed=seed) for seed in (1, 2))
    counts = {}
    for method in ("auto", "sequential", "chunked"):
        with Calls() as calls:
            linear_recurrence(a, x, dim=0, method=method)
        counts[method] = calls.count
    assert counts["chunked"] < counts["sequential"]
    assert counts["auto"] == counts["sequential" if wide else "chunked"]


@pytest.mark.parametrize("length", [1, 2, 3, 5, 8, 31, 64])
def test_the_scan_calls_combine_rarely(length):
    calls = []

    def add(one, two):
        calls.append(len(one[0]))
        return (one[0] + two[0],)

    associative_scan(add, (torch.ones(length),))
    assert len(calls) <= 2 * math.log2(max(2, length))
    assert sum(calls) <= 2 * length


def test_bad_input():
    a, x = torch.ones(2, 5, 3), torch.ones(2, 5, 3)
    with pytest.raises(ValueError, match="equally long, got 4 and 5"):
        linear_recurrence(a[:, :4], x)
    with pytest.raises(ValueError, match="method must be one of"):
        linear_recurrence(a, x, method="fast")
    with pytest.raises(ValueError, match="equally many dimensions"):
        linear_recurrence(a[0], x)
    with pytest.raises(ValueError, match="gates must be"):
        matrix_recurrence(a, x)
    with pytest.raises(ValueError, match="one length"):
        associative_scan(lambda one, two: one, (torch.ones(3), torch.ones(4)))
    with pytest.raises(ValueError, match="dim must be counted from the front, got -1"):
        associative_scan(lambda one, two: one, (torch.ones(3, 4),), dim=-1)
    for start in (torch.ones(2, 4), torch.ones(7, 2, 3)):
        with pytest.raises(ValueError, match="initial must fit"):
            linear_recurrence(a, x, start)


# grids


def grid_loop(ahead, side, gates):
    rows, columns = ahead.shape[:2]
    zero = torch.zeros_like(ahead[0, 0])
    a, s = {}, {}
    for x in range(rows):
        for y in range(columns):
            left, below = a.get((x - 1, y), zero), s.get((x, y - 1), zero)
            a[x, y] = ahead[x, y] + gates[0][x, y] * left + gates[1][x, y] * below
            s[x, y] = side[x, y] + gates[2][x, y] * left + gates[3][x, y] * below
    cells = [[(x, y) for y in range(columns)] for x in range(rows)]
    return tuple(torch.stack([torch.stack([one[cell] for cell in row]) for row in cells]) for one in (a, s))


@pytest.mark.parametrize("rows", [1, 2, 3, 6])
@pytest.mark.parametrize("columns", [1, 2, 5, 7])
def test_the_grid_is_the_cell_by_cell_loop_and_so_are_its_gradients(rows, columns):
    ahead, side = (randn(rows, columns, 2, 3, seed=seed, grad=True) for seed in (1, 2))
    gates = GridTransitions(*(randn(rows, columns, 2, 1, seed=seed, grad=True) for seed in (3, 4, 5, 6)))
    ours, theirs = grid_recurrence(ahead, side, gates), grid_loop(ahead, side, gates)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other)
    leaves = (ahead, side, *gates)
    found = gradients(torch.stack(ours), *leaves)
    for one, other in zip(found, gradients(torch.stack(theirs), *leaves), strict=True):
        torch.testing.assert_close(one, other)


def test_second_derivatives_of_the_grid_and_complex_gates():
    leaves = [randn(2, 3, 1, seed=seed, dtype=torch.complex128, grad=True) for seed in range(6)]
    assert torch.autograd.gradcheck(lambda a, s, *g: grid_recurrence(a, s, GridTransitions(*g)), leaves)
    assert torch.autograd.gradgradcheck(lambda a, s, *g: grid_recurrence(a, s, GridTransitions(*g)), leaves)


def test_real_sources_of_a_grid_meet_complex_gates_and_the_reverse():
    cells, complex_cells = randn(3, 4, 1, seed=1), randn(3, 4, 1, seed=2, dtype=torch.complex128)
    for source, gate in ((cells, complex_cells), (complex_cells, cells)):
        source, gate = source.clone().requires_grad_(), gate.clone().requires_grad_()
        gates = GridTransitions(gate, gate.flip(0), gate.flip(1), gate)
        ours, theirs = (torch.stack(solve(source, source, gates)) for solve in (grid_recurrence, grid_loop))
        torch.testing.assert_close(ours, theirs)
        torch.testing.assert_close(gradients(ours, source, gate), gradients(theirs, source, gate))


def test_the_grid_runs_compiled_and_under_torch_func():
    leaves = [randn(2, 2, 1, seed=seed, grad=True) for seed in range(6)]
    compiled = torch.compile(grid, backend="eager", fullgraph=True)
    ours, theirs = compiled(*leaves), grid(*leaves)
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(gradients(ours, *leaves), gradients(theirs, *leaves))
    many = [randn(5, 3, 4, 2, seed=seed) for seed in range(6)]
    by_gates = torch.func.grad(lambda *leaves: grid(*leaves).square().sum(), argnums=(0, 3))
    for place, mapped in enumerate(torch.func.vmap(by_gates)(*many)):
        torch.testing.assert_close(mapped, torch.stack([by_gates(*one)[place] for one in zip(*many, strict=True)]))


def grid(ahead, side, *gates):
    return torch.stack(grid_recurrence(ahead, side, GridTransitions(*gates)))


def test_a_gate_of_another_shape_is_refused():
    cells = torch.ones(2, 3, 1)
    wide = torch.ones(2, 3, 4)
    with pytest.raises(ValueError, match="ahead_side must fit sources"):
        grid_recurrence(cells, cells, GridTransitions(cells, cells, wide, cells))
    with pytest.raises(ValueError, match="side_ahead must fit sources"):
        grid_recurrence(cells, cells, GridTransitions(cells, cells[:, :2], cells, cells))


# graphs


def random_graph(states, pairs, seed=0):
    draws = torch.Generator().manual_seed(seed)
    ends = torch.randint(0, states, (2, pairs), generator=draws).sort(0).values
    ends = ends[:, ends[0] < ends[1]]
    shuffled = torch.randperm(states, generator=draws)
    return shuffled[ends]


@pytest.mark.parametrize("seed", range(5))
def test_the_graph_is_the_solution_of_its_linear_system_and_so_are_its_gradients(seed):
    pairs = random_graph(9, 25, seed)
    x, w = randn(9, 2, seed=1, grad=True), randn(pairs.shape[1], 1, seed=2, grad=True)
    ours = acyclic_recurrence(x, w, AcyclicSchedule(pairs, 9))
    matrix = torch.zeros(9, 9, dtype=torch.float64).index_put((pairs[1], pairs[0]), w[:, 0], accumulate=True)
    theirs = torch.linalg.solve(torch.eye(9, dtype=torch.float64) - matrix, x)
    torch.testing.assert_close(ours, theirs)
    for one, other in zip(gradients(ours, x, w), gradients(theirs, x, w), strict=True):
        torch.testing.assert_close(one, other)


def test_second_derivatives_of_the_graph():
    pairs = random_graph(5, 9, 3)
    leaves = randn(5, 2, seed=1, grad=True), randn(pairs.shape[1], 2, seed=2, grad=True)
    assert torch.autograd.gradgradcheck(lambda x, w: acyclic_recurrence(x, w, AcyclicSchedule(pairs, 5)), leaves)


def test_the_graph_runs_compiled_and_under_torch_func():
    pairs = random_graph(7, 20, 1)
    schedule = AcyclicSchedule(pairs, 7)
    x, w = randn(3, 7, 2, seed=1), randn(3, pairs.shape[1], 1, seed=2)

    def energy(x, w):
        return acyclic_recurrence(x, w, schedule).square().sum()

    for argument in (0, 1):
        by_one = torch.func.grad(energy, argnums=argument)
        alone = torch.stack([by_one(*pair) for pair in zip(x, w, strict=True)])
        torch.testing.assert_close(torch.func.vmap(by_one)(x, w), alone)
    for in_dims in ((0, None), (None, 0)):
        given = [one if dim == 0 else one[0] for one, dim in zip((x, w), in_dims, strict=True)]
        mapped = torch.func.vmap(lambda x, w: acyclic_recurrence(x, w, schedule), in_dims)(*given)
        rows = [[one[i] if dim == 0 else one for one, dim in zip(given, in_dims, strict=True)] for i in range(3)]
        torch.testing.assert_close(mapped, torch.stack([acyclic_recurrence(*row, schedule) for row in rows]))
    leaves = x[0].clone().requires_grad_(), w[0].clone().requires_grad_()
    compiled = torch.compile(lambda x, w: acyclic_recurrence(x, w, schedule), backend="aot_eager", fullgraph=True)
    ours, theirs = compiled(*leaves), acyclic_recurrence(*leaves, schedule)
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(gradients(ours, *leaves), gradients(theirs, *leaves))


def test_complex_weights_of_a_graph_keep_their_imaginary_part():
    pairs = torch.tensor([[0, 0, 1], [1, 2, 2]])
    x, w = torch.ones(3, 1, dtype=torch.float64), torch.full((3, 1), 1j, dtype=torch.complex128)
    solved = acyclic_recurrence(x, w, AcyclicSchedule(pairs, 3))
    assert solved.flatten().tolist() == [1, 1 + 1j, 1 + 1j + 1j * (1 + 1j)]


def test_a_chain_has_one_round_a_pair_and_a_star_has_one():
    chain = torch.stack((torch.arange(6), torch.arange(1, 7)))
    assert len(AcyclicSchedule(chain, 7).rounds) == 6
    star = torch.stack((torch.arange(1, 7), torch.zeros(6, dtype=torch.long)))
    assert [one.tolist() for one in AcyclicSchedule(star, 7).rounds] == [[0, 1, 2, 3, 4, 5]]


def test_graphs_without_pairs_or_states():
    nothing = torch.zeros(2, 0, dtype=torch.long)
    assert torch.equal(
        acyclic_recurrence(torch.ones(3, 1), torch.ones(0, 1), AcyclicSchedule(nothing, 3)), torch.ones(3, 1)
    )
    assert AcyclicSchedule(nothing, 0).rounds == []


def test_a_cycle_is_listed():
    pairs = torch.tensor([[0, 1, 2, 3, 4], [1, 2, 3, 1, 0]])
    with pytest.raises(ValueError, match=r"cycle, got .*") as caught:
        AcyclicSchedule(pairs, 5)
    walk = [int(one) for one in str(caught.value).split("got ")[1].split(" → ")]
    assert walk[0] == walk[-1]
    assert set(walk) == {1, 2, 3}
    assert set(pairwise(walk)) <= set(map(tuple, pairs.T.tolist()))


def test_numbers_outside_the_graph_and_shapes_that_do_not_fit():
    with pytest.raises(ValueError, match="states 0 … 1, got 0 … 2"):
        AcyclicSchedule(torch.tensor([[0], [2]]), 2)
    with pytest.raises(ValueError, match="must be \\(2, …\\)"):
        acyclic_recurrence(torch.ones(3, 1), torch.ones(1, 1), AcyclicSchedule(torch.tensor([[0], [1]]), 2))
    with pytest.raises(ValueError, match="weights must fit states"):
        acyclic_recurrence(torch.ones(2, 1), torch.ones(1, 4), AcyclicSchedule(torch.tensor([[0], [1]]), 2))
