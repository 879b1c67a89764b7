"""Schedules against their definition, and simulated timelines against closed forms."""

import itertools

import pytest

from provenn.core.pipelines.schedule import bubble_fraction, clock_schedule
from provenn.core.pipelines.timeline import Task, Timeline, simulate, timeline

SIZES = list(itertools.product((1, 2, 3, 4, 8, 32), (1, 2, 3, 4, 8)))


@pytest.mark.parametrize(("m", "k"), SIZES)
def test_every_task_once_after_those_it_needs(m, k):
    clocks = clock_schedule(m, k)
    assert len(clocks) == m + k - 1
    when = {task: clock for clock, tasks in enumerate(clocks) for task in tasks}
    assert sum(len(tasks) for tasks in clocks) == m * k
    assert when.keys() == set(itertools.product(range(m), range(k)))
    for (i, j), clock in when.items():
        assert i + j == clock
        assert j == 0 or when[i, j - 1] < clock
        assert i == 0 or when[i - 1, j] < clock


@pytest.mark.parametrize(("m", "k"), SIZES)
def test_simulation_of_equal_tasks_is_the_closed_form(m, k):
    tasks = simulate(lambda kind, i, j: 2.0, m, k, communication=0.0, checkpointed=0)
    found = timeline(tasks, m, k)
    assert found.makespan == pytest.approx(2 * 2.0 * (m + k - 1), rel=1e-12)
    assert found.bubble == pytest.approx((k - 1) / (m + k - 1), abs=1e-12)
    assert found.theory == bubble_fraction(m, k) == (k - 1) / (m + k - 1)


@pytest.mark.parametrize(("m", "k"), SIZES)
def test_recomputation_overlaps_with_waiting(m, k):
    # Each micro-batch costs the last stage 1 + 2; the others have recomputed when their gradient comes.
    tasks = simulate(lambda kind, i, j: 2.0 if kind == "backward" else 1.0, m, k, 0.0, checkpointed=m)
    assert timeline(tasks, m, k).makespan == pytest.approx((m + k - 1) + 3 * m + 2 * (k - 1), rel=1e-12)


def test_simulated_tasks_keep_their_order_with_unequal_costs_and_communication():
    m, k, comm = 5, 4, 0.7
    cost = {(i, j): 1 + (7 * i + 3 * j) % 5 for i in range(m) for j in range(k)}
    tasks = simulate(lambda kind, i, j: cost[i, j], m, k, comm, checkpointed=m - 1)
    at = {(task.kind, task.micro_batch, task.stage): task for task in tasks}
    assert len(at) == len(tasks) == 2 * m * k + (m - 1) * k
    barrier = max(task.end for task in tasks if task.kind == "forward")
    for (kind, i, j), task in at.items():
        assert task.end - task.start == pytest.approx(cost[i, j])
        if kind == "forward":
            assert j == 0 or task.start >= at["forward", i, j - 1].end + comm - 1e-9
        else:
            assert task.start >= barrier
        if kind == "backward":
            assert j == k - 1 or task.start >= at["backward", i, j + 1].end + comm - 1e-9
            assert ("recompute", i, j) in at or i == m - 1
    for j in range(k):  # one at a time, in order
        of_stage = sorted((task for task in tasks if task.stage == j), key=lambda task: task.start)
        for first, second in itertools.pairwise(of_stage):
            assert second.start >= first.end - 1e-9
        assert [task.micro_batch for task in of_stage if task.kind == "backward"] == [4, 3, 2, 1, 0]


def test_time_between_the_passes_is_no_bubble():
    tasks = [Task("forward", 0, 0, 1.0, 2.0), Task("backward", 0, 0, 10.0, 13.0)]
    found = timeline(tasks, 1, 1)
    assert (found.makespan, found.bubble) == (4.0, 0.0)


def test_gantt_chart_has_a_bar_a_task_where_it_belongs():
    tasks = simulate(lambda kind, i, j: 1.0, 3, 2, 0.0, checkpointed=3)
    figure = timeline(tasks, 3, 2).plot()
    bars = {(bar.get_x(), bar.get_y() + bar.get_height() / 2, bar.get_width()) for bar in figure.axes[0].patches}
    assert bars == {(task.start, task.stage, task.end - task.start) for task in tasks}
    assert [label.get_text() for label in figure.axes[0].get_legend().get_texts()] == [
        "forward",
        "recompute",
        "backward",
    ]
    assert "25.0%" in figure.axes[0].get_title()


def test_timelines_survive_json():
    found = timeline(simulate(lambda kind, i, j: 1.0, 2, 2, 0.0, checkpointed=1), 2, 2)
    assert Timeline.from_json(found.to_json()) == found


def test_bad_input_is_refused_by_name():
    for call in (clock_schedule, bubble_fraction):
        with pytest.raises(ValueError, match="m must"):
            call(0, 1)
        with pytest.raises(ValueError, match="k must"):
            call(1, 0)
