"""Loading: roots, bundles, downloads from a loopback server that is well, ill or slow, and damaged archives."""

from __future__ import annotations

import hashlib
import io
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from data import samples
from data.loopback import loopback
from PIL import Image

from provenn import data
from provenn.data import download, loading
from provenn.data.archives import write_archive
from provenn.data.sources import RemoteFile, Source, convert_mnist


@pytest.fixture
def server():
    with loopback() as served:
        yield served


@pytest.fixture(autouse=True)
def hurried(monkeypatch) -> None:
    monkeypatch.setattr(download, "PAUSE", 0.01)
    monkeypatch.setattr(download, "TIMEOUT", 0.3)


def mnist_source(server, *manners: str) -> Source:
    """MNIST in miniature, served in each of these manners in turn."""
    server.files = samples.mnist_files()
    return Source(
        tuple(
            RemoteFile(
                name,
                f"md5:{hashlib.md5(content).hexdigest()}",
                tuple(f"{server.address}/{manner}/{name}" for manner in manners),
            )
            for name, content in server.files.items()
        ),
        convert_mnist,
    )


def visible(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.suffix != ".lock") if folder.exists() else []


@pytest.mark.parametrize("manners", [("good",), ("redirect",), ("missing", "good"), ("truncated", "good")])
def test_a_missing_set_is_downloaded_and_converted(tmp_path, monkeypatch, server, manners) -> None:
    monkeypatch.setitem(loading.SOURCES, "mnist", mnist_source(server, *manners))
    root = tmp_path / "new" / "folder"
    bundle = data.load("mnist", root)
    assert np.array_equal(bundle.x_train, samples.MNIST["x_train"])
    assert bundle.y_train.tolist() == [7, 1]
    assert bundle.y_train.dtype == np.int64
    assert bundle.x_test.dtype == np.uint8
    assert bundle.origin == "mnist"
    assert visible(root) == ["mnist.npz"]
    asked = server.requests.total()
    assert np.array_equal(data.load("mnist", root).x_test, bundle.x_test)
    assert server.requests.total() == asked


@pytest.mark.parametrize("manner", ["missing", "truncated", "corrupt", "stalled"])
def test_a_file_that_cannot_be_had_leaves_words_and_nothing_else(tmp_path, monkeypatch, server, manner) -> None:
    monkeypatch.setitem(loading.SOURCES, "mnist", mnist_source(server, manner))
    start = time.monotonic()
    with pytest.raises(data.DataUnavailableError) as caught:
        data.load("mnist", tmp_path)
    # Three attempts of 0.3 s at most; the bound only tells "gives up" from "hangs".
    assert time.monotonic() - start < 20
    assert server.requests[f"/{manner}/train-images-idx3-ubyte.gz"] == download.ATTEMPTS
    message = str(caught.value)
    assert "mnist.npz" in message
    assert str(tmp_path) in message
    assert f"python -m provenn.data mnist --root {tmp_path}" in message
    assert "train-images-idx3-ubyte.gz" in message
    assert visible(tmp_path) == []


@pytest.mark.parametrize("manner", ["missing", "truncated", "corrupt", "stalled"])
def test_a_passing_fault_is_retried(tmp_path, monkeypatch, server, manner) -> None:
    monkeypatch.setitem(loading.SOURCES, "mnist", mnist_source(server, manner))
    server.recover_after = 2
    assert len(data.load("mnist", tmp_path).x_train) == 2
    assert server.requests[f"/{manner}/train-images-idx3-ubyte.gz"] == 3


def test_no_server_at_all_is_the_same_error(tmp_path, monkeypatch, server) -> None:
    source = mnist_source(server, "good")
    gone = tuple(RemoteFile(file.name, file.checksum, ("http://127.0.0.1:9/x",)) for file in source.files)
    monkeypatch.setitem(loading.SOURCES, "mnist", Source(gone, convert_mnist))
    with pytest.raises(data.DataUnavailableError, match=r"127\.0\.0\.1"):
        data.load("mnist", tmp_path)


def test_a_file_of_the_wrong_format_leaves_nothing(tmp_path, monkeypatch, server) -> None:
    source = mnist_source(server, "good")

    def fail(folder: Path) -> dict[str, np.ndarray]:
        raise ValueError("not an IDX file")

    monkeypatch.setitem(loading.SOURCES, "mnist", Source(source.files, fail))
    with pytest.raises(data.DataUnavailableError, match="not an IDX file"):
        data.load("mnist", tmp_path)
    assert visible(tmp_path) == []


def test_a_write_that_is_broken_off_leaves_the_old_file(tmp_path) -> None:
    path = tmp_path / "x.npz"
    write_archive(path, {"a": np.arange(3)})
    with pytest.raises(ValueError, match="Object arrays"):
        write_archive(path, {"a": np.arange(4), "b": np.array([object()])})
    assert visible(tmp_path) == ["x.npz"]
    with np.load(path) as archive:
        assert archive["a"].tolist() == [0, 1, 2]


def test_two_that_load_at_once_download_once(tmp_path, monkeypatch, server) -> None:
    monkeypatch.setitem(loading.SOURCES, "mnist", mnist_source(server, "good"))
    with ThreadPoolExecutor(8) as pool:
        bundles = list(pool.map(lambda _: data.load("mnist", tmp_path), range(8)))
    assert all(np.array_equal(bundle.x_train, samples.MNIST["x_train"]) for bundle in bundles)
    assert set(server.requests.values()) == {1}
    assert visible(tmp_path) == ["mnist.npz"]


def test_a_folder_that_cannot_be_written_is_named(tmp_path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("")
    with pytest.raises(data.DataUnavailableError, match=str(blocked / "root")):
        data.load("mnist", blocked / "root")


def good_archive(path: Path) -> dict[str, np.ndarray]:
    write_archive(path, samples.MNIST)
    return dict(samples.MNIST)


def test_damaged_archives_are_named(tmp_path) -> None:
    path = tmp_path / "mnist.npz"
    arrays = good_archive(path)
    whole = path.read_bytes()
    for content in (b"", b"no archive", whole[: len(whole) // 2], whole[:-1]):
        path.write_bytes(content)
        with pytest.raises(data.CorruptDataError, match="delete it") as caught:
            data.load("mnist", tmp_path)
        assert str(path) in str(caught.value)
    for name in arrays:
        write_archive(path, {key: value for key, value in arrays.items() if key != name})
        with pytest.raises(data.CorruptDataError, match=name):
            data.load("mnist", tmp_path)
    write_archive(path, arrays | {"y_train": np.zeros(3, np.uint8)})
    with pytest.raises(data.CorruptDataError, match="labels"):
        data.load("mnist", tmp_path)


def test_no_flipped_byte_gives_wrong_data_or_another_error(tmp_path) -> None:
    path = tmp_path / "mnist.npz"
    arrays = good_archive(path)
    whole = path.read_bytes()
    caught = 0
    for place in range(len(whole)):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 0xFF]) + whole[place + 1 :])
        try:
            bundle = data.load("mnist", tmp_path)
        except data.CorruptDataError:
            caught += 1
        else:
            assert all(np.array_equal(getattr(bundle, key), value) for key, value in arrays.items())
    # The rest are bytes that no reader looks at, such as dates.
    assert caught > len(whole) / 4


def test_jpeg_archives_are_decoded_and_say_so(tmp_path) -> None:
    frames = []
    for shade in (40, 200, 90):
        stream = io.BytesIO()
        picture = np.full((32, 32, 3), shade, np.uint8)
        picture[:16, :, 0] = 0
        Image.fromarray(picture).save(stream, "JPEG", quality=95, subsampling=0)
        frames.append(np.frombuffer(stream.getvalue(), np.uint8))
    ends = np.cumsum([0, *map(len, frames)])
    write_archive(
        tmp_path / "cifar10.npz",
        {
            "jpeg_train": np.concatenate(frames[:2]),
            "offset_train": ends[:3],
            "y_train": np.array([1, 2], np.uint8),
            "jpeg_test": frames[2],
            "offset_test": np.array([0, len(frames[2])]),
            "y_test": np.array([3], np.uint8),
        },
    )
    bundle = data.load("cifar10", tmp_path)
    assert bundle.origin == "cifar10 (jpeg)"
    assert bundle.x_train.shape == (2, 3, 32, 32)
    assert bundle.x_test.shape == (1, 3, 32, 32)
    # JPEG is lossy; away from the edge of the two flat halves it is off by a few levels at most.
    for image, shade in ((bundle.x_train[0], 40), (bundle.x_train[1], 200), (bundle.x_test[0], 90)):
        assert np.abs(image[:, 24:].astype(int) - shade).max() <= 4
        assert np.abs(image[1:, :8].astype(int) - shade).max() <= 4
        assert image[0, :8].max() <= 4


def test_graphs_and_texts_are_typed(tmp_path) -> None:
    from provenn.data.sources import convert_planetoid

    for name, content in samples.planetoid_files("cora").items():
        (tmp_path / name).write_bytes(content)
    arrays = convert_planetoid(tmp_path, "cora")
    write_archive(tmp_path / "cora.npz", arrays)
    graph = data.load("cora", tmp_path)
    assert graph.x.tolist() == [[1, 0], [0, 2], [3, 0], [0, 0], [4, 0], [5, 5], [0, 0], [0, 7]]
    assert (graph.x.dtype, graph.y.dtype, graph.test_mask.dtype) == (np.float32, np.int64, np.bool_)
    assert graph.edge_index.shape == (2, 6)
    write_archive(tmp_path / "cora.npz", arrays | {"edge_index": np.array([[0], [8]])})
    with pytest.raises(data.CorruptDataError, match="8 nodes"):
        data.load("cora", tmp_path)
    write_archive(tmp_path / "tinyshakespeare.npz", {"bytes": np.frombuffer("Café\n".encode(), np.uint8)})
    assert data.load("tinyshakespeare", tmp_path).text == "Café\n"
    write_archive(tmp_path / "tinyshakespeare.npz", {"bytes": np.array([0xFF], np.uint8)})
    with pytest.raises(data.CorruptDataError, match="utf-8"):
        data.load("tinyshakespeare", tmp_path)


def test_sounds_are_cut_padded_and_scaled(tmp_path) -> None:
    arrays = {
        "wave": np.array([0, 16384, -32768, 5, 6], np.int16),
        "offset": np.array([0, 3, 5]),
        "y": np.array([7, 7]),
        "speaker": np.array(["theo", "anna"]),
        "take": np.array([0, 1]),
        "sample_rate": np.array(8000),
    }
    write_archive(tmp_path / "fsdd.npz", arrays)
    sounds = data.load("fsdd", tmp_path)
    assert sounds.clip(0).tolist() == [0, 0.5, -1]
    assert sounds.padded(2).tolist() == [[0, 0.5], [5 / 32768, 6 / 32768]]
    assert sounds.padded(4)[1].tolist() == [5 / 32768, 6 / 32768, 0, 0]
    assert (sounds.speaker.tolist(), sounds.sample_rate) == ([1, 0], 8000)
    for wrong in ({"offset": np.array([0, 3, 4])}, {"y": np.array([7])}, {"wave": np.zeros(5)}):
        write_archive(tmp_path / "fsdd.npz", arrays | wrong)
        with pytest.raises(data.CorruptDataError, match="does not fit its 2 clips"):
            data.load("fsdd", tmp_path)


def test_series_and_sets_without_an_address(tmp_path) -> None:
    with pytest.raises(data.DataUnavailableError, match=r"'etth1' needs the file etth1\.npz .*columns of ETTh1"):
        data.load("etth1", tmp_path)
    write_archive(tmp_path / "etth1.npz", {"values": np.ones((3, 2)), "columns": np.array(["a", "b"])})
    series = data.load("etth1", tmp_path)
    assert (series.values.shape, series.values.dtype, series.columns) == ((3, 2), np.float32, ("a", "b"))
    write_archive(tmp_path / "etth1.npz", {"values": np.ones((3, 2)), "columns": np.array(["a"])})
    with pytest.raises(data.CorruptDataError, match="1 columns"):
        data.load("etth1", tmp_path)


@pytest.mark.parametrize(
    ("name", "shape", "targets", "classes"),
    [
        ("digits", (1797, 64), (1797,), 10),
        ("iris", (150, 4), (150,), 3),
        ("wine", (178, 13), (178,), 3),
        ("breast_cancer", (569, 30), (569,), 2),
        ("diabetes", (442, 10), (442,), None),
        ("linnerud", (20, 3), (20, 3), None),
    ],
)
def test_bundled_sets_need_no_folder(monkeypatch, tmp_path, name, shape, targets, classes) -> None:
    monkeypatch.setenv("PROVENN_DATA", str(tmp_path / "absent"))
    bundle = data.load(name)
    assert bundle.x.shape == shape
    assert bundle.y.shape == targets
    assert len(bundle.feature_names) == shape[1]
    if classes:
        assert bundle.y.dtype == np.int64
        assert len(np.unique(bundle.y)) == len(bundle.target_names) == classes
    assert not (tmp_path / "absent").exists()


def test_the_root_is_the_argument_then_the_variable_then_the_cache(monkeypatch, tmp_path) -> None:
    monkeypatch.setenv("PROVENN_DATA", str(tmp_path / "variable"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert data.data_folder(tmp_path / "argument") == tmp_path / "argument"
    assert data.data_folder() == tmp_path / "variable"
    monkeypatch.delenv("PROVENN_DATA")
    assert "provenn" in str(data.data_folder())


def test_an_unknown_name_gets_the_nearest() -> None:
    with pytest.raises(data.UnknownDataError, match=r"'cifar'.*cifar10"):
        data.load("cifar")


def run_python(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, timeout=60, check=False)


def test_loading_imports_no_torch() -> None:
    code = "import sys; from provenn.data import load; load('iris'); print('torch' in sys.modules)"
    assert run_python("-c", code).stdout.strip() == "False"


def test_the_command_that_errors_name_exists(tmp_path) -> None:
    good_archive(tmp_path / "mnist.npz")
    good = run_python("-m", "provenn.data", "mnist", "--root", str(tmp_path))
    assert good.returncode == 0
    assert str(tmp_path) in good.stdout
    unknown = run_python("-m", "provenn.data", "mnits")
    assert unknown.returncode == 2
    assert "mnist" in unknown.stderr
