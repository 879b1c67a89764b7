"""The training loop against loops written out by hand."""

import math

import pytest
import torch
from torch import nn

from provenn.core.experiment.training import Epoch, accuracy, minibatches, predict, run_to_end, train


def regression(sizes, seed=0):
    """Batches of the given sizes of a fixed linear problem, in float64."""
    draws = torch.Generator().manual_seed(seed)
    x = torch.randn(sum(sizes), 3, generator=draws, dtype=torch.float64)
    y = torch.randn(sum(sizes), 1, generator=draws, dtype=torch.float64)
    return list(zip(x.split(sizes), y.split(sizes), strict=True))


def line():
    model = nn.Linear(3, 1).double()
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[0.5, -1.0, 2.0]]))
        model.bias.fill_(0.1)
    return model


def squared_error(model, x, y):
    return (model(x) - y).square().mean()


def sgd(model):
    return torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)


class Counted:
    """A weight whose loss is the batch's first number: for checks of bookkeeping."""

    def __init__(self, values):
        self.model = nn.Linear(1, 1)
        self.batches = [(torch.full((size, 1), value), torch.zeros(size)) for size, value in values]

    def loss(self, model, x, y):
        return x[0, 0] + 0 * model.weight.sum()

    def train(self, **options):
        options = {"epochs": 1} | options
        return list(train(self.model, sgd(self.model), lambda _: self.batches, self.loss, **options))


class TestSteps:
    @pytest.mark.parametrize(
        ("sizes", "accumulate", "merged"),
        [
            ([3, 5, 2, 4, 1], 2, [8, 6, 1]),
            ([4, 4, 4, 4], 2, [8, 8]),
            ([7, 1, 2], 3, [10]),
            ([2, 3], 5, [5]),
            ([2, 3], 1, [2, 3]),
        ],
    )
    def test_accumulation_is_one_large_batch(self, sizes, accumulate, merged):
        many, few = line(), line()
        mine, theirs = sgd(many), sgd(few)
        batches = regression(sizes)
        epochs = list(train(many, mine, lambda _: batches, squared_error, epochs=2, accumulate=accumulate))
        x, y = (torch.cat(column) for column in zip(*batches, strict=True))
        for epoch in epochs:
            total = 0.0
            for one, other in zip(x.split(merged), y.split(merged), strict=True):
                theirs.zero_grad()
                value = squared_error(few, one, other)
                value.backward()
                theirs.step()
                total += value.item() * len(one)
            assert epoch.step == (epoch.index + 1) * len(merged)
            assert epoch.loss == pytest.approx(total / sum(sizes), rel=1e-12)
        for one, other in zip(many.parameters(), few.parameters(), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-14)  # sums in another order

    def test_gradients_of_the_caller_do_not_leak_in(self):
        clean, stained = line(), line()
        for param in stained.parameters():
            param.grad = torch.ones_like(param)
        batches = regression([4, 4])
        for model in (clean, stained):
            list(train(model, sgd(model), lambda _: batches, squared_error, epochs=1))
        assert torch.equal(clean.weight, stained.weight)

    def test_scheduler_steps_with_the_optimizer(self):
        model = line()
        optimizer = sgd(model)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
        rates = []
        optimizer.register_step_post_hook(lambda *_: rates.append(optimizer.param_groups[0]["lr"]))
        batches = regression([2, 2, 2])
        list(train(model, optimizer, lambda _: batches, squared_error, epochs=2, scheduler=scheduler, accumulate=2))
        assert rates == [0.05, 0.025, 0.0125, 0.00625]
        assert scheduler.last_epoch == 4

    def test_batches_are_asked_for_by_epoch(self):
        asked = []

        def batches(index):
            asked.append(index)
            yield from regression([2, 3], seed=index)

        seen = []

        def loss(model, x, y):
            seen.append(x)
            return squared_error(model, x, y)

        model = line()
        epochs = list(train(model, sgd(model), batches, loss, epochs=3))
        assert asked == [0, 1, 2]
        assert [(one.index, one.step) for one in epochs] == [(0, 2), (1, 4), (2, 6)]
        expected = [x for index in range(3) for x, _ in regression([2, 3], seed=index)]
        assert all(torch.equal(one, other) for one, other in zip(seen, expected, strict=True))

    def test_a_data_loader_serves_as_batches(self):
        dataset = torch.utils.data.TensorDataset(*(torch.cat(c) for c in zip(*regression([6]), strict=True)))
        model, other = line(), line()
        loader = torch.utils.data.DataLoader(dataset, batch_size=4)
        list(train(model, sgd(model), lambda _: loader, squared_error, epochs=1))
        list(train(other, sgd(other), lambda _: minibatches(dataset.tensors, 4), squared_error, epochs=1))
        assert torch.equal(model.weight, other.weight)

    def test_yields_between_epochs(self):
        model = line()
        taken = []
        loop = train(model, sgd(model), lambda i: taken.append(i) or regression([2]), squared_error, epochs=5)
        for epoch in loop:
            if epoch.index == 1:
                break
        assert taken == [0, 1]

    def test_no_epochs(self):
        model = line()
        before = model.weight.clone()
        assert list(train(model, sgd(model), lambda _: regression([2]), squared_error, epochs=0)) == []
        assert torch.equal(model.weight, before)

    def test_training_mode_at_every_epoch(self):
        model = nn.Sequential(line(), nn.Dropout(0.0)).eval()
        modes = []

        def loss(model, x, y):
            modes.extend(part.training for part in model.modules())
            return squared_error(model, x, y)

        for _ in train(model, sgd(model), lambda _: regression([2]), loss, epochs=2):
            model.eval()
        assert modes == [True] * 6

    def test_draws_no_random_numbers(self):
        model = line()
        before = torch.get_rng_state()
        list(train(model, sgd(model), lambda _: regression([2, 2]), squared_error, epochs=2, accumulate=2))
        predict(model, regression([5])[0][0], batch_size=2)
        assert torch.equal(torch.get_rng_state(), before)


class TestLoss:
    def test_mean_over_samples_not_batches(self):
        assert Counted([(3, 1.0), (1, 9.0)]).train() == [Epoch(0, 2, 3.0)]
        assert Counted([(3, 1.0), (1, 9.0), (4, 0.5)]).train(accumulate=2) == [Epoch(0, 2, 1.75)]

    def test_a_half_precision_loss_is_averaged_without_overflow(self):
        model = nn.Linear(1, 1).half()
        batches = [(torch.zeros(2000), torch.zeros(2000))]  # 2000 · 100 is beyond float16
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        (epoch,) = train(model, optimizer, lambda _: batches, lambda m, *_: 0 * m.weight.sum() + 100, epochs=1)
        assert epoch.loss == 100

    @pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
    def test_the_first_bad_step_is_named(self, bad):
        run = Counted([(2, 1.0), (2, 1.0)])
        worse = [*run.batches, (torch.full((2, 1), bad), torch.zeros(2)), *run.batches]
        loop = train(run.model, sgd(run.model), lambda i: worse if i == 2 else run.batches, run.loss, epochs=4)
        assert next(loop).step == 2
        assert next(loop).step == 4
        with pytest.raises(FloatingPointError, match=rf"{bad} in epoch 2 \(step 7\)"):
            next(loop)

    def test_a_loss_of_one_entry_is_a_scalar(self):
        model = line()
        (epoch,) = train(model, sgd(model), lambda _: regression([2]), lambda m, x, y: m(x)[:1, 0], epochs=1)
        assert math.isfinite(epoch.loss)


class TestAutocast:
    def test_the_model_runs_in_bfloat16_and_keeps_its_own_type(self):
        model = nn.Linear(3, 1)
        types = []

        def loss(model, x, y):
            output = model(x.float())
            types.append(output.dtype)
            return (output.float() - y.float()).square().mean()

        model.weight.register_hook(lambda grad: types.append(grad.dtype))
        model.weight.register_hook(lambda _: types.append(torch.is_autocast_enabled("cpu")))
        list(train(model, sgd(model), lambda _: regression([2]), loss, epochs=1, autocast=torch.bfloat16))
        assert types == [torch.bfloat16, torch.float32, False]
        assert model.weight.dtype == torch.float32
        assert not torch.is_autocast_enabled("cpu")

    def test_off_unless_asked_for(self):
        model = line()
        on = []

        def loss(model, x, y):
            on.append(torch.is_autocast_enabled("cpu"))
            return squared_error(model, x, y)

        list(train(model, sgd(model), lambda _: regression([2]), loss, epochs=1))
        assert on == [False]

    def test_goes_by_the_device_of_the_model(self):
        """Where the loss moves the batches, theirs is the wrong one; "meta" stands in for another device."""
        model = nn.Linear(3, 1)
        types = []

        def loss(model, x):
            output = model(torch.zeros(x.shape))
            types.append(output.dtype)
            return output.float().mean()

        batches = [(torch.zeros(2, 3, device="meta"),)]
        list(train(model, sgd(model), lambda _: batches, loss, epochs=1, autocast=torch.bfloat16))
        assert types == [torch.bfloat16]


class TestUpdate:
    def test_takes_over_the_step(self):
        model = line()
        before = {name: value.clone() for name, value in model.state_dict().items()}
        optimizer = sgd(model)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
        got = []

        def update(batch):
            got.append(batch)
            return batch[0].sum().requires_grad_()

        optimizer.step()  # the scheduler expects one before its own

        batches = regression([3, 1])
        (epoch,) = train(
            model, optimizer, lambda _: batches, lambda *_: 1 / 0, epochs=1, update=update, scheduler=scheduler
        )
        assert [id(batch) for batch in got] == [id(batch) for batch in batches]
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
        assert not optimizer.state
        assert scheduler.last_epoch == 2
        assert epoch.step == 2
        assert epoch.loss == pytest.approx((3 * batches[0][0].sum().item() + batches[1][0].sum().item()) / 4)


class TestBadInput:
    @pytest.mark.parametrize(
        ("options", "error", "words"),
        [
            ({"epochs": -1}, ValueError, "epochs .*-1"),
            ({"epochs": 1.0}, TypeError, "epochs .*1.0"),
            ({"accumulate": 0}, ValueError, "accumulate .*0"),
            ({"accumulate": True}, TypeError, "accumulate .*True"),
            ({"autocast": torch.float16}, ValueError, "autocast .*float16"),
            ({"update": lambda _: torch.zeros(()), "accumulate": 2}, ValueError, "update .*2"),
            ({"update": lambda _: torch.zeros(()), "autocast": torch.bfloat16}, ValueError, "update .*bfloat16"),
            ({"update": lambda _: torch.zeros(2)}, ValueError, r"update .*\(2,\)"),
            ({"update": lambda _: 0.5}, TypeError, "update .*0.5"),
        ],
    )
    def test_options(self, options, error, words):
        with pytest.raises(error, match=words):
            Counted([(1, 1.0)]).train(**options)

    def test_at_the_call(self):
        """Not only when the first epoch is asked for."""
        with pytest.raises(ValueError, match="epochs"):
            train(nn.Linear(1, 1), sgd(nn.Linear(1, 1)), list, squared_error, epochs=-1)
        with pytest.raises(ValueError, match="batch_size"):
            minibatches((torch.zeros(1),), 0)

    @pytest.mark.parametrize(
        ("loss", "error", "words"),
        [
            (lambda m, x, y: m(x), ValueError, r"loss must return a scalar, got shape \(2, 1\)"),
            (lambda m, x, y: 0.5, TypeError, "loss must return a tensor, got 0.5"),
        ],
    )
    def test_loss(self, loss, error, words):
        model = line()
        with pytest.raises(error, match=words):
            next(train(model, sgd(model), lambda _: regression([2]), loss, epochs=1))

    def test_batches_that_are_used_up(self):
        model = line()
        once = iter(regression([2, 2]))
        loop = train(model, sgd(model), lambda _: once, squared_error, epochs=2)
        next(loop)
        with pytest.raises(ValueError, match=r"batches .* epoch 1"):
            next(loop)

    @pytest.mark.parametrize("accumulate", [1, 2])
    def test_an_empty_batch(self, accumulate):
        model = line()
        batches = [*regression([2]), (torch.zeros(0, 3).double(), torch.zeros(0, 1).double())]
        with pytest.raises(ValueError, match=r"batches .* empty"):
            list(train(model, sgd(model), lambda _: batches, squared_error, epochs=1, accumulate=accumulate))
        assert all(torch.isfinite(param).all() for param in model.parameters())


class TestMinibatches:
    @pytest.mark.parametrize(("count", "size", "sizes"), [(7, 3, [3, 3, 1]), (6, 3, [3, 3]), (2, 5, [2]), (0, 5, [])])
    @pytest.mark.parametrize("shuffled", [False, True])
    def test_every_sample_once_with_its_partner(self, count, size, sizes, shuffled):
        tensors = torch.arange(count), 10 * torch.arange(count)[:, None]
        draws = torch.Generator().manual_seed(0) if shuffled else None
        batches = list(minibatches(tensors, size, draws))
        assert [len(x) for x, _ in batches] == sizes
        assert all(torch.equal(10 * x[:, None], y) for x, y in batches)
        assert sorted(i for x, _ in batches for i in x.tolist()) == list(range(count))

    def test_order(self):
        x = torch.arange(50)

        def order(seed):
            draws = None if seed is None else torch.Generator().manual_seed(seed)
            return [i for (batch,) in minibatches((x,), 8, draws) for i in batch.tolist()]

        assert order(None) == list(range(50))
        assert order(1) == order(1) == torch.randperm(50, generator=torch.Generator().manual_seed(1)).tolist()
        assert order(1) != order(2)

    def test_global_generator_untouched(self):
        before = torch.get_rng_state()
        list(minibatches((torch.arange(9),), 2, torch.Generator().manual_seed(0)))
        assert torch.equal(torch.get_rng_state(), before)

    @pytest.mark.parametrize(
        ("tensors", "size", "words"),
        [
            ((torch.zeros(2), torch.zeros(3)), 1, r"tensors .*\[2, 3\]"),
            ((), 1, "tensors"),
            ((torch.zeros(2),), 0, "batch_size .*0"),
        ],
    )
    def test_bad_input(self, tensors, size, words):
        with pytest.raises(ValueError, match=words):
            list(minibatches(tensors, size))


def frozen_in_part():
    model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.Dropout(0.5))
    model[1].eval()
    return model


class TestPredict:
    @pytest.mark.parametrize("size", [1, 2, 5, 100])
    def test_batches_put_together(self, size):
        model = frozen_in_part()
        x = torch.randn(5, 2, generator=torch.Generator().manual_seed(0))
        expected = torch.nn.functional.linear(x, model[0].weight, model[0].bias) / (1 + model[1].eps) ** 0.5
        outputs = predict(model, x, batch_size=size)
        torch.testing.assert_close(outputs, expected)
        assert not outputs.requires_grad
        assert model[1].num_batches_tracked == 0

    def test_the_mode_of_each_part_is_put_back(self):
        model = frozen_in_part()
        predict(model, torch.zeros(3, 2))
        assert [part.training for part in model.modules()] == [True, True, False, True]
        with pytest.raises(RuntimeError, match="shapes"):
            predict(model, torch.zeros(3, 7))
        assert [part.training for part in model.modules()] == [True, True, False, True]
        assert torch.is_grad_enabled()

    def test_nothing(self):
        assert predict(frozen_in_part(), torch.zeros(0, 2)).shape == (0, 3)
        assert math.isnan(accuracy(frozen_in_part(), torch.zeros(0, 2), torch.zeros(0, dtype=torch.long)))

    def test_bad_batch_size(self):
        with pytest.raises(ValueError, match=r"batch_size .*0"):
            predict(frozen_in_part(), torch.zeros(3, 2), batch_size=0)


class TestAccuracy:
    def test_share_of_the_largest(self):
        scores = torch.tensor([[1.0, 2.0], [3.0, 0.0], [0.0, 1.0], [0.0, -1.0]])
        labels = torch.tensor([1, 0, 0, 1])
        assert accuracy(nn.Identity(), scores, labels, batch_size=3) == 0.5

    def test_shape_of_labels(self):
        with pytest.raises(ValueError, match=r"labels .*\(4,\).*\(4, 1\)"):
            accuracy(nn.Identity(), torch.zeros(4, 2), torch.zeros(4, 1, dtype=torch.long))


def test_running_to_the_end_returns_what_was_trained_before_too(tmp_path):
    saved, seen = tmp_path / "half.pt", []
    batches = regression((4, 4))

    def epochs(model, optimizer, count):
        return train(model, optimizer, lambda epoch: batches, squared_error, epochs=count, checkpoint=saved)

    first = line()
    run_to_end(epochs(first, sgd(first), 2), saved)
    again = line()
    history = run_to_end(epochs(again, sgd(again), 5), saved, seen.append)
    assert [one.index for one in history] == [0, 1, 2, 3, 4]
    assert [one.index for one in seen] == [2, 3, 4]


def test_what_progress_raises_ends_the_run():
    model = line()

    def stop(epoch):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_to_end(train(model, sgd(model), lambda epoch: regression((4,)), squared_error, epochs=3), progress=stop)
