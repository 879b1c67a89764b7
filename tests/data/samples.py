"""Hand-made official files, three images or five nodes large, in the formats of the real ones."""

from __future__ import annotations

import gzip
import io
import pickle
import struct
import tarfile
from collections import defaultdict

import numpy as np
from scipy.sparse import csr_matrix

MNIST = {
    "x_train": np.arange(2 * 3 * 4, dtype=np.uint8).reshape(2, 3, 4),
    "y_train": np.array([7, 1], dtype=np.uint8),
    "x_test": np.full((1, 3, 4), 255, dtype=np.uint8),
    "y_test": np.array([3], dtype=np.uint8),
}


def idx(array: np.ndarray) -> bytes:
    header = b"\0\0\x08" + bytes([array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape)
    return gzip.compress(header + array.tobytes(), mtime=0)


def mnist_files() -> dict[str, bytes]:
    return {
        "train-images-idx3-ubyte.gz": idx(MNIST["x_train"]),
        "train-labels-idx1-ubyte.gz": idx(MNIST["y_train"]),
        "t10k-images-idx3-ubyte.gz": idx(MNIST["x_test"]),
        "t10k-labels-idx1-ubyte.gz": idx(MNIST["y_test"]),
    }


def cifar_files(batches: dict[str, tuple[np.ndarray, list[int]]]) -> dict[str, bytes]:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w:gz") as tar:
        for name, (rows, labels) in batches.items():
            data = pickle.dumps({"data": rows, "labels": labels, "batch_label": name}, protocol=2)
            member = tarfile.TarInfo(f"cifar-10-batches-py/{name}")
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return {"cifar-10-python.tar.gz": stream.getvalue()}


def planetoid_files(name: str) -> dict[str, bytes]:
    """Eight nodes with the public split's pattern: node 0 trains, nodes 7, 4 and 5 test, node 6 is in no file."""
    known = csr_matrix(np.array([[1, 0], [0, 2], [3, 0], [0, 0]], dtype=np.float32))
    known_labels = np.array([[0, 1, 0], [1, 0, 0], [0, 0, 1], [0, 1, 0]], dtype=np.int32)
    tests = csr_matrix(np.array([[0, 7], [4, 0], [5, 5]], dtype=np.float32))
    test_labels = np.array([[0, 0, 1], [1, 0, 0], [0, 1, 0]], dtype=np.int32)
    graph = defaultdict(list, {0: [1, 1, 0], 1: [0], 2: [7], 3: [], 4: [5], 5: [4], 6: [], 7: [2]})
    parts = {"tx": tests, "allx": known, "y": known_labels[:1], "ty": test_labels, "ally": known_labels, "graph": graph}
    files = {f"ind.{name}.{part}": pickle.dumps(value, protocol=2) for part, value in parts.items()}
    return files | {f"ind.{name}.test.index": b"7\n4\n5\n"}
