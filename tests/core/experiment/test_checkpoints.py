"""A run that is interrupted anywhere and resumed ends bitwise where the uninterrupted run ends."""

import itertools
import os
import subprocess
import sys

import pytest
import torch
from torch import nn

from provenn.core.experiment.seeding import derive_seed, generator
from provenn.core.experiment.training import completed, minibatches, train

EPOCHS = 5


class Run:
    """A network with batch norm and dropout, Adam or SGD, and a scheduler; everything anew, from the seed."""

    def __init__(self, optimizer="adam", scheduler=True):
        draws = torch.Generator().manual_seed(0)
        self.x = torch.randn(22, 4, generator=draws)
        self.y = (self.x[:, 0] > 0).long()
        self.model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.2), nn.Linear(8, 2))
        with torch.no_grad():
            for param in self.model.parameters():
                param.copy_(torch.randn(param.shape, generator=draws))
        make = {
            "adam": lambda params: torch.optim.Adam(params, lr=0.1, amsgrad=True),
            "sgd": lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9, nesterov=True),
        }
        self.optimizer = make[optimizer](self.model.parameters())
        self.scheduler = torch.optim.lr_scheduler.OneCycleLR(self.optimizer, 0.1, total_steps=60) if scheduler else None

    def batches(self, epoch):
        torch.manual_seed(derive_seed("dropout", epoch))
        return minibatches((self.x, self.y), 5, generator("order", epoch))

    def loss(self, model, x, y):
        return nn.functional.cross_entropy(model(x), y)

    def train(self, checkpoint=None, epochs=EPOCHS, **options):
        options = {"loss": self.loss, "batches": self.batches} | options
        return train(
            self.model,
            self.optimizer,
            epochs=epochs,
            scheduler=self.scheduler,
            accumulate=2,
            checkpoint=checkpoint,
            **options,
        )

    def ends(self):
        """Everything that training changes, flat."""
        parts = [self.model.state_dict(), self.optimizer.state_dict()]
        parts += [] if self.scheduler is None else [self.scheduler.state_dict()]
        return torch.utils._pytree.tree_leaves(parts)


def same(first, second):
    return all(
        torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other
        for one, other in zip(first, second, strict=True)
    )


@pytest.fixture(autouse=True)
def _keep_generator():
    with torch.random.fork_rng(devices=[]):
        yield


@pytest.mark.parametrize("scheduler", [True, False])
@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
@pytest.mark.parametrize("last", range(EPOCHS))
def test_break_and_resume(tmp_path, optimizer, scheduler, last):
    whole = Run(optimizer, scheduler)
    expected = list(whole.train())
    first = Run(optimizer, scheduler)
    path = tmp_path / "run.pt"
    got = []
    for epoch in first.train(path):
        got.append(epoch)
        if epoch.index == last:
            break
    second = Run(optimizer, scheduler)
    got += second.train(path)
    assert got == expected
    assert same(second.ends(), whole.ends())


@pytest.mark.parametrize("into", [0, 1, 3])
def test_interrupts_inside_epochs(tmp_path, into):
    """Stop in the middle of an epoch, again and again; each resumption starts the epoch over."""
    whole = Run()
    expected = list(whole.train())
    got, path = [], str(tmp_path / "run.pt")
    for _ in range(EPOCHS + 1):
        run, calls = Run(), itertools.count()

        def loss(model, x, y, run=run, calls=calls):
            if next(calls) == 5 + into:  # an epoch has five batches
                raise KeyboardInterrupt
            return run.loss(model, x, y)

        try:
            got.extend(run.train(path, loss=loss))
        except KeyboardInterrupt:
            continue
        break
    assert got == expected
    assert same(run.ends(), whole.ends())


def test_a_finished_run_yields_nothing_and_is_loaded(tmp_path):
    path = tmp_path / "run.pt"
    whole = Run()
    list(whole.train(path))
    again = Run()
    assert list(again.train(path)) == []
    assert same(again.ends(), whole.ends())


def test_completed_returns_the_epochs_behind_a_checkpoint(tmp_path):
    path = tmp_path / "run.pt"
    assert completed(None) == completed(path) == []
    expected = list(Run().train())
    loop = Run().train(path)
    for count in range(1, EPOCHS):
        next(loop)
        assert completed(path) == completed(str(path)) == expected[:count]
    list(Run().train(path))
    assert completed(path) == expected
    path.write_bytes(b"damaged")
    with pytest.raises(ValueError, match="cannot be read"):
        completed(path)
    torch.save({"model": {}}, path)
    with pytest.raises(ValueError, match="must hold a history"):
        completed(path)


def test_more_epochs_go_on(tmp_path):
    path = tmp_path / "run.pt"
    list(Run().train(path, epochs=2))
    longer, whole = Run(), Run()
    assert [epoch.index for epoch in longer.train(path)] == [2, 3, 4]
    list(whole.train())
    assert same(longer.ends(), whole.ends())


def test_a_bad_loss_is_not_saved(tmp_path):
    path = tmp_path / "run.pt"
    run = Run()

    def batches(epoch):
        for x, y in run.batches(epoch):
            yield (x * float("nan") if epoch == 2 else x), y

    with pytest.raises(FloatingPointError, match="epoch 2"):
        list(run.train(path, batches=batches))
    assert [epoch.index for epoch in completed(path)] == [0, 1]
    assert all(torch.isfinite(value).all() for value in torch.load(path)["model"].values())


class TestTheFileIsWhole:
    """The old checkpoint stays until the new one is complete."""

    @pytest.mark.parametrize("where", ["save", "replace"])
    def test_an_error_while_writing(self, tmp_path, monkeypatch, where):
        path = tmp_path / "run.pt"
        run = Run()
        loop = run.train(path)
        next(loop)
        before = path.read_bytes()

        def half(held, file):
            file.write(b"PK half")
            raise OSError("no space left")

        def fail(*_):
            raise OSError("no space left")

        with monkeypatch.context() as patch:
            patch.setattr(torch, "save", half) if where == "save" else patch.setattr(os, "replace", fail)
            with pytest.raises(OSError, match="no space left"):
                next(loop)
        assert path.read_bytes() == before
        assert os.listdir(tmp_path) == ["run.pt"]

    def test_killed_before_the_new_file_is_in_place(self, tmp_path):
        code = (
            "import os, sys, torch\n"
            "from provenn.core.experiment.training import train\n"
            "model, path = torch.nn.Linear(1, 1), sys.argv[1]\n"
            "optimizer = torch.optim.SGD(model.parameters(), lr=0.1)\n"
            "batches = lambda _: [(torch.ones(2, 1),)]\n"
            "for epoch in train(model, optimizer, batches, lambda m, x: m(x).mean(), epochs=3, checkpoint=path):\n"
            "    os.replace = lambda *_: os._exit(9)\n"
        )
        path = tmp_path / "run.pt"
        assert subprocess.run([sys.executable, "-c", code, path], timeout=120).returncode == 9
        assert [(epoch.index, epoch.step) for epoch in completed(path)] == [(0, 1)]


class TestErrors:
    @pytest.mark.parametrize("content", [b"", b"not a checkpoint", "truncated"])
    def test_unreadable(self, tmp_path, content):
        path = tmp_path / "run.pt"
        if content == "truncated":
            next(Run().train(path))
            content = path.read_bytes()[:-200]
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"run\.pt.*cannot be read"):
            next(Run().train(path))
        assert path.read_bytes() == content

    @pytest.mark.parametrize("held", [[1, 2], {"model": {}}, {"model": {}, "optimizer": {}, "epoch": 1, "step": 1}])
    def test_not_a_checkpoint_of_this_run(self, tmp_path, held):
        path = tmp_path / "run.pt"
        torch.save(held, path)
        with pytest.raises(ValueError, match=r"run\.pt.*must hold.*scheduler"):
            next(Run().train(path))

    def test_a_scheduler_that_is_no_longer_there(self, tmp_path):
        path = tmp_path / "run.pt"
        next(Run().train(path))
        with pytest.raises(ValueError, match=r"run\.pt.*must hold"):
            next(Run(scheduler=False).train(path))

    def test_another_model(self, tmp_path):
        path = tmp_path / "run.pt"
        next(Run().train(path))
        other = Run()
        other.model = nn.Sequential(nn.Linear(4, 2))
        with pytest.raises(ValueError, match=r"run\.pt.*does not fit the model"):
            next(other.train(path))

    def test_another_optimizer(self, tmp_path):
        path = tmp_path / "run.pt"
        next(Run().train(path))
        other = Run()
        other.optimizer = torch.optim.SGD(other.model[0].parameters(), lr=0.1)
        with pytest.raises(ValueError, match=r"run\.pt.*does not fit the optimizer"):
            next(other.train(path))

    @pytest.mark.parametrize("path", ["file/run.pt", "folder"])
    def test_nowhere_to_write_is_found_before_training(self, tmp_path, path):
        (tmp_path / "file").write_text("")
        (tmp_path / "folder").mkdir()
        trained = []
        with pytest.raises(OSError, match="file" if path.startswith("file") else "folder"):
            next(Run().train(tmp_path / path, loss=lambda *_: trained.append(1)))
        assert not trained

    def test_folders_are_made(self, tmp_path):
        next(Run().train(tmp_path / "a" / "b" / "run.pt"))
        assert (tmp_path / "a" / "b" / "run.pt").is_file()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_run_moves_between_devices(tmp_path):
    path = tmp_path / "run.pt"
    first = Run()
    first.model.cuda()
    next(first.train(path, batches=lambda i: [(x.cuda(), y.cuda()) for x, y in first.batches(i)]))
    second = Run()
    assert next(second.train(path)).index == 1
    assert {param.device.type for param in second.model.parameters()} == {"cpu"}
