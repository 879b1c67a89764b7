"""GPipe's mechanisms: memory, bubbles, batch statistics, skips, cuts and the simulator."""

import copy

import pytest
import torch
from runtime.pipeline_networks import Count, Pop, Sleep, Stash
from torch import nn

from provenn.core.experiment.accounting import TensorMemory
from provenn.core.pipelines.links import Parcel, Route
from provenn.runtime import (
    DeferredBatchNorm,
    GPipe,
    balance_by_size,
    balance_by_time,
    convert_deferred_batch_norm,
    optimal_partition,
    pipeline_report,
    skippable,
)
from provenn.runtime._gpipe_stage import Call, Stage


def equal_stages(stages, forward, backward=0.0):
    return nn.Sequential(*(Sleep(forward, backward) for _ in range(stages)))


@pytest.mark.parametrize(("backend", "m", "k"), [("thread", 4, 4), ("thread", 6, 2), ("process", 4, 3)])
def test_measured_bubble_is_that_of_theory(backend, m, k):
    # Sleeping needs no processor, and the shortest of a few runs is the one that other work has disturbed least.
    pipe = GPipe(equal_stages(k, 0.1, 0.1), [1] * k, chunks=m, checkpoint="never", backend=backend)
    x = torch.ones(m, 2)
    found = []
    for _ in range(4):
        pipe(x).sum().backward()
        found.append(pipe.timeline())
    pipe.close()
    best = min(found, key=lambda one: one.makespan)
    assert len(best.tasks) == 2 * m * k
    assert best.bubble == pytest.approx((k - 1) / (m + k - 1), rel=0.1)
    assert best.theory == (k - 1) / (m + k - 1)


def test_serial_stages_do_not_overlap():
    pipe = GPipe(equal_stages(3, 0.01), [1, 1, 1], chunks=2, backend="serial")
    pipe(torch.ones(4, 2))
    assert pipe.timeline().bubble == pytest.approx(2 / 3, abs=0.1)


def test_the_timeline_keeps_every_task_and_follows_the_last_call():
    pipe = GPipe(equal_stages(2, 0.0), [1, 1], chunks=4, checkpoint="except_last")
    with pytest.raises(RuntimeError, match="no timeline"):
        pipe.timeline()
    y = pipe(torch.ones(8, 2))
    assert {task.kind for task in pipe.timeline().tasks} == {"forward"}
    y.sum().backward()
    kinds = [task.kind for task in pipe.timeline().tasks]
    assert [kinds.count(kind) for kind in ("forward", "recompute", "backward")] == [8, 6, 8]
    for stage in range(2):
        of_stage = [task for task in pipe.timeline().tasks if task.stage == stage]
        assert [task.micro_batch for task in of_stage if task.kind == "forward"] == [0, 1, 2, 3]
        assert [task.micro_batch for task in of_stage if task.kind == "backward"] == [3, 2, 1, 0]


def test_a_recomputation_starts_before_its_gradient_arrives():
    pipe = GPipe(equal_stages(2, 0.03, 0.1), [1, 1], chunks=2, checkpoint="always")
    pipe(torch.ones(2, 2)).sum().backward()
    at = {(task.kind, task.stage, task.micro_batch): task for task in pipe.timeline().tasks}
    assert at["recompute", 0, 1].start < at["backward", 1, 1].end
    assert at["backward", 0, 1].start >= at["backward", 1, 1].end
    assert at["backward", 0, 0].start >= at["backward", 0, 1].end


def deep(layers, width):
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Sequential(nn.Linear(width, width), nn.Tanh()) for _ in range(layers)))


def stage_peak(layers, m, checkpointed, samples=64, width=32):
    """The most bytes that one real stage brings to life, in outputs of a layer for the whole mini-batch."""
    stage = Stage(0, deep(layers, width), 1)
    stage.layers.requires_grad_(False)  # the gradients of parameters are no activations
    call = Call(0, m, checkpointed, 0, grad=True)
    x = torch.ones(samples, width)
    with TensorMemory() as memory:
        for i, part in enumerate(x.chunk(m)):
            stage.forward(call, i, Parcel((part.clone(),), (True,)))
        for i in reversed(range(m)):
            if i < checkpointed:
                stage.recompute(call, i, False)
            stage.backward(call, i, [torch.ones(samples // m, width)])
    return memory.peak / (samples * width * 4)


@pytest.mark.parametrize("m", [1, 4, 8, 32])
@pytest.mark.parametrize("layers", [4, 16])
def test_peak_activation_memory_of_a_stage_is_the_paper_s(layers, m):
    # Every layer keeps one tensor, its tanh. Inputs of all micro-batches stay: 1; of the micro-batch at hand there are
    # those of the layers and three more at once: the gradients that come and go, and a linear map's output.
    assert stage_peak(layers, m, checkpointed=m) == pytest.approx(1 + (layers + 3) / m, rel=0.02)
    assert stage_peak(layers, m, checkpointed=0) == pytest.approx(1 + layers + 3 / m, rel=0.02)


def test_recomputation_and_cutting_together_save_what_neither_does_alone():
    n, k, m = 16, 4, 8
    plain = stage_peak(n, 1, 0)
    assert stage_peak(n // k, m, m) < plain / 8
    assert stage_peak(n // k, m, 0) > plain / k
    assert stage_peak(n, 1, 1) > 0.9 * plain


@pytest.mark.parametrize("backend", ["serial", "thread", "process"])
@pytest.mark.parametrize("momentum", [0.1, None])
def test_deferred_statistics_are_those_of_the_mini_batch(backend, momentum):
    torch.manual_seed(0)
    plain = nn.BatchNorm1d(3, momentum=momentum).double()
    module = nn.Sequential(copy.deepcopy(plain), nn.Linear(3, 2).double())
    module = convert_deferred_batch_norm(module, chunks=4)
    pipe = GPipe(module, [1, 1], chunks=4, checkpoint="always", backend=backend)
    for step in range(3):
        x = 100 + (step + 1) * torch.randn(11, 3, dtype=torch.float64)  # 3, 3, 3 and 2 samples
        before = plain.running_var.clone()
        plain(x)
        pipe(x).square().sum().backward()
        layer = module[0]
        torch.testing.assert_close(layer.running_mean, plain.running_mean, rtol=1e-9, atol=1e-12)
        share = 0.1 if momentum else 1 / (step + 1)
        moved = (plain.running_var - (1 - share) * before) / share  # the unbiased variance of the batch
        plain.running_var.copy_((1 - share) * before + share * moved * 10 / 11)
        torch.testing.assert_close(layer.running_var, plain.running_var, rtol=1e-9, atol=1e-12)
        assert layer.num_batches_tracked == step + 1
    pipe.close()
    torch.testing.assert_close(module[0].eval()(x), plain.eval()(x), rtol=1e-9, atol=1e-12)


def test_each_micro_batch_is_normalised_by_itself():
    x = torch.randn(8, 3, generator=torch.Generator().manual_seed(0))
    pipe = GPipe(nn.Sequential(DeferredBatchNorm(3, chunks=2), nn.Identity()), [1, 1], chunks=2)
    wanted = torch.cat([nn.BatchNorm1d(3)(part) for part in x.chunk(2)])
    torch.testing.assert_close(pipe(x), wanted)


def test_fewer_micro_batches_than_chunks_still_update_the_statistics():
    layer = DeferredBatchNorm(3, chunks=4)
    pipe = GPipe(nn.Sequential(layer), [1], chunks=4, checkpoint="always")
    with pytest.warns(UserWarning, match="3 micro-batches"):
        pipe(torch.randn(6, 3)).sum().backward()
    assert layer.num_batches_tracked == 1


def test_deferred_layer_by_itself_commits_once_a_mini_batch():
    layer = DeferredBatchNorm(3, chunks=2).double()
    parts = [1e4 + torch.randn(n, 3, 5, dtype=torch.float64) for n in (4, 2)]
    layer(parts[0])
    assert layer.running_mean.abs().max() == 0
    layer(parts[1])
    both = torch.cat(parts).transpose(0, 1).flatten(1)
    torch.testing.assert_close(layer.running_mean, 0.1 * both.mean(1), rtol=1e-9, atol=0)
    torch.testing.assert_close(layer.running_var, 0.9 + 0.1 * both.var(1, correction=0), rtol=1e-9, atol=0)


def test_conversion_keeps_tensors_names_and_what_is_no_batch_norm():
    inner = nn.BatchNorm2d(3, eps=1e-3, momentum=0.2)
    bare = nn.BatchNorm1d(3, track_running_stats=False)
    module = nn.Sequential(nn.Sequential(inner, nn.LayerNorm(3)), bare, inner).eval()
    names = list(module.state_dict())
    found = convert_deferred_batch_norm(module, 4)
    assert found is module
    assert list(found.state_dict()) == names
    assert isinstance(found[0][0], DeferredBatchNorm)
    assert found[2] is found[0][0]
    assert found[0][0].weight is inner.weight
    assert found[0][0].running_mean is inner.running_mean
    assert (found[0][0].eps, found[0][0].momentum, found[0][0].chunks, found[0][0].training) == (1e-3, 0.2, 4, False)
    assert found[1] is bare
    assert convert_deferred_batch_norm(found, 2)[2].chunks == 2
    assert isinstance(convert_deferred_batch_norm(nn.BatchNorm1d(2)), DeferredBatchNorm)


@pytest.mark.parametrize("backend", ["serial", "thread", "process"])
def test_ordinary_batch_norm_is_not_updated_again_by_recomputation(backend):
    torch.manual_seed(0)
    plain = nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 2)).double()
    module = copy.deepcopy(plain)
    x = torch.randn(9, 3, dtype=torch.float64)
    torch.cat([plain(part) for part in x.chunk(3)]).square().sum().backward()
    pipe = GPipe(module, [1, 1], chunks=3, checkpoint="always", backend=backend)
    pipe(x).square().sum().backward()
    pipe.close()
    assert module[0].num_batches_tracked == 3
    torch.testing.assert_close(module[0].running_mean, plain[0].running_mean, rtol=1e-12, atol=0)
    torch.testing.assert_close(module[0].weight.grad, plain[0].weight.grad, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("backend", ["serial", "thread", "process"])
@pytest.mark.parametrize("checkpoint", ["always", "never"])
def test_a_skip_from_stage_1_to_stage_4_is_sent_once_and_straight(backend, checkpoint):
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(3, 3), Stash(3), nn.Tanh(), nn.Linear(3, 3), Pop(), nn.Linear(3, 2)).double()
    plain = copy.deepcopy(module)
    x = torch.randn(8, 3, dtype=torch.float64, requires_grad=True)
    plain(x).square().sum().backward()
    wanted, x.grad = x.grad, None
    pipe = GPipe(module, [1, 1, 1, 1, 2], chunks=4, checkpoint=checkpoint, backend=backend)
    pipe(x).square().sum().backward()
    pipe.close()
    torch.testing.assert_close(x.grad, wanted, rtol=1e-9, atol=1e-12)
    for one, other in zip(module.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-9, atol=1e-12)
    skip, boundary = 8 * 3 * 8, {(j, j + 1, 0) for j in range(4)} | {(j + 1, j, 0) for j in range(4)}
    traffic = pipe.traffic
    assert traffic.keys() == boundary | {(1, 4, 1), (4, 1, 1)}
    assert traffic[Route(1, 4, 1)] == traffic[Route(4, 1, 1)] == (4, skip)
    assert all(traffic[route] == (4, skip) for route in boundary)


@skippable(stash=["a"])
class NamesItWrong(nn.Module):
    def forward(self, x):
        return x, {"b": x}


@skippable(stash=["a"])
class ForgetsThePair(nn.Module):
    def forward(self, x):
        return x


def test_skips_that_do_not_match_are_refused():
    for layers, words in (
        ([Stash(2), nn.Tanh()], "no later layer pops"),
        ([Pop(), Stash(2)], "no layer before stashes"),
        ([Stash(2), Stash(2), Pop()], "stashed twice"),
        ([Stash(2), Pop(), Pop()], "popped twice"),
    ):
        with pytest.raises(ValueError, match=words):
            GPipe(nn.Sequential(*layers), [1] * len(layers))
    with pytest.raises(ValueError, match=r"must stash \['a'\], got \['b'\]"):
        NamesItWrong()(torch.ones(1, 2))
    with pytest.raises(TypeError, match="a dict of tensors"):
        ForgetsThePair()(torch.ones(1, 2))
    with pytest.raises(RuntimeError, match="no layer before it has stashed"):
        Pop()(torch.ones(1, 2))


def test_skippable_layers_keep_their_class_and_parameter_names():
    assert list(Stash(2).state_dict()) == ["layer.weight", "layer.bias"]
    assert isinstance(Stash(2), Stash)
    x = torch.randn(3, 2)
    module = nn.Sequential(Stash(2), nn.Tanh(), Pop())
    torch.testing.assert_close(module(x), 2 * module[0].layer(x).tanh() + x.sin())


def test_balance_by_time_finds_the_slow_layers():
    module = nn.Sequential(*(Sleep(cost, cost) for cost in (0.01, 0.01, 0.01, 0.03, 0.001, 0.001)))
    before = copy.deepcopy(module.state_dict())
    assert balance_by_time(2, module, torch.ones(2, 2)) == [3, 3]
    assert all(one.grad is None for one in module.parameters())
    assert all(torch.equal(one, before[name]) for name, one in module.state_dict().items())


def test_balance_by_time_counts_two_passes_forward_and_one_backward():
    # 2 · 10 + 40 against 2 · 30 + 0 and 2 · 30: only with the forward pass counted twice are they even.
    module = nn.Sequential(Sleep(0.01, 0.04), Sleep(0.03, 0.0), Sleep(0.0, 0.06), Sleep(0.03, 0.0))
    assert balance_by_time(2, module, torch.ones(2, 2), rounds=3) == [2, 2]


def test_balance_by_size_weighs_parameters_and_activations():
    heavy = nn.Sequential(nn.Linear(100, 100), nn.Linear(100, 2), nn.Tanh(), nn.Tanh(), nn.Linear(2, 100))
    assert balance_by_size(2, heavy, torch.ones(1, 100)) == [1, 4]
    # activations of 1000 samples alone: 400, 8, 8, 8 and 400 kB
    assert balance_by_size(2, heavy, torch.ones(1000, 100), param_scale=0.0) in ([2, 3], [3, 2])
    # a micro-batch of a few samples: parameters again
    assert balance_by_size(2, heavy, torch.ones(1000, 100), chunks=1000) == [1, 4]


def test_balance_by_size_works_with_skips_and_leaves_the_generator():
    module = nn.Sequential(Stash(2), nn.Dropout(), Pop())
    state = torch.get_rng_state()
    assert sum(balance_by_size(2, module, torch.ones(4, 2))) == 3
    assert sum(balance_by_time(2, module, torch.ones(4, 2))) == 3
    assert torch.equal(torch.get_rng_state(), state)


def test_both_methods_of_partition():
    assert optimal_partition([5, 1, 1, 1, 1, 1], 2) == [1, 5]
    assert optimal_partition([1.0] * 6, 3, method="blocks") == [2, 2, 2]


@pytest.mark.parametrize("k", [2, 4, 8])
@pytest.mark.parametrize("m", [1, 4, 32])
def test_simulated_makespan_follows_the_law(m, k):
    found = pipeline_report([1.0] * 16, m, k, checkpoint="never", backward=2.0)
    assert found.makespan == pytest.approx(3 * 16 / k * (m + k - 1) / m, rel=1e-12)
    assert found.bubble == pytest.approx((k - 1) / (m + k - 1), rel=1e-12)
    assert found.balance == (16 // k,) * k


def test_simulated_memory_is_the_closed_form():
    n, k, m = 16, 4, 8
    layers = n // k
    assert pipeline_report([1.0] * n, m, k, checkpoint="never").peak_memory == (layers,) * k
    always = pipeline_report([1.0] * n, m, k, checkpoint="always").peak_memory
    assert always == pytest.approx([1 + (layers - 1) / m] * k)
    assert pipeline_report([1.0] * n, m, k, checkpoint="except_last").peak_memory == pytest.approx(always)
    assert pipeline_report([1.0] * n, 1, 1, checkpoint="never").peak_memory == (n,)


def test_communication_lengthens_the_simulated_pass():
    # Each of the K − 1 boundaries is on the way of the first micro-batch, once forward and once backward.
    free, paid = (pipeline_report([1.0] * 4, 8, 4, comm, checkpoint="never").makespan for comm in (0.0, 0.25))
    assert paid == pytest.approx(free + 2 * 3 * 0.25)


def test_counted_calls_under_dropout_do_not_change_with_the_stage_count():
    counter = Count()
    GPipe(nn.Sequential(counter, nn.Dropout(0.5)), [1, 1], chunks=2)(torch.ones(4, 2))
    assert len(counter.calls) == 2
