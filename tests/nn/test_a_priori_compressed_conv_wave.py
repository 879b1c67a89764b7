"""The wave solver against closed forms, d'Alembert's solution, textbook dense time stepping and scikit-fem."""

import itertools
import math

import jaxtyping
import numpy as np
import pytest
import torch

from provenn.nn._a_priori_compressed_conv_dataset import wave_dataset
from provenn.nn._a_priori_compressed_conv_mesh import QuadMesh
from provenn.nn._a_priori_compressed_conv_wave import WaveFE2d


def normal(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def distorted(columns=6, rows=5, width=1.5, height=1.0, amount=0.25):
    """A rectangle whose inner nodes are moved by up to a part of the mesh size; the sides keep their names."""
    mesh = QuadMesh.rectangle(width, height, columns, rows)
    nodes = mesh.nodes.clone()
    inner = torch.ones(len(nodes), dtype=torch.bool)
    inner[torch.cat([side.flatten() for side in mesh.sides.values()])] = False
    shift = 2 * torch.rand(len(nodes), 2, dtype=torch.float64, generator=torch.Generator().manual_seed(3)) - 1
    nodes[inner] += amount * shift[inner] * torch.tensor([width / columns, height / rows])
    return QuadMesh(nodes, mesh.quads, mesh.sides)


def channel(length=4.0, columns=200):
    """A strip one element high: a wave along it is one-dimensional."""
    return QuadMesh.rectangle(length, length / columns, columns, 1)


def sines(mesh, width=1.0, height=1.0):
    x, y = mesh.nodes.T
    return torch.sin(math.pi * x / width) * torch.sin(math.pi * y / height)


ONE = QuadMesh(torch.tensor([[0.0, 0.0], [1.0, 0.0], [1.0, 1.0], [0.0, 1.0]]), torch.tensor([[0, 1, 2, 3]]))
SMALL = QuadMesh.rectangle(1.0, 1.0, 4, 4)


# matrices


def test_matrices_of_the_unit_square():
    solver = WaveFE2d(ONE, 2.0, "absorbing", 0.1)
    K = np.array([[4, -1, -2, -1], [-1, 4, -1, -2], [-2, -1, 4, -1], [-1, -2, -1, 4]]) / 6
    M = np.array([[4, 2, 1, 2], [2, 4, 2, 1], [1, 2, 4, 2], [2, 1, 2, 4]]) / 36
    C = np.array([[4, 1, 0, 1], [1, 4, 1, 0], [0, 1, 4, 1], [1, 0, 1, 4]]) / 6
    np.testing.assert_allclose(solver.K.toarray(), K, atol=1e-15)
    np.testing.assert_allclose(solver.M.toarray(), M / 4, atol=1e-15)  # 1/c²
    np.testing.assert_allclose(solver.C.toarray(), C / 2, atol=1e-15)  # 1/c


def test_lumped_matrices_keep_the_sums_of_rows():
    full = WaveFE2d(distorted(), 1.3, "absorbing", 0.1)
    lumped = WaveFE2d(distorted(), 1.3, "absorbing", 0.1, mass="lumped")
    for name in ("M", "C"):
        np.testing.assert_allclose(
            getattr(lumped, name).toarray(), np.diag(getattr(full, name).toarray().sum(1)), atol=1e-15
        )
    np.testing.assert_array_equal(lumped.K.toarray(), full.K.toarray())


def speed_at(x, y):
    return 1 + 0.4 * np.sin(2 * x) * y


@pytest.mark.parametrize("kind", ["elements", "nodes", "function"])
def test_matrices_agree_with_scikit_fem(kind):
    skfem = pytest.importorskip("skfem")
    from skfem.helpers import dot, grad

    mesh = distorted()
    other = skfem.MeshQuad(np.ascontiguousarray(mesh.nodes.T), np.ascontiguousarray(mesh.quads.T))
    # skfem's rule of order 3 is the 2 × 2 Gauss rule.
    basis = skfem.CellBasis(other, skfem.ElementQuad1(), intorder=3)
    edge = skfem.FacetBasis(other, skfem.ElementQuad1(), intorder=3)
    if kind == "elements":
        c = 0.5 + torch.rand(len(mesh.quads), dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        inside = c.numpy()[:, None]
        on_edge = c.numpy()[other.f2t[0, edge.find]][:, None]
    elif kind == "nodes":
        c = torch.from_numpy(speed_at(*mesh.nodes.T.numpy()))
        inside, on_edge = basis.interpolate(c.numpy()), edge.interpolate(c.numpy())
    else:
        c = lambda at: torch.from_numpy(speed_at(*at.T.numpy()))  # noqa: E731
        inside, on_edge = speed_at(*basis.global_coordinates()), speed_at(*edge.global_coordinates())
    mass = skfem.BilinearForm(lambda u, v, w: u * v / w.c**2).assemble(basis, c=inside)
    damping = skfem.BilinearForm(lambda u, v, w: u * v / w.c).assemble(edge, c=on_edge)
    stiffness = skfem.BilinearForm(lambda u, v, _: dot(grad(u), grad(v))).assemble(basis)
    # skfem numbers unknowns as nodes.
    np.testing.assert_array_equal(basis.nodal_dofs[0], np.arange(len(mesh.nodes)))
    solver = WaveFE2d(mesh, c, "absorbing", 0.1)
    for ours, theirs in ((solver.M, mass), (solver.K, stiffness), (solver.C, damping)):
        np.testing.assert_allclose(ours.toarray(), theirs.toarray(), rtol=0, atol=1e-12)


def test_patch_of_distorted_elements_keeps_linear_fields():
    mesh = distorted()
    x, y = mesh.nodes.T
    u = (2 - 3 * x + 5 * y).numpy()
    K = WaveFE2d(mesh, 1.0, "clamped", 0.1).K.toarray()
    edge = np.unique(torch.cat(list(mesh.sides.values())).numpy())
    inner = np.setdiff1d(np.arange(len(u)), edge)
    assert len(inner) == 20
    assert np.abs(K @ u)[inner].max() < 1e-12
    found = np.linalg.solve(K[np.ix_(inner, inner)], -K[np.ix_(inner, edge)] @ u[edge])
    np.testing.assert_allclose(found, u[inner], atol=1e-12)
    assert u @ K @ u == pytest.approx((9 + 25) * 1.5)  # ∫ |∇u|²


def test_free_body_drifts_without_bending():
    mesh = distorted()
    run = WaveFE2d(mesh, 1.0, "free", 0.05).run(None, 40, None, torch.full((len(mesh.nodes),), 2.0))
    wanted = 2.0 * run.times[:, None].expand_as(run.displacement)
    torch.testing.assert_close(run.displacement, wanted, rtol=0, atol=1e-11)


# accuracy


@pytest.mark.parametrize(("mass", "method"), [("consistent", "newmark"), ("lumped", "newmark"), ("lumped", "explicit")])
def test_standing_wave_is_of_second_order(mass, method):
    errors = []
    for n in (8, 16, 32):
        mesh = QuadMesh.rectangle(1.0, 1.0, n, n)
        shape, c, dt = sines(mesh), 1.5, 0.3 / n
        run = WaveFE2d(mesh, c, "clamped", dt, mass=mass, method=method).run(None, 2 * n, shape)
        exact = torch.cos(math.pi * math.sqrt(2) * c * run.times)[:, None] * shape
        errors.append((run.displacement - exact).abs().max().item())
    orders = np.log2(np.array(errors[:-1]) / errors[1:])
    assert ((orders > 1.8) & (orders < 2.2)).all(), orders
    assert errors[-1] < 0.02


@pytest.mark.parametrize("method", ["newmark", "explicit"])
@pytest.mark.parametrize("given", ["nodes", "function"])
def test_forced_wave_in_a_varying_medium_is_of_second_order(method, given):
    """u = sin(2t) sin πx sin πy, f = u_tt − c²Δu; its speed falls in at the start."""

    def speed(at):
        return 1 + 0.5 * at[:, 0] + 0.2 * at[:, 1] ** 2

    def force(at, t):
        shape = torch.sin(math.pi * at[:, 0]) * torch.sin(math.pi * at[:, 1])
        return (-4 + 2 * math.pi**2 * speed(at) ** 2) * math.sin(2 * t) * shape

    errors = []
    for n in (8, 16):
        mesh = QuadMesh.rectangle(1.0, 1.0, n, n)
        c = speed if given == "function" else speed(mesh.nodes)
        mass = "lumped" if method == "explicit" else "consistent"
        solver = WaveFE2d(mesh, c, "clamped", 0.25 / n, mass=mass, method=method)
        run = solver.run(force, 4 * n, velocity=2 * sines(mesh))
        exact = torch.sin(2 * run.times)[:, None] * sines(mesh)
        errors.append((run.displacement - exact).abs().max().item())
    assert 1.8 < math.log2(errors[0] / errors[1]) < 2.2
    assert errors[1] < 0.01


@pytest.mark.parametrize("mass", ["consistent", "lumped"])
def test_discrete_standing_wave_exactly(mass):
    """On equal rectangles the sines are eigenvectors of the matrices, and one number tells a step of Newmark's."""
    width, height, columns, rows, c, dt = 2.0, 1.0, 7, 5, 1.7, 0.2
    mesh = QuadMesh.rectangle(width, height, columns, rows)
    shape = sines(mesh, width, height)
    eigenvalue = 0.0
    for length, count in ((width, columns), (height, rows)):
        h = length / count
        turn = math.cos(math.pi / count)
        other = {"consistent": (2 + turn) / 3, "lumped": 1.0}
        eigenvalue += c**2 * (2 - 2 * turn) / h**2 / other["consistent"]
    if mass == "lumped":  # the stiffness keeps the consistent factors of the other direction
        factors = [(2 + math.cos(math.pi / count)) / 3 for count in (columns, rows)]
        eigenvalue *= factors[0] * factors[1]
    phase = math.acos((1 - eigenvalue * dt**2 / 4) / (1 + eigenvalue * dt**2 / 4))
    run = WaveFE2d(mesh, c, "clamped", dt, mass=mass).run(None, 50, shape)
    wanted = torch.cos(phase * torch.arange(51, dtype=torch.float64))[:, None] * shape
    torch.testing.assert_close(run.displacement, wanted, rtol=0, atol=1e-11)


# energy


@pytest.mark.parametrize(("mass", "method"), [("consistent", "newmark"), ("lumped", "newmark"), ("lumped", "explicit")])
@pytest.mark.parametrize("boundary", ["clamped", "free"])
def test_energy_is_kept_over_a_thousand_steps(mass, method, boundary):
    mesh = distorted(7, 6)
    c = 0.5 + torch.rand(len(mesh.quads), dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    solver = WaveFE2d(mesh, c, boundary, 0.03, mass=mass, method=method)
    run = solver.run(None, 1000, normal(len(mesh.nodes)), normal(len(mesh.nodes), seed=1))
    energy = run.certificate.energy
    assert energy.min() > 0
    assert (energy / energy[0] - 1).abs().max() < 1e-8
    assert run.certificate.energy_drift < 1e-8
    assert run.certificate.work.abs().max() == run.certificate.dissipation.abs().max() == 0


def test_energy_is_that_of_the_state():
    mesh = distorted()
    dt, u0, v0 = 0.05, normal(len(mesh.nodes)), normal(len(mesh.nodes), seed=1)
    solver = WaveFE2d(mesh, 1.4, "free", dt)
    run = solver.run(None, 20, u0, v0)
    M, K, v = solver.M.toarray(), solver.K.toarray(), v0.numpy()
    for n in range(21):
        u = run.displacement[n].numpy()
        assert run.certificate.energy[n].item() == pytest.approx(v @ M @ v / 2 + u @ K @ u / 2, rel=1e-10)
        if n < 20:
            v = 2 / dt * (run.displacement[n + 1].numpy() - u) - v


def textbook_newmark(M, C, K, F, u, v, dt, beta=0.25, gamma=0.5):
    """Newmark's predictors, accelerations and correctors, with dense matrices."""
    a = np.linalg.solve(M, F[0] - C @ v - K @ u)
    history, rates = [u], [v]
    for force in F[1:]:
        u_guess, v_guess = u + dt * v + dt**2 * (0.5 - beta) * a, v + dt * (1 - gamma) * a
        a = np.linalg.solve(M + gamma * dt * C + beta * dt**2 * K, force - C @ v_guess - K @ u_guess)
        u, v = u_guess + beta * dt**2 * a, v_guess + gamma * dt * a
        history.append(u)
        rates.append(v)
    return np.array(history), np.array(rates)


def loaded(mass, method):
    """A run with load, absorbing and clamped sides and a varying medium, and its parts as dense arrays."""
    mesh = distorted(5, 4)
    nodes, dt, steps = len(mesh.nodes), 0.04, 60
    c = 0.8 + torch.rand(len(mesh.quads), dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    boundary = {"left": "clamped", "right": "absorbing", "top": "absorbing"}
    solver = WaveFE2d(mesh, c, boundary, dt, mass=mass, method=method)
    f, u, v = normal(steps + 1, nodes), normal(nodes, seed=1), normal(nodes, seed=2)
    free = solver.free.numpy()
    assert set(range(nodes)) - set(free.tolist()) == set(mesh.sides["left"].flatten().tolist())
    load = WaveFE2d(mesh, c, boundary, dt).M.toarray()  # the load is integrated with the consistent matrix
    M, C, K = (A.toarray()[np.ix_(free, free)] for A in (solver.M, solver.C, solver.K))
    dense = (M, C, K, f.numpy() @ load[:, free], u.numpy()[free], v.numpy()[free], dt)
    return solver.run(f, steps, u, v), dense, free


@pytest.mark.parametrize("mass", ["consistent", "lumped"])
def test_steps_are_those_of_the_textbook(mass):
    run, dense, free = loaded(mass, "newmark")
    history, rates = textbook_newmark(*dense)
    np.testing.assert_allclose(run.displacement.numpy()[:, free], history, rtol=0, atol=1e-10)
    M, C, K, F, *_, dt = dense
    energy = [(v @ M @ v + u @ K @ u) / 2 for u, v in zip(history, rates, strict=True)]
    moved = np.diff(history, axis=0)
    work = np.cumsum([d @ (F[n] + F[n + 1]) / 2 for n, d in enumerate(moved)])
    lost = np.cumsum([d @ C @ d / dt for d in moved])
    np.testing.assert_allclose(run.certificate.energy, energy, rtol=1e-9)
    np.testing.assert_allclose(run.certificate.work[1:], work, atol=1e-9)
    np.testing.assert_allclose(run.certificate.dissipation[1:], lost, atol=1e-9)
    assert lost[-1] > 0.1
    assert abs(work[-1]) > 0.01
    assert run.certificate.energy_drift < 1e-12
    assert run.certificate.residual < 1e-12


def test_explicit_steps_are_central_differences():
    run, (M, C, K, F, u, v, dt), free = loaded("lumped", "explicit")
    before = u - dt * v + dt**2 / 2 * np.linalg.solve(M, F[0] - C @ v - K @ u)
    energy, work, lost = [], [0.0], [0.0]
    for n, force in enumerate(F):
        np.testing.assert_allclose(run.displacement[n].numpy()[free], u, rtol=0, atol=1e-10)
        rate = (u - before) / dt
        energy.append((rate @ M @ rate + u @ K @ before) / 2)
        # M (u⁺ − 2u + u⁻)/dt² + C (u⁺ − u⁻)/(2 dt) + K u = F
        right = force - K @ u + M @ (2 * u - before) / dt**2 + C @ before / (2 * dt)
        after = np.linalg.solve(M / dt**2 + C / (2 * dt), right)
        moved = (after - before) / 2
        work.append(work[-1] + moved @ force)
        lost.append(lost[-1] + moved @ C @ moved / dt)
        before, u = u, after
    np.testing.assert_allclose(run.certificate.energy, energy, rtol=1e-9)
    np.testing.assert_allclose(run.certificate.work, work[:-1], atol=1e-9)
    np.testing.assert_allclose(run.certificate.dissipation, lost[:-1], atol=1e-9)
    assert run.certificate.energy_drift < 1e-12
    assert run.certificate.residual < 1e-12


def test_energy_leaves_through_absorbing_sides_and_never_grows():
    mesh = QuadMesh.rectangle(1.0, 1.0, 16, 16)
    start = torch.exp(-100 * (mesh.nodes - 0.4).square().sum(1))
    run = WaveFE2d(mesh, 1.0, "absorbing", 0.03).run(None, 100, start)
    energy = run.certificate.energy
    assert (energy.diff() < 1e-12 * energy[0]).all()
    assert energy[-1] < 0.02 * energy[0]
    assert run.certificate.dissipation[-1].item() == pytest.approx((energy[0] - energy[-1]).item())


def test_explicit_and_newmark_differ_by_the_square_of_the_step():
    gaps = []
    for dt in (0.02, 0.01, 0.005):
        first = WaveFE2d(SMALL, 1.0, "clamped", dt, mass="lumped").run(None, round(1 / dt), sines(SMALL))
        other = WaveFE2d(SMALL, 1.0, "clamped", dt, mass="lumped", method="explicit")
        gaps.append((first.displacement - other.run(None, round(1 / dt), sines(SMALL)).displacement).abs().max().item())
    assert all(3.6 < coarse / fine < 4.4 for coarse, fine in itertools.pairwise(gaps)), gaps


@pytest.mark.parametrize("mesh", [distorted(9, 8), SMALL], ids=["sparse", "dense"])
def test_stability_limit_is_sharp(mesh):
    solver = WaveFE2d(mesh, 1.2, "clamped", 1e-3, mass="lumped", method="explicit")
    free = solver.free.numpy()
    M, K = (A.toarray()[np.ix_(free, free)] for A in (solver.M, solver.K))
    limit = 2 / math.sqrt(np.linalg.eigvals(np.linalg.solve(M, K)).real.max())
    start = normal(len(mesh.nodes))
    stable = WaveFE2d(mesh, 1.2, "clamped", limit * (1 - 1e-6), mass="lumped", method="explicit")
    assert stable.run(None, 3000, start).certificate.energy_drift < 1e-8
    with pytest.raises(ValueError, match=rf"dt must be below .* {limit:.6g}, got {limit * (1 + 1e-6)}"):
        WaveFE2d(mesh, 1.2, "clamped", limit * (1 + 1e-6), mass="lumped", method="explicit")
    above = WaveFE2d(mesh, 1.2, "clamped", 10 * limit)  # no limit for Newmark's method
    assert above.run(None, 1000, start).certificate.energy_drift < 1e-8


# boundaries


def pulse(x, centre, width=0.25):
    return torch.exp(-(((x - centre) / width) ** 2))


def travelling(mesh, c, centre, width=0.25):
    """A pulse that moves to the right: u = g(x − ct), u_t = −c g′."""
    x = mesh.nodes[:, 0]
    g = pulse(x, centre, width)
    return g, c * 2 * (x - centre) / width**2 * g


@pytest.mark.parametrize(("kind", "sign"), [("clamped", -1), ("free", 1), ("absorbing", 0)])
@pytest.mark.parametrize("method", ["newmark", "explicit"])
def test_ends_of_a_channel_reflect_as_they_should(kind, sign, method):
    mesh, c, dt = channel(), 2.0, 0.005
    mass = "lumped" if method == "explicit" else "consistent"
    solver = WaveFE2d(mesh, c, {"right": kind}, dt, mass=mass, method=method)
    run = solver.run(None, 200, *travelling(mesh, c, centre=3.0))
    # After time 1 the front has gone 2: from 3 to the end at 4 and back to 3.
    wanted = sign * pulse(mesh.nodes[:, 0], 3.0)
    assert (run.displacement[-1] - wanted).abs().max() < 0.02
    kept = (run.certificate.energy[-1] / run.certificate.energy[0]).item()
    assert kept == pytest.approx(sign**2, abs=1e-3)


def test_part_of_a_wave_passes_a_jump_of_the_speed():
    """Across a jump u and ∂u/∂n are continuous: (c₂ − c₁)/(c₁ + c₂) comes back, one plus that goes on."""
    mesh, c1, c2 = channel(6.0, 480), 1.0, 2.0
    middle = mesh.nodes[mesh.quads].mean(1)[:, 0]
    c = torch.where(middle < 3, c1, c2).double()
    run = WaveFE2d(mesh, c, "free", 0.005).run(None, 300, *travelling(mesh, c1, centre=2.0))
    x, last = mesh.nodes[:, 0], run.displacement[-1]
    # After time 1.5: back to 3 − 0.5, and on to 3 + 0.5 · 2.
    assert last[(x - 2.5).abs() < 1e-9].mean().item() == pytest.approx(1 / 3, abs=0.01)
    assert last[(x - 4.0).abs() < 1e-9].mean().item() == pytest.approx(4 / 3, abs=0.02)


def test_one_word_holds_for_all_sides_but_the_hole():
    mesh = QuadMesh.rectangle(1.0, 1.0, 8, 8, hole=(0.5, 0.5, 0.2))
    held = torch.ones(len(mesh.nodes), dtype=torch.bool)
    held[WaveFE2d(mesh, 1.0, "clamped", 0.1).free] = False
    outer = ((mesh.nodes == 0) | (mesh.nodes == 1)).any(1)
    assert torch.equal(held, outer)
    both = WaveFE2d(mesh, 1.0, {**dict.fromkeys(mesh.sides, "clamped")}, 0.1)
    assert len(both.free) == len(mesh.nodes) - outer.sum() - len(mesh.sides["hole"].unique())
    only = WaveFE2d(mesh, 1.0, {"hole": "absorbing"}, 0.1)
    rim = np.flatnonzero(only.C.toarray().any(1))
    assert rim.tolist() == mesh.sides["hole"].unique().tolist()
    assert only.C.sum() == pytest.approx(len(mesh.sides["hole"]) / 8)  # the length of the rim


def test_clamped_nodes_stay_at_zero_whatever_they_start_with():
    run = WaveFE2d(SMALL, 1.0, {"left": "clamped"}, 0.1).run(torch.ones(6, 25), 5, torch.ones(25), torch.ones(25))
    left = SMALL.nodes[:, 0] == 0
    assert run.displacement[:, left].abs().max() == 0
    assert run.displacement[:, ~left].abs().min() > 0


# loads and batches


def test_batches_are_loops():
    mesh, steps = distorted(), 12
    nodes = len(mesh.nodes)
    f, u, v = normal(3, steps + 1, nodes), normal(3, nodes, seed=1), normal(nodes, seed=2)
    for options in ({}, {"mass": "lumped", "method": "explicit"}):
        solver = WaveFE2d(mesh, 1.0, "absorbing", 0.03, **options)
        whole = solver.run(f, steps, u, v)
        assert whole.displacement.shape == (3, steps + 1, nodes)
        for one in range(3):
            single = solver.run(f[one], steps, u[one], v)
            torch.testing.assert_close(whole.displacement[one], single.displacement, rtol=0, atol=1e-12)
            for name in ("energy", "work", "dissipation"):
                found, wanted = getattr(whole.certificate, name)[one], getattr(single.certificate, name)
                torch.testing.assert_close(found, wanted, rtol=1e-11, atol=1e-12)
        shared = solver.run(f[0], steps, u)
        torch.testing.assert_close(
            shared.displacement[1], solver.run(f[0], steps, u[1]).displacement, rtol=0, atol=1e-12
        )
        started = solver.run(None, steps, u)
        torch.testing.assert_close(
            started.displacement[2], solver.run(None, steps, u[2]).displacement, rtol=0, atol=1e-12
        )


def test_a_function_is_the_load_of_its_values():
    def force(at, t):
        return torch.stack([at[:, 0] * math.cos(t), at[:, 1] + t])

    solver = WaveFE2d(SMALL, 1.0, "free", 0.1)
    values = torch.stack([force(SMALL.nodes, 0.1 * n) for n in range(8)], dim=1)
    for given, wanted in ((force, values), (lambda at, t: force(at, t)[1], values[1])):
        torch.testing.assert_close(
            solver.run(given, 7).displacement, solver.run(wanted, 7).displacement, rtol=0, atol=1e-13
        )


def test_a_function_is_asked_once_for_each_time():
    asked = []

    def force(at, t):
        asked.append(t)
        return at[:, 0] * len(asked)

    run = WaveFE2d(SMALL, 1.0, "free", 0.1).run(force, 3)
    assert asked == run.times.tolist()
    values = SMALL.nodes[:, 0] * torch.arange(1.0, 5.0, dtype=torch.float64)[:, None]
    assert torch.equal(run.displacement, WaveFE2d(SMALL, 1.0, "free", 0.1).run(values, 3).displacement)


def test_a_load_that_is_the_same_everywhere_drops_the_body_freely():
    run = WaveFE2d(distorted(), 1.7, "free", 0.1).run(lambda at, t: torch.full((len(at),), 3.0), 20)
    wanted = (1.5 * run.times**2)[:, None].expand_as(run.displacement)  # u_tt = f
    torch.testing.assert_close(run.displacement, wanted, rtol=0, atol=1e-11)


def test_no_motion_is_certified():
    run = WaveFE2d(SMALL, 1.0, "clamped", 0.1).run(None, 3)
    assert run.displacement.abs().max() == 0
    assert run.certificate.energy_drift == run.certificate.residual == 0.0
    torch.testing.assert_close(run.times, torch.tensor([0.0, 0.1, 0.2, 0.3], dtype=torch.float64))


def test_certificate_tells_of_a_broken_step(monkeypatch):
    solver = WaveFE2d(SMALL, 1.0, "clamped", 0.1)

    class Off:
        def __init__(self, factor):
            self.factor = factor

        def solve(self, right):
            return self.factor.solve(right) * (1 + 1e-6)

    monkeypatch.setattr(solver, "_factor", Off(solver._factor))
    certificate = solver.run(None, 20, sines(SMALL)).certificate
    assert certificate.energy_drift > 1e-8
    assert certificate.residual > 1e-8


def test_single_precision_and_gradients_are_taken_as_values():
    start = sines(SMALL).float().requires_grad_()
    c = torch.full((16,), 1.25, requires_grad=True)
    run = WaveFE2d(SMALL, c, "clamped", 0.1).run(None, 5, start)
    wanted = WaveFE2d(SMALL, torch.tensor(1.25), "clamped", 0.1).run(None, 5, start.detach().double())
    assert run.displacement.dtype == torch.float64
    assert not run.displacement.requires_grad
    torch.testing.assert_close(run.displacement, wanted.displacement, rtol=0, atol=1e-14)


def test_a_default_device_changes_nothing():
    run = WaveFE2d(SMALL, 1.0, {"left": "clamped"}, 0.1).run(None, 3, sines(SMALL))
    with torch.device("meta"):  # where nothing could be computed
        again = WaveFE2d(SMALL, 1.0, {"left": "clamped"}, 0.1).run(None, 3, sines(SMALL))
        mesh = QuadMesh.rectangle(1.0, 1.0, 4, 4, hole=(0.5, 0.5, 0.2))
        data = draw(1, frames=1)
    assert torch.equal(run.displacement, again.displacement)
    assert torch.equal(run.times, again.times)
    assert again.on_grid(4).device == mesh.nodes.device == torch.device("cpu")
    assert torch.equal(data.frames, draw(1, frames=1).frames)


# meshes and sampling


@pytest.mark.parametrize(
    ("hole", "area"),
    [
        ((0.6, 0.5, 0.3), math.pi * 0.09),
        ((0.6, 0.5, 0.4, 0.2), math.pi * 0.08),
        (lambda at: (at[:, 0] > 0.5) & (at[:, 0] < 1.0) & (at[:, 1] > 0.25) & (at[:, 1] < 0.75), 0.25),
    ],
    ids=["circle", "ellipse", "function"],
)
def test_hole_is_cut_out(hole, area):
    mesh = QuadMesh.rectangle(1.5, 1.0, 90, 60, hole)
    solver = WaveFE2d(mesh, 1.0, "free", 0.1)
    assert solver.M.sum() == pytest.approx(1.5 - area, abs=0.01)
    assert len(mesh.quads) == pytest.approx((1.5 - area) * 3600, rel=0.01)
    assert torch.equal(mesh.quads.unique(), torch.arange(len(mesh.nodes)))
    assert len(mesh.nodes) < 91 * 61
    rim = mesh.sides["hole"]
    assert rim.unique(return_counts=True)[1].eq(2).all()  # closed
    assert {name: len(side) for name, side in mesh.sides.items() if name != "hole"} == {
        "left": 60, "right": 60, "bottom": 90, "top": 90,
    }  # fmt: skip
    # Every edge runs with its element on the left, so the rim runs clockwise around the hole: its area is negative.
    ends = mesh.nodes[rim]
    turned = (ends[:, 0, 0] * ends[:, 1, 1] - ends[:, 1, 0] * ends[:, 0, 1]).sum().item() / 2
    assert -turned == pytest.approx(area, abs=0.01)


def test_wave_passes_around_a_hole():
    mesh = QuadMesh.rectangle(1.0, 1.0, 16, 16, hole=(0.5, 0.5, 0.2))
    run = WaveFE2d(mesh, 1.0, "clamped", 0.02).run(None, 60, torch.exp(-200 * (mesh.nodes - 0.2).square().sum(1)))
    images = run.on_grid(16)
    mask = mesh.sampler(16).mask
    assert images.shape == (61, 16, 16)
    assert (~mask).sum() == 256 - len(mesh.quads)
    assert images[:, ~mask].abs().max() == 0
    assert images[-1, 12:, 12:].abs().max() > 0.02
    assert run.certificate.energy_drift < 1e-12


def test_pixels_are_centres_rows_upward():
    mesh = QuadMesh.rectangle(2.0, 1.0, 5, 3)
    x, y = mesh.nodes.T
    image = mesh.sampler(4)(torch.stack([x, y, x * y]))
    at = (torch.arange(4, dtype=torch.float64) + 0.5) / 4
    torch.testing.assert_close(image[0], (2 * at).expand(4, 4))
    torch.testing.assert_close(image[1], at[:, None].expand(4, 4))
    torch.testing.assert_close(image[2], 2 * at[:, None] * at)  # bilinear fields are exact


def test_sampling_a_distorted_mesh_is_exact_for_linear_fields():
    mesh = distorted(9, 8)
    x, y = mesh.nodes.T
    sampler = mesh.sampler(23)
    assert sampler.mask.all()
    xs, ys = mesh.sampler(23)(torch.stack([x, y]))
    torch.testing.assert_close(sampler(1 - 2 * x + 3 * y), 1 - 2 * xs + 3 * ys)
    torch.testing.assert_close(xs[0], 1.5 * (torch.arange(23, dtype=torch.float64) + 0.5) / 23)
    assert sampler(torch.ones(2, 3, len(mesh.nodes))).shape == (2, 3, 23, 23)
    torch.testing.assert_close(sampler(torch.ones(len(mesh.nodes))), torch.ones(23, 23))


def test_points_beside_a_mesh_that_fills_no_rectangle():
    angle = torch.tensor(0.4, dtype=torch.float64)
    turn = torch.stack([torch.stack([angle.cos(), -angle.sin()]), torch.stack([angle.sin(), angle.cos()])])
    plain = QuadMesh.rectangle(1.0, 1.0, 3, 3)
    turned = QuadMesh(plain.nodes @ turn.T, plain.quads, plain.sides)
    mask = turned.sampler(64).mask
    side = (angle.sin() + angle.cos()).item()  # of the bounding square
    assert mask.double().mean().item() == pytest.approx(1 / side**2, abs=0.02)
    for name in ("K", "M"):
        np.testing.assert_allclose(
            getattr(WaveFE2d(turned, 1.0, "free", 0.1), name).toarray(),
            getattr(WaveFE2d(plain, 1.0, "free", 0.1), name).toarray(),
            atol=1e-14,
        )


def test_mesh_keeps_its_own_copy():
    nodes, quads = ONE.nodes.clone(), ONE.quads.clone()
    mesh = QuadMesh(nodes, quads)
    nodes += 1
    quads += 1
    assert torch.equal(mesh.nodes, ONE.nodes)
    assert torch.equal(mesh.quads, ONE.quads)
    assert list(mesh.sides) == ["boundary"]
    assert mesh.sides["boundary"].shape == (4, 2)


# the data


def draw(n=4, seed=0, **options):
    return wave_dataset(n, torch.Generator().manual_seed(seed), **{"resolution": 16, **options})


def test_data_comes_from_the_generator_alone_and_the_first_are_always_the_same():
    first, again, fewer, other = draw(), draw(), draw(2), draw(seed=1)
    for name in ("fields", "frames", "parameters"):
        assert torch.equal(getattr(first, name), getattr(again, name))
        assert torch.equal(getattr(first, name)[:2], getattr(fewer, name))
        assert not torch.equal(getattr(first, name), getattr(other, name))


def test_data_are_the_waves_that_their_parameters_say():
    data = draw(3, dtype=torch.float64, frames=4)
    assert data.fields.shape == (3, 1, 16, 16)
    assert data.frames.shape == (3, 4, 16, 16)
    assert len(data.parameter_names) == data.parameters.shape[1] == 7
    torch.testing.assert_close(data.times, 0.06 * torch.arange(1, 5, dtype=torch.float64))
    mesh = QuadMesh.rectangle(1.0, 1.0, 16, 16)
    at = (torch.arange(16, dtype=torch.float64) + 0.5) / 16
    for one in range(3):
        value = dict(zip(data.parameter_names, data.parameters[one].tolist(), strict=True))
        distance = torch.hypot(at - value["inclusion_x"], (at - value["inclusion_y"])[:, None])
        field = torch.where(distance < value["inclusion_radius"], data.parameters[one, 3], 1.0)
        torch.testing.assert_close(data.fields[one, 0], field)
        start = torch.exp(
            -((mesh.nodes[:, 0] - value["pulse_x"]) ** 2 + (mesh.nodes[:, 1] - value["pulse_y"]) ** 2)
            / (2 * value["pulse_width"] ** 2)
        )
        run = WaveFE2d(mesh, field.flatten(), "clamped", 0.03).run(None, 8, start)
        # At a pixel's centre the mean of its element's corners.
        image = run.displacement[2::2].view(4, 17, 17).unfold(1, 2, 1).unfold(2, 2, 1).mean((-1, -2))
        torch.testing.assert_close(data.frames[one], image, rtol=0, atol=1e-12)


def test_parameters_keep_their_bounds_and_fill_them():
    data = draw(200, frames=1, interval=0.01, resolution=4, dtype=torch.float64)
    value = dict(zip(data.parameter_names, data.parameters.T, strict=True))
    bounds = {
        "pulse_x": (0.18, 0.82), "pulse_y": (0.18, 0.82), "pulse_width": (0.05, 0.07), "speed_ratio": (0.5, 2.0),
        "inclusion_x": (0.36, 0.64), "inclusion_y": (0.36, 0.64), "inclusion_radius": (0.1, 0.18),
    }  # fmt: skip
    for name, (low, high) in bounds.items():
        assert low <= value[name].min() < low + 0.05 * (high - low), name
        assert high - 0.05 * (high - low) < value[name].max() <= high, name
    assert value["speed_ratio"].log().mean().abs() < 3 * math.log(4) / math.sqrt(12 * 200)  # uniform in the logarithm
    gap = torch.hypot(value["pulse_x"] - value["inclusion_x"], value["pulse_y"] - value["inclusion_y"])
    assert (gap >= value["inclusion_radius"]).all()
    assert (gap <= value["inclusion_radius"] + 0.2 + 1e-12).all()


def test_frames_keep_their_strength_and_show_the_inclusion():
    data = draw(24, dtype=torch.float64, resolution=24)
    strength = data.frames.square().mean((0, 2, 3)).sqrt()
    assert strength.max() < 2 * strength.min()
    assert data.frames.square().mean((1, 2, 3)).sqrt().min() > 0.02
    strong = (data.parameters[:, 3].log().abs() > 0.4).nonzero().flatten()
    mesh = QuadMesh.rectangle(1.0, 1.0, 24, 24)
    for one in strong.tolist():
        x, y, width = data.parameters[one, :3]
        start = torch.exp(-((mesh.nodes - torch.stack([x, y])) ** 2).sum(1) / (2 * width**2))
        plain = WaveFE2d(mesh, 1.0, "clamped", 0.02).run(None, 30, start).on_grid(24)[3::3]
        change = (data.frames[one] - plain).flatten(1).norm(dim=1) / data.frames[one].flatten(1).norm(dim=1)
        assert change[-1] > 0.1, one


def test_absorbing_data_lose_what_leaves():
    kept, lost = draw(frames=30), draw(frames=30, boundary="absorbing")
    assert torch.equal(kept.fields, lost.fields)
    assert lost.frames[:, -1].norm() < 0.4 * kept.frames[:, -1].norm()
    assert kept.frames.dtype == torch.float32


# bad input


NAN = float("nan")
FLAT = torch.tensor([[0.0, 0.0], [1.0, 0.0], [2.0, 0.0], [0.0, 1.0]])
DENTED = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.2, 0.2], [0.0, 1.0]])
SQUARE = torch.tensor([[0, 1, 2, 3]])
EDGES = torch.tensor([[0, 1], [1, 2], [2, 3], [3, 0]])


def solver(**options):
    return WaveFE2d(**{"mesh": SMALL, "c": 1.0, "boundary": "clamped", "dt": 0.1, **options})


def rectangle(**options):
    return QuadMesh.rectangle(**{"width": 1.0, "height": 1.0, "columns": 2, "rows": 2, **options})


@pytest.fixture
def plain(monkeypatch):
    """Signatures stand aside: the errors are those that a user sees."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)


@pytest.mark.usefixtures("plain")
@pytest.mark.parametrize(
    ("call", "words", "error"),
    [
        (lambda: QuadMesh(ONE.nodes, SQUARE.flip(1)), "quads must be convex .* element 0", ValueError),
        (lambda: QuadMesh(DENTED, SQUARE), "quads must be convex .* element 0", ValueError),
        (lambda: QuadMesh(FLAT, SQUARE), "quads must be convex .* element 0", ValueError),
        (lambda: QuadMesh(SMALL.nodes, torch.cat([SMALL.quads[:5], SMALL.quads[5:].flip(1)])), "element 5", ValueError),
        (lambda: QuadMesh(ONE.nodes, SQUARE + 1), "quads must name nodes 0 to 3, element 0", ValueError),
        (lambda: QuadMesh(SMALL.nodes, SQUARE), "quads must be convex|nodes must each be in an element", ValueError),
        (lambda: QuadMesh(torch.cat([ONE.nodes, ONE.nodes[:1]]), SQUARE), "nodes .* node 4 is in none", ValueError),
        (lambda: QuadMesh(ONE.nodes * NAN, SQUARE), "nodes must be finite, node 0", ValueError),
        (lambda: QuadMesh(ONE.nodes, SQUARE.repeat(3, 1)), "quads must share an edge by two", ValueError),
        (lambda: QuadMesh(ONE.nodes[:, :1], SQUARE), "nodes must be of shape", ValueError),
        (lambda: QuadMesh(ONE.nodes, SQUARE[:, :3]), "quads must be of shape", ValueError),
        (lambda: QuadMesh(ONE.nodes.long(), SQUARE), "nodes must be a tensor of floating-point", TypeError),
        (lambda: QuadMesh(ONE.nodes, SQUARE.double()), "quads must be a tensor of integers", TypeError),
        (lambda: QuadMesh(ONE.nodes.numpy(), SQUARE), "nodes must be a tensor", TypeError),
        (lambda: QuadMesh(ONE.nodes, SQUARE, {"all": EDGES[:3]}), "sides must hold", ValueError),
        (lambda: QuadMesh(ONE.nodes, SQUARE, {"all": EDGES[[0, 1, 2, 2]]}), "sides must hold", ValueError),
        (lambda: QuadMesh(ONE.nodes, SQUARE, {"all": EDGES.roll(1, 0) * 0}), "sides must hold", ValueError),
        (lambda: QuadMesh(ONE.nodes, SQUARE, [EDGES]), "sides must be a mapping", TypeError),
        (lambda: rectangle(width=0.0), "width", ValueError),
        (lambda: rectangle(height=NAN), "height", ValueError),
        (lambda: rectangle(columns=0), "columns", ValueError),
        (lambda: rectangle(rows=2.0), "rows", TypeError),
        (lambda: rectangle(hole=(0.5, 0.5, 2.0)), "hole must leave", ValueError),
        (lambda: rectangle(hole=(0.5, 0.5)), "hole must be", ValueError),
        (lambda: rectangle(hole=(0.5, 0.5, -1.0)), "hole's radius", ValueError),
        (lambda: rectangle(hole=0.2), "hole must be", TypeError),
        (lambda: rectangle(hole=lambda at: at), "hole must say true or false", ValueError),
        (lambda: SMALL.sampler(0), "n must be", ValueError),
        (lambda: SMALL.sampler(2)(torch.ones(24)), "values must be 25", ValueError),
        (lambda: solver(mesh=SMALL.nodes), "mesh must be a QuadMesh", TypeError),
        (lambda: solver(c=0.0), "c must be finite and above 0", ValueError),
        (lambda: solver(c=-torch.ones(16)), "c must be finite and above 0", ValueError),
        (lambda: solver(c=torch.full((25,), NAN)), "c must be finite", ValueError),
        (lambda: solver(c=torch.ones(17)), r"c must be .* of shape \(16,\) or \(25,\)", ValueError),
        (lambda: solver(c="fast"), "c must be", ValueError),
        (lambda: solver(c=torch.full((16,), 1 + 1j)), "c must be real", TypeError),
        (lambda: solver(c=lambda at: at), "c must return", ValueError),
        (lambda: solver(boundary="open"), "boundary must be one of", ValueError),
        (lambda: solver(boundary={"left": "open"}), "boundary.* must be one of", ValueError),
        (lambda: solver(boundary={"hole": "free"}), "boundary.* must be one of", ValueError),
        (lambda: solver(mesh=ONE), "boundary must leave a node free", ValueError),
        (lambda: solver(dt=0.0), "dt must be", ValueError),
        (lambda: solver(dt="small"), "dt must be", TypeError),
        (lambda: solver(dt=1e-200), "dt and c must .* got dt 1e-200", ValueError),
        (lambda: solver(dt=1e200), r"dt and c must .* got dt 1e\+200", ValueError),
        (lambda: solver(mass="diagonal"), "mass must be one of", ValueError),
        (lambda: solver(method="rk4"), "method must be one of", ValueError),
        (lambda: solver(method="explicit"), "mass must be 'lumped'", ValueError),
        (lambda: solver(method="explicit", mass="lumped", dt=5.0), "dt must be below .*, got 5.0", ValueError),
        (lambda: solver().run(None, 0), "steps must be", ValueError),
        (lambda: solver().run(None, 2.0), "steps must be", TypeError),
        (lambda: solver().run(torch.ones(2, 25), 2), "f must be of shape", ValueError),
        (lambda: solver().run(torch.ones(3, 25) * NAN, 2), "f must be finite", ValueError),
        (lambda: solver().run(lambda at, t: at, 2), "f must be a number a node", ValueError),
        (lambda: solver().run(lambda at, t: torch.ones(25 if t == 0 else 24), 2), "f must always", ValueError),
        (lambda: solver().run(1.0, 2), "f must be a tensor, a function", TypeError),
        (lambda: solver().run(None, 2, torch.ones(24)), "initial must be a number a node", ValueError),
        (lambda: solver().run(None, 2, torch.ones(25) / 0), "initial must be finite", ValueError),
        (lambda: solver().run(None, 2, torch.ones(25) * 1j), "initial must be real", TypeError),
        (lambda: solver().run(torch.ones(3, 25) * 1j, 2), "f must be real", TypeError),
        (lambda: solver().run(None, 2, None, torch.ones(1, 1, 25)), "velocity must be", ValueError),
        (lambda: solver().run(torch.ones(2, 3, 25), 2, torch.ones(3, 25)), "f, initial must have the same", ValueError),
        (lambda: solver().run(None, 2, torch.ones(0, 25)), "initial must have the same batch of at", ValueError),
        (lambda: wave_dataset(0, torch.Generator()), "n must be", ValueError),
        (lambda: wave_dataset(1, 0), "generator must be", TypeError),
        (lambda: draw(resolution=1), "resolution must be .* 2, got 1", ValueError),
        (lambda: draw(frames=0), "frames must be", ValueError),
        (lambda: draw(frames=2.5), "frames must be", TypeError),
        (lambda: draw(interval=0.0), "interval must be", ValueError),
        (lambda: draw(boundary="periodic"), "boundary must be", ValueError),
        (lambda: draw(dtype=torch.int64), "dtype must be", TypeError),
    ],
)  # fmt: skip
def test_bad_input_is_named(call, words, error):
    with pytest.raises(error, match=words):
        call()
