"""Counts against numbers worked out by hand."""

import gc
import weakref
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from provenn.core.experiment import accounting
from provenn.core.experiment.accounting import (
    ModelSize,
    TensorMemory,
    median_seconds,
    model_size,
    multiply_accumulates,
    saved_bytes,
)


class TestModelSize:
    def test_by_hand(self):
        model = nn.Sequential(nn.Conv2d(2, 3, 5), nn.BatchNorm2d(3), nn.Linear(4, 5, bias=False).double())
        with torch.no_grad():
            model[0].weight[0] = 0
            model[2].weight[0, 0] = 0
        parameters = 3 * 2 * 25 + 3 + 3 + 3 + 20
        zeros = 2 * 25 + 3 + 1  # batch norm's bias starts at zero
        stored = 4 * (150 + 3 + 6) + 8 * 20 + 4 * (3 + 3) + 8  # running mean and variance, and a 64-bit count
        assert model_size(model) == ModelSize(parameters, parameters - zeros, stored)

    def test_shared_tensors_count_once(self):
        embedding, head = nn.Embedding(7, 3), nn.Linear(3, 7, bias=False)
        head.weight = embedding.weight
        assert model_size(nn.Sequential(embedding, head)).parameters == 21
        norm = nn.BatchNorm1d(2)
        assert model_size(nn.Sequential(norm, norm)).bytes == 4 * 8 + 8

    def test_types_and_frozen_weights(self):
        model = nn.Linear(4, 4, bias=False).bfloat16().requires_grad_(False)
        assert model_size(model) == ModelSize(16, 16, 32)

    def test_nothing(self):
        assert model_size(nn.ReLU()) == ModelSize(0, 0, 0)


B, T, E, H = 2, 5, 16, 4
ATTENTION = B * T * E * E * 4 + 2 * B * T * T * E  # four maps, then scores and their product with values
QUERY = torch.zeros(B, H, T, E // H)


class SelfAttention(nn.Module):
    def __init__(self, need_weights):
        super().__init__()
        self.inner = nn.MultiheadAttention(E, H, batch_first=True)
        self.need_weights = need_weights

    def forward(self, x):
        return self.inner(x, x, x, need_weights=self.need_weights)


class TestMultiplyAccumulates:
    @pytest.mark.parametrize(
        ("function", "inputs", "count"),
        [
            (nn.Linear(3, 4), [(7, 3)], 7 * 12),
            (nn.Linear(3, 4), [(2, 5, 3)], 10 * 12),
            (nn.Linear(3, 4), [(3,)], 12),
            (nn.Linear(3, 4, bias=False), [(3,)], 12),
            (nn.Conv2d(4, 8, 3, padding=1), [(2, 4, 5, 6)], 2 * 8 * 30 * 4 * 9),
            (nn.Conv2d(4, 8, 3, stride=2, groups=2), [(1, 4, 5, 5)], 8 * 4 * 2 * 9),
            (nn.Conv1d(2, 3, 4), [(1, 2, 10)], 3 * 7 * 2 * 4),
            (nn.ConvTranspose2d(2, 3, 3, stride=2), [(1, 2, 4, 4)], 16 * 2 * 3 * 9),
            (torch.matmul, [(2, 3, 4), (2, 4, 5)], 2 * 3 * 4 * 5),
            (torch.matmul, [(3, 4), (4,)], 12),
            (torch.matmul, [(4,), (4, 3)], 12),
            (torch.dot, [(4,), (4,)], 4),
            (nn.Embedding(5, 3).forward, [()], 0),
            (torch.relu, [(5,)], 0),
            (nn.LSTM(3, 7), [(T, B, 3)], B * T * 4 * 7 * (3 + 7)),
            (nn.LSTM(3, 7, num_layers=2), [(T, B, 3)], B * T * 4 * 7 * (3 + 7 + 7 + 7)),
            (nn.LSTM(3, 7, bidirectional=True, batch_first=True), [(B, T, 3)], 2 * B * T * 4 * 7 * (3 + 7)),
            (nn.GRU(3, 7), [(T, B, 3)], B * T * 3 * 7 * (3 + 7)),
        ],
    )
    def test_by_hand(self, function, inputs, count):
        tensors = [torch.zeros(shape) if shape else torch.zeros(2, dtype=torch.long) for shape in inputs]
        assert multiply_accumulates(function, *tensors) == count

    @pytest.mark.parametrize("training", [True, False])
    @pytest.mark.parametrize("need_weights", [True, False])
    def test_attention(self, training, need_weights):
        model = SelfAttention(need_weights).train(training)
        assert multiply_accumulates(model, torch.zeros(B, T, E)) == ATTENTION

    @pytest.mark.parametrize("training", [True, False])
    def test_encoder_layer(self, training):
        model = nn.TransformerEncoderLayer(E, H, 32, batch_first=True).train(training)
        assert multiply_accumulates(model, torch.zeros(B, T, E)) == ATTENTION + 2 * B * T * E * 32

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
    def test_scaled_dot_product_attention(self, dtype):
        query = QUERY.to(dtype)
        assert (
            multiply_accumulates(nn.functional.scaled_dot_product_attention, query, query, query) == 2 * B * T * T * E
        )

    @pytest.mark.parametrize("fails", [False, True])
    def test_settings_are_put_back(self, fails):
        def settings():
            sdp = torch.backends.cuda.flash_sdp_enabled(), torch.backends.cuda.mem_efficient_sdp_enabled()
            fused = torch.backends.mha.get_fastpath_enabled(), torch.backends.cudnn.enabled
            return *sdp, *fused, torch.backends.mkldnn.enabled, torch.is_grad_enabled()

        before = settings()
        assert all(before)
        try:
            multiply_accumulates(lambda: 1 / 0 if fails else None)
        except ZeroDivisionError:
            assert fails
        assert settings() == before


class TestMedianSeconds:
    def test_counts_calls_and_leaves_warmup_out(self, monkeypatch):
        clock = iter([100, 50, 0, 1, 0, 2, 0, 9, 0, 4])  # two warmups start, then 1, 2, 9 and 4 pass
        monkeypatch.setattr(accounting, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
        calls = []
        assert median_seconds(lambda: calls.append(1), rounds=4, warmup=2) == 3.0
        assert len(calls) == 6

    @pytest.mark.parametrize(("rounds", "warmup", "words"), [(0, 1, "rounds .*0"), (1, -1, "warmup .*-1")])
    def test_bad_input(self, rounds, warmup, words):
        with pytest.raises(ValueError, match=words):
            median_seconds(lambda: None, rounds, warmup)


KIB = 1024


class TestTensorMemory:
    def test_temporaries_in_place_and_views(self):
        x = torch.ones(256)
        with TensorMemory() as memory:
            y = x * 2
            assert (memory.current, memory.peak) == (KIB, KIB)
            z = y + 1
            assert memory.current == 2 * KIB
            del y
            assert memory.current == KIB
            z.exp_()
            z.mul_(2).add_(1)
            view = z[::2].view(2, 64).T
            assert memory.current == KIB
            del z
            assert memory.current == KIB
            del view
            assert (memory.current, memory.peak) == (0, 2 * KIB)
            x.add_(1)
            x.view(16, 16)
            assert memory.current == 0

    def test_a_chain_holds_two_at_once(self):
        x = torch.ones(256)
        with TensorMemory() as memory:
            x = x.cos().sin().tan().exp()
        assert (memory.current, memory.peak) == (KIB, 2 * KIB)
        del x
        assert memory.current == 0

    def test_bytes_by_type(self):
        with TensorMemory() as memory:
            held = [torch.zeros(10, dtype=dtype) for dtype in (torch.float64, torch.bfloat16, torch.bool)]
        assert memory.current == 80 + 20 + 10
        assert len(held) == 3

    def test_a_view_holds_its_whole_storage(self):
        with TensorMemory() as memory:
            row = torch.zeros(256)[0]
        assert memory.current == KIB
        del row
        assert memory.current == 0

    def test_tensors_made_from_lists(self):
        with TensorMemory() as memory:
            held = torch.tensor([1.0, 2.0, 3.0])
            assert memory.current == 12
            del held
        assert (memory.current, memory.peak) == (0, 12)

    def test_writing_into_what_was_there(self):
        x, out = torch.ones(256), torch.empty(256)
        with TensorMemory() as memory:
            torch.mul(x, 2, out=out)
        assert memory.peak == 0

    def test_autograd(self):
        x = torch.ones(256, requires_grad=True)
        with TensorMemory() as memory:
            y = x.exp()
            loss = y.sum()
            assert memory.current == KIB + 4
            loss.backward()
            assert memory.current == 2 * KIB + 4  # y, the loss, and x's gradient
            del y, loss
            assert memory.current == KIB
            assert memory.peak == 2 * KIB + 8  # the gradient of the loss as well
            x.grad = None
            assert memory.current == 0

    def test_what_autograd_saves_is_alive(self):
        x = torch.ones(256, requires_grad=True)
        with TensorMemory() as memory:
            loss = x.exp().exp().exp().sum()  # each result is saved for its own derivative
        assert memory.current == 3 * KIB + 4
        del loss
        assert memory.current == 0

    def test_sparse_tensors(self):
        embedding = nn.Embedding(10, 3, sparse=True)
        places = torch.tensor([1, 2])
        with TensorMemory() as memory:
            embedding(places).sum().backward()
            assert memory.current == 2 * 3 * 4 + 2 * 8  # the gradient's values and its indices
            dense = torch.eye(4)
            before = memory.current
            rows = dense.to_sparse_csr()
            assert memory.current - before >= 4 * 4 + 5 * 8 + 4 * 8
            assert rows.values().shape == (4,)

    def test_the_result_is_not_changed(self):
        x = torch.randn(8, 8, generator=torch.Generator().manual_seed(0))
        with TensorMemory():
            watched = (x @ x).softmax(-1)
        assert torch.equal(watched, (x @ x).softmax(-1))

    def test_an_error_ends_the_watch(self):
        with pytest.raises(RuntimeError), TensorMemory() as memory:
            torch.zeros(2) @ torch.zeros(3)
        torch.zeros(100)
        assert memory.peak <= 20


class TestSavedBytes:
    def test_each_storage_once(self):
        x = torch.ones(256, requires_grad=True)
        assert saved_bytes(lambda: x.exp()) == KIB
        assert saved_bytes(lambda: x.exp().sin()) == KIB  # sin keeps its input, which is what exp keeps
        assert saved_bytes(lambda: x.sin().sin()) == 2 * KIB
        assert saved_bytes(lambda: x + 1) == 0
        assert saved_bytes(lambda: x.detach().exp()) == 0

    def test_weights_and_inputs_count(self):
        weight, x = torch.ones(4, 8, requires_grad=True), torch.ones(2, 4)
        assert saved_bytes(lambda: x @ weight) == 4 * 8  # only the input: nobody asked for its gradient
        x.requires_grad_()
        assert saved_bytes(lambda: x @ weight) == 4 * 8 + 4 * 32

    def test_checkpointing_keeps_the_input_alone(self):
        x = torch.ones(256, requires_grad=True)
        plain = saved_bytes(lambda: x.sin().sin().sin())
        kept = saved_bytes(lambda: checkpoint(lambda x: x.sin().sin().sin(), x, use_reentrant=False))
        assert (plain, kept) == (3 * KIB, KIB)

    def test_nothing_stays_behind(self):
        x = torch.ones(256, requires_grad=True)
        seen = []

        def function():
            y = x.exp()  # keeps its own output
            seen.append(weakref.ref(y.untyped_storage()))
            return y.sum()

        saved_bytes(function)
        gc.collect()
        assert seen[0]() is None

    def test_gradients_come_out_right(self):
        x = torch.ones(3, requires_grad=True)
        saved_bytes(lambda: x.exp().sum().backward())
        torch.testing.assert_close(x.grad, torch.full((3,), torch.e))
