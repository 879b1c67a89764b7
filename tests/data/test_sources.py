"""Official formats against hand-made files whose content is known, and pickles that must be refused."""

from __future__ import annotations

import gzip
import os
import pickle
import re
from pathlib import Path

import numpy as np
import pytest
from data import samples

from provenn.data.sources import SOURCES, convert_cifar10, convert_planetoid, read_idx, read_pickle


def put(folder: Path, files: dict[str, bytes]) -> Path:
    for name, data in files.items():
        (folder / name).write_bytes(data)
    return folder


def test_idx_files_keep_their_shape_and_order(tmp_path) -> None:
    arrays = SOURCES["mnist"].convert(put(tmp_path, samples.mnist_files()))
    assert set(arrays) == set(samples.MNIST)
    for name, expected in samples.MNIST.items():
        assert np.array_equal(arrays[name], expected)
        assert arrays[name].dtype == np.uint8


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\0\0\x0d\x01" + b"\0\0\0\x01" + b"1234",
        gzip.decompress(samples.idx(samples.MNIST["y_train"]))[:-1],
        gzip.decompress(samples.idx(samples.MNIST["y_train"])) + b"x",
    ],
    ids=["empty", "floats", "short", "long"],
)
def test_an_ill_idx_file_is_an_error(tmp_path, content) -> None:
    path = tmp_path / "x.gz"
    path.write_bytes(gzip.compress(content))
    with pytest.raises(ValueError, match=r"IDX|reshape|buffer"):
        read_idx(path)


def test_cifar_batches_become_images_in_order(tmp_path) -> None:
    names = [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]
    batches = {}
    for number, name in enumerate(names):
        rows = np.zeros((2, 3072), dtype=np.uint8)
        rows[0, 1024 + 32 * 5 + 9] = number + 1  # green, row 5, column 9
        batches[name] = (rows, [number, 9 - number])
    arrays = convert_cifar10(put(tmp_path, samples.cifar_files(batches)))
    assert arrays["x_train"].shape == (10, 3, 32, 32)
    assert arrays["x_train"][::2, 1, 5, 9].tolist() == [1, 2, 3, 4, 5]
    assert arrays["x_train"].sum() == 15
    assert arrays["y_train"].tolist() == [0, 9, 1, 8, 2, 7, 3, 6, 4, 5]
    assert arrays["x_test"][0, 1, 5, 9] == 6
    assert arrays["y_test"].tolist() == [5, 4]


def test_planetoid_files_become_a_graph(tmp_path) -> None:
    arrays = convert_planetoid(put(tmp_path, samples.planetoid_files("tiny")), "tiny")
    x = np.zeros((8, 2))
    for row, (start, stop) in enumerate(zip(arrays["x_indptr"][:-1], arrays["x_indptr"][1:], strict=True)):
        x[row, arrays["x_indices"][start:stop]] = arrays["x_data"][start:stop]
    assert arrays["x_shape"].tolist() == [8, 2]
    assert x.tolist() == [[1, 0], [0, 2], [3, 0], [0, 0], [4, 0], [5, 5], [0, 0], [0, 7]]
    assert arrays["y"].tolist() == [1, 0, 2, 1, 0, 1, 0, 2]
    edges = sorted(map(tuple, arrays["edge_index"].T.tolist()))
    assert edges == [(0, 1), (1, 0), (2, 7), (4, 5), (5, 4), (7, 2)]
    assert arrays["train_mask"].tolist() == [True] + [False] * 7
    assert arrays["test_mask"].nonzero()[0].tolist() == [4, 5, 7]


def test_the_validation_mask_is_the_500_nodes_after_the_training_nodes(tmp_path) -> None:
    from scipy.sparse import csr_matrix

    labels = np.eye(2, dtype=np.int32)[np.zeros(600, dtype=int)]
    parts = {
        "allx": csr_matrix(np.ones((600, 3), np.float32)),
        "ally": labels,
        "y": labels[:40],
        "tx": csr_matrix(np.ones((2, 3), np.float32)),
        "ty": labels[:2],
        "graph": {node: [] for node in range(602)},
    }
    files = {f"ind.big.{part}": pickle.dumps(value, protocol=2) for part, value in parts.items()}
    arrays = convert_planetoid(put(tmp_path, files | {"ind.big.test.index": b"601\n600\n"}), "big")
    assert arrays["val_mask"].nonzero()[0].tolist() == list(range(40, 540))
    assert arrays["edge_index"].shape == (2, 0)


class Evil:
    def __reduce__(self):
        return os.system, ("touch PWNED",)


@pytest.mark.parametrize("protocol", [0, 2, 5])
def test_a_pickle_that_runs_code_is_refused(tmp_path, monkeypatch, protocol) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(pickle.UnpicklingError, match="system"):
        read_pickle(pickle.dumps({"data": Evil()}, protocol=protocol))
    assert list(tmp_path.iterdir()) == []


def test_builtins_beyond_containers_are_refused() -> None:
    with pytest.raises(pickle.UnpicklingError, match="eval"):
        read_pickle(b"c__builtin__\neval\n(S'1'\ntR.")


def test_every_source_is_addressed_and_checksummed() -> None:
    lengths = {"md5": 32, "sha256": 64}
    for source in SOURCES.values():
        for file in source.files:
            algorithm, _, digest = file.checksum.partition(":")
            assert re.fullmatch(f"[0-9a-f]{{{lengths[algorithm]}}}", digest)
            assert file.addresses
            assert all(address.endswith(file.name) for address in file.addresses)
        digests = [file.checksum for file in source.files]
        assert len(set(digests)) == len(digests)
