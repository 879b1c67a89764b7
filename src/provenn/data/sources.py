"""Where each downloaded data set comes from, and how its official files become arrays.

A set is one entry of :data:`SOURCES`. Checksums are those the libraries that mirror a set list (MD5), or the SHA-256
of the official repository's file.
"""

from __future__ import annotations

import gzip
import io
import pickle
import tarfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import numpy as np


@dataclass(frozen=True)
class RemoteFile:
    """A file to download: its name, its checksum (``algorithm:hex``), and addresses to try in turn."""

    name: str
    checksum: str
    addresses: tuple[str, ...]


@dataclass(frozen=True)
class Source:
    """The official files of a set, and the function from the folder that holds them to the archive's arrays."""

    files: tuple[RemoteFile, ...]
    convert: Callable[[Path], Mapping[str, np.ndarray]]


def read_idx(path: Path) -> np.ndarray:
    """Read a gzipped IDX file of bytes.

    Raises:
        ValueError: It is not one, or holds more or fewer bytes than its header says.

    Source: http://yann.lecun.com/exdb/mnist/ ("the IDX file format").
    """
    data = gzip.decompress(path.read_bytes())
    if len(data) < 4 or data[:3] != b"\0\0\x08":
        raise ValueError(f"{path.name} is not an IDX file of bytes")
    axes = data[3]
    shape = np.frombuffer(data, dtype=">u4", count=axes, offset=4).astype(int)
    return np.frombuffer(data, dtype=np.uint8, offset=4 + 4 * axes).reshape(shape)


def convert_mnist(folder: Path) -> dict[str, np.ndarray]:
    """Read the four IDX files of MNIST."""
    return {
        "x_train": read_idx(folder / "train-images-idx3-ubyte.gz"),
        "y_train": read_idx(folder / "train-labels-idx1-ubyte.gz"),
        "x_test": read_idx(folder / "t10k-images-idx3-ubyte.gz"),
        "y_test": read_idx(folder / "t10k-labels-idx1-ubyte.gz"),
    }


class ArrayUnpickler(pickle.Unpickler):
    """Reads pickles of NumPy arrays, SciPy CSR matrices and plain containers, and refuses every other class."""

    ALLOWED: ClassVar[dict[tuple[str, str], tuple[str, str]]] = {
        **{
            (f"numpy.{core}.multiarray", name): ("numpy._core.multiarray", name)
            for core in ("core", "_core")
            for name in ("_reconstruct", "scalar")
        },
        ("numpy", "ndarray"): ("numpy", "ndarray"),
        ("numpy", "dtype"): ("numpy", "dtype"),
        ("scipy.sparse.csr", "csr_matrix"): ("scipy.sparse", "csr_matrix"),
        ("scipy.sparse._csr", "csr_matrix"): ("scipy.sparse", "csr_matrix"),
        ("copy_reg", "_reconstructor"): ("copyreg", "_reconstructor"),
        ("copyreg", "_reconstructor"): ("copyreg", "_reconstructor"),
        ("__builtin__", "object"): ("builtins", "object"),
        ("builtins", "object"): ("builtins", "object"),
        ("__builtin__", "list"): ("builtins", "list"),
        ("builtins", "list"): ("builtins", "list"),
        ("collections", "defaultdict"): ("collections", "defaultdict"),
        ("_codecs", "encode"): ("_codecs", "encode"),
    }

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self.ALLOWED:
            raise pickle.UnpicklingError(f"the file wants to load {module}.{name}, which no data file may")
        return super().find_class(*self.ALLOWED[module, name])


def read_pickle(data: bytes) -> Any:
    """Read a pickle of arrays, of Python 2 or 3, without running any code of its own."""
    return ArrayUnpickler(io.BytesIO(data), encoding="latin1").load()


def convert_cifar10(folder: Path) -> dict[str, np.ndarray]:
    """Read the six pickled batches in CIFAR-10's tarball, without unpacking it."""
    with tarfile.open(folder / "cifar-10-python.tar.gz") as tar:

        def batch(name: str) -> Any:
            member = tar.extractfile(f"cifar-10-batches-py/{name}")
            if member is None:
                raise ValueError(f"cifar-10-batches-py/{name} is not a file")
            return read_pickle(member.read())

        batches = {"train": [batch(f"data_batch_{i}") for i in range(1, 6)], "test": [batch("test_batch")]}
    arrays = {}
    for part, found in batches.items():
        arrays[f"x_{part}"] = np.concatenate([one["data"] for one in found]).reshape(-1, 3, 32, 32)
        arrays[f"y_{part}"] = np.concatenate([one["labels"] for one in found]).astype(np.uint8)
    return arrays


def convert_planetoid(folder: Path, name: str) -> dict[str, np.ndarray]:
    """Read a citation graph in Planetoid's format, with its public split.

    Nodes of the test range that the files leave out (CiteSeer has 15) get zero features and class 0, and stand in
    no mask. Self-loops and repeated edges are dropped.

    Source: Yang, Cohen, Salakhutdinov, "Revisiting semi-supervised learning with graph embeddings" (2016).
    """
    from scipy.sparse import csr_array, vstack

    def read(part: str) -> Any:
        return read_pickle((folder / f"ind.{name}.{part}").read_bytes())

    known, known_labels, graph = csr_array(read("allx")), np.asarray(read("ally")), read("graph")
    tests, test_labels = csr_array(read("tx")), np.asarray(read("ty"))
    test_index = np.loadtxt(folder / f"ind.{name}.test.index", dtype=np.int64, ndmin=1)
    nodes = max(int(test_index.max()) + 1, len(graph))

    # Row i of the matrix of test nodes belongs to node test_index[i].
    place = csr_array(
        (np.ones(len(test_index), np.float32), (test_index - known.shape[0], np.arange(len(test_index)))),
        shape=(nodes - known.shape[0], len(test_index)),
    )
    x = csr_array(vstack([known, place @ tests]))
    x.sort_indices()
    labels = np.zeros((nodes, known_labels.shape[1]), dtype=known_labels.dtype)
    labels[: len(known_labels)] = known_labels
    labels[test_index] = test_labels

    pairs = np.array([(a, b) for a, row in graph.items() for b in row if a != b], dtype=np.int64).reshape(-1, 2)
    edges = np.unique(np.concatenate([pairs, pairs[:, ::-1]]), axis=0)
    train = read("y").shape[0]
    node = np.arange(nodes)
    return {
        "x_data": x.data.astype(np.float32),
        "x_indices": x.indices,
        "x_indptr": x.indptr,
        "x_shape": np.array(x.shape, dtype=np.int64),
        "y": labels.argmax(axis=1).astype(np.int64),
        "edge_index": np.ascontiguousarray(edges.T),
        "train_mask": node < train,
        "val_mask": (node >= train) & (node < train + 500),
        "test_mask": np.isin(node, test_index),
    }


def convert_text(folder: Path, file: str) -> dict[str, np.ndarray]:
    """Read a text file's bytes."""
    return {"bytes": np.frombuffer((folder / file).read_bytes(), dtype=np.uint8)}


def _mnist(name: str, md5: str) -> RemoteFile:
    mirrors = ("https://ossci-datasets.s3.amazonaws.com/mnist/", "http://yann.lecun.com/exdb/mnist/")
    return RemoteFile(name, f"md5:{md5}", tuple(mirror + name for mirror in mirrors))


def _planetoid(name: str, **checksums: str) -> Source:
    base = "https://raw.githubusercontent.com/kimiyoung/planetoid/af6abf468a772cc055bec88c52e4d6f51b7c37e3/data/"
    files = {f"ind.{name}.{part.replace('_', '.')}": checksum for part, checksum in checksums.items()}
    return Source(
        tuple(RemoteFile(file, f"sha256:{checksum}", (base + file,)) for file, checksum in files.items()),
        partial(convert_planetoid, name=name),
    )


SOURCES: dict[str, Source] = {
    "mnist": Source(
        (
            _mnist("train-images-idx3-ubyte.gz", "f68b3c2dcbeaaa9fbdd348bbdeb94873"),
            _mnist("train-labels-idx1-ubyte.gz", "d53e105ee54ea40749a09fcbcd1e9432"),
            _mnist("t10k-images-idx3-ubyte.gz", "9fb629c4189551a2d022fa330f9573f3"),
            _mnist("t10k-labels-idx1-ubyte.gz", "ec29112dd5afa0611ce80d1b7f02629c"),
        ),
        convert_mnist,
    ),
    "cifar10": Source(
        (
            RemoteFile(
                "cifar-10-python.tar.gz",
                "md5:c58f30108f718f92721af3b95e74349a",
                ("https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz",),
            ),
        ),
        convert_cifar10,
    ),
    "cora": _planetoid(
        "cora",
        tx="b9afbaa4a400df991f6f02ef677e1e44da55ffc04801fd02f9e673987829226a",
        allx="9419ba2f26f5c35243db64aba110e0f35a04851609e0dc5433450676ca6b8543",
        y="94465c14eb53e04ca262198dcbb2521ee8af60fb3f3d546cd6ca24a511b0e7d1",
        ty="41f5ac76596a1699cc33f53084a2419e92961c42bb75f36fc38e616d348532ad",
        ally="2b998f5cc7fedc86e7f97ca2498f47a1ffc1462c29e2d578b23bf3f62b6e7d71",
        graph="58f13302f39dde8852dad6fe6d15b89b077b6d7f837626bce671ef80344b383d",
        test_index="297ce89af2b51a6a194181c7dbe1796c6a1cf9cd9349a88383b1b1e227867875",
    ),
    "citeseer": _planetoid(
        "citeseer",
        tx="539a8906a2da97628d212f2fdd668c109a8b3f0d36574b59e5d3fd5b5303da21",
        allx="2ac30345d95c9ec933a817ee0bdd6a5f077f8c184a20e696910192d534414668",
        y="8ba87e515d8e3ee3cf52f6d2c5b86aa73f11ecad825a808455209ec26cd54924",
        ty="55e5bd1ba1e733a04598753ad1a8d57957f4b8f89e74519f41f4f4938767e4ce",
        ally="f704b2d986dde6c2669934de1f3ae5696a6cf9455c0f6b2646a2d135ea0a1c95",
        graph="d79a4ef9d3e7169aee8946145f6b7306e35bc79bffad26346cfb94e10e9912a7",
        test_index="2af990671580b6b2df5d158d1038f8292e30c9cd821b5453f399659b25b723d4",
    ),
    "tinyshakespeare": Source(
        (
            RemoteFile(
                "input.txt",
                "sha256:86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed",
                ("https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt",),
            ),
        ),
        partial(convert_text, file="input.txt"),
    ),
}
