"""Kinds, tasks and parts by name and by dotted path; the tasks that ship."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch

from provenn.catalog import cards
from provenn.claims.errors import UsageError
from provenn.compare.lookup import (
    all_parts,
    find_kind,
    find_part,
    find_task,
    import_dotted,
    kind_names,
    task_names,
)
from provenn.compare.tasks import cifar10_resnet, mnist_mlp
from provenn.data.archives import write_archive
from provenn.optim import DiffGrad


def test_kinds_and_tasks_are_found_by_their_file_and_named_by_it() -> None:
    assert {"optim", "compress"} <= set(kind_names())
    assert {"digits-mlp", "mnist-mlp", "cifar10-resnet"} <= set(task_names())
    for name in kind_names():
        assert find_kind(name).name == name
    for name in task_names():
        task = find_task(name)
        assert task.name == name
        assert set(task.kinds) <= set(kind_names())


def test_parts_come_from_references_the_catalogue_and_dotted_paths() -> None:
    optim, compress = find_kind("optim"), find_kind("compress")
    assert find_part(optim, "DiffGrad") is DiffGrad
    assert find_part(optim, "torch.optim.Adam") is torch.optim.Adam
    assert find_part(optim, "provenn.optim.DiffGrad") is DiffGrad
    assert callable(find_part(compress, "magnitude"))
    with pytest.raises(UsageError, match="magnitude"):
        find_part(compress, "magnitud")
    # A part of another kind is not one of these.
    with pytest.raises(UsageError, match="unknown part of the kind compress 'DiffGrad'"):
        find_part(compress, "DiffGrad")


def test_all_parts_are_the_references_and_what_is_built() -> None:
    for name in kind_names():
        kind = find_kind(name)
        found = all_parts(kind)
        assert set(kind.references) <= set(found)
        assert len(set(found)) == len(found)
        for part in found:
            assert callable(find_part(kind, part))
    assert {"DiffGrad", "sgd", "adam", "adamw"} <= set(all_parts(find_kind("optim")))
    assert "SAPPruner" not in all_parts(find_kind("optim"))


def test_unknown_names_get_three_suggestions() -> None:
    with pytest.raises(UsageError) as caught:
        find_part(find_kind("optim"), "DiffGrd")
    assert "DiffGrad" in str(caught.value)
    assert str(caught.value).count(",") == 2
    for find, name in ((find_kind, "optimise"), (find_task, "mnist")):
        with pytest.raises(UsageError, match="nearest are"):
            find(name)


def test_a_part_that_is_not_built_says_so() -> None:
    waiting = [part for card in cards() if not card.built for part in card.parts if part.kind == "optimizer"]
    if not waiting:
        pytest.skip("every optimizer of the catalogue is built")
    with pytest.raises(UsageError, match="not built yet"):
        find_part(find_kind("optim"), waiting[0].attribute)
    with pytest.raises(UsageError, match="not built yet"):
        find_part(find_kind("optim"), waiting[0].name)


def test_dotted_paths_fail_in_words(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "own_parts.py").write_text("from torch.optim import SGD as Mine\n")
    (tmp_path / "own_broken.py").write_text("raise OSError('planted')\n")
    (tmp_path / "own_lacking.py").write_text("import no_such_package\n")
    assert import_dotted("part", "own_parts.Mine") is torch.optim.SGD
    with pytest.raises(UsageError, match=r"unknown name in own_parts 'Mien'.*Mine"):
        import_dotted("part", "own_parts.Mien")
    with pytest.raises(UsageError, match="no module 'own_absent'"):
        import_dotted("part", "own_absent.Mine")
    with pytest.raises(UsageError, match=r"own_broken does not import: OSError: planted"):
        import_dotted("part", "own_broken.Mine")
    with pytest.raises(UsageError, match=r"own_lacking does not import.*no_such_package"):
        import_dotted("part", "own_lacking.Mine")
    with pytest.raises(
        UsageError,
        match=r"must be a Task, CountedTask, LossTask, LayerTask or SearchTask of provenn\.compare, .*, got int",
    ):
        find_task("compare.planted.NOT_A_TASK")


@pytest.mark.parametrize("name", ["digits-mlp"])
def test_a_task_that_needs_no_download_is_whole(name) -> None:
    task = find_task(name)
    scale = task.scale("cpu")
    split = scale.data()
    assert torch.equal(split.x_test, scale.data().x_test)
    model = scale.model()
    x = split.x_train[: scale.batch_size]
    disturbed = x if task.augment is None else task.augment(x, torch.Generator().manual_seed(0))
    assert model(disturbed).shape == (len(x), 10)
    assert torch.isfinite(task.loss(model, x, split.y_train[: scale.batch_size]))
    assert 0 <= task.measure(model, split.x_test, split.y_test) <= 1
    assert task.scale("cuda:0") is scale


def distinct(count: int, *shape: int) -> np.ndarray:
    """Images that differ from each other in their first pixels, which spell their number."""
    images = np.random.default_rng(count).integers(0, 255, (count, *shape), dtype=np.uint8)
    flat = images.reshape(count, -1)
    flat[:, 0], flat[:, 1] = np.arange(count) % 251, np.arange(count) // 251
    return images


def test_mnist_is_cut_without_overlap(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("PROVENN_DATA", str(tmp_path))
    x, labels = distinct(5100, 28, 28), np.arange(5100, dtype=np.uint8) % 10
    write_archive(tmp_path / "mnist.npz", {"x_train": x, "y_train": labels, "x_test": x[:9], "y_test": labels[:9]})
    split = mnist_mlp.split.__wrapped__(100)
    assert [len(part) for part in vars(split).values()] == [100, 100, 5000, 5000, 9, 9]
    assert torch.equal(split.x_train * 255, torch.from_numpy(x[:100]).float().unsqueeze(1))
    assert torch.equal((split.x_validation * 255).round(), torch.from_numpy(x[100:]).float().unsqueeze(1))
    assert split.y_validation.tolist() == labels[100:].tolist()
    assert mnist_mlp.model()(split.x_test).shape == (9, 10)


def test_cifar_is_standardised_by_its_training_images_and_augmented(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("PROVENN_DATA", str(tmp_path))
    x, labels = distinct(60, 3, 32, 32), np.arange(60, dtype=np.uint8) % 10
    archive = {"x_train": x, "y_train": labels, "x_test": x[:9], "y_test": labels[:9]}
    write_archive(tmp_path / "cifar10.npz", archive)
    split = cifar10_resnet.split.__wrapped__(40, 20, 5)
    assert [len(part) for part in vars(split).values()] == [40, 40, 20, 20, 5, 5]
    assert split.x_train.mean(dim=(0, 2, 3)) == pytest.approx([0, 0, 0], abs=1e-5)
    assert split.x_train.std(dim=(0, 2, 3)) == pytest.approx([1, 1, 1], abs=1e-5)
    # The test images are the first training images, so they are standardised to the same values.
    assert torch.allclose(split.x_test, split.x_train[:5])
    assert split.y_validation.tolist() == labels[40:].tolist()
    out = cifar10_resnet.augment(torch.ones(400, 3, 8, 8), torch.Generator().manual_seed(0))
    ramp = torch.arange(1.0, 9.0).expand(400, 1, 8, 8)
    rows = cifar10_resnet.augment(ramp, torch.Generator().manual_seed(0))[:, 0, 4]
    steps = rows.diff(dim=1)[(rows[:, 1:] > 0) & (rows[:, :-1] > 0)]
    assert set(steps.tolist()) == {1.0, -1.0}
    assert 0.4 < (steps > 0).double().mean() < 0.6
    assert out.min() == 0
    for scale in find_task("cifar10-resnet").scales.values():
        assert scale.model().eval()(split.x_test[:1]).shape == (1, 10)


def test_the_command_imports_no_torch() -> None:
    code = "import sys; import provenn.compare.commands; print('torch' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert run.stdout.strip() == "False"
