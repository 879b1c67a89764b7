"""Compressed NumPy archives: written whole or not at all, read with words for what is wrong with them."""

from __future__ import annotations

import io
import itertools
import os
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeVar

import numpy as np

from provenn.data.bundles import AudioBundle, GraphBundle, ImageBundle, SeriesBundle, TextBundle

B = TypeVar("B")

_DAMAGE = (
    ValueError, TypeError, AttributeError, NotImplementedError, EOFError, OSError, zipfile.BadZipFile, zlib.error,
)  # fmt: skip
"""What NumPy, zipfile and Pillow raise for one file or another that is not what it should be."""


class CorruptDataError(ValueError):
    """A data file cannot be read, or is not what its name says; the message names it."""


def write_archive(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Write arrays to ``path`` as ``.npz``; the file appears complete, or what was there before stays."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            np.savez_compressed(file, allow_pickle=False, **arrays)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def read_archive(path: Path, name: str, build: Callable[[str, Mapping[str, np.ndarray]], B]) -> B:
    """Read an archive and build a bundle of it.

    Args:
        path: The archive.
        name: The data set's name.
        build: One of this module's functions from archive to bundle.

    Raises:
        CorruptDataError: The file is no archive, is damaged, lacks a key, or its arrays do not fit each other.
    """
    with path.open("rb") as file:
        try:
            with np.load(file, allow_pickle=False) as archive:
                return build(name, archive)
        except KeyError as error:
            reason = f"it has no array {str(error.args[0]).split()[0]!r}"
        except _DAMAGE as error:
            reason = str(error) or type(error).__name__
    raise CorruptDataError(
        f"data file {path} is damaged or not the {name} archive ({reason}); delete it and load {name!r} again"
    )


def image_bundle(name: str, archive: Mapping[str, np.ndarray]) -> ImageBundle:
    """Build a bundle of the keys ``x_train y_train x_test y_test``, or of JPEG files end to end in place of images."""
    jpeg = "jpeg_train" in archive
    images: dict[str, np.ndarray] = {}
    for part in ("train", "test"):
        x = _decoded(archive[f"jpeg_{part}"], archive[f"offset_{part}"]) if jpeg else archive[f"x_{part}"]
        y = archive[f"y_{part}"].astype(np.int64)
        if x.dtype != np.uint8 or x.ndim not in (3, 4) or y.shape != x.shape[:1]:
            raise ValueError(f"{part} images are {x.dtype} {x.shape} with labels {y.shape}")
        images |= {f"x_{part}": x, f"y_{part}": y}
    return ImageBundle(name, f"{name} (jpeg)" if jpeg else name, **images)


def _decoded(jpeg: np.ndarray, offset: np.ndarray) -> np.ndarray:
    from PIL import Image

    data = jpeg.tobytes()
    frames = [np.asarray(Image.open(io.BytesIO(data[a:b]))) for a, b in itertools.pairwise(offset)]
    return np.ascontiguousarray(np.stack(frames).transpose(0, 3, 1, 2))


def graph_bundle(name: str, archive: Mapping[str, np.ndarray]) -> GraphBundle:
    """Build a bundle of CSR features ``x_data x_indices x_indptr x_shape``, ``y``, ``edge_index`` and the masks."""
    from scipy.sparse import csr_array

    parts = (archive["x_data"], archive["x_indices"], archive["x_indptr"])
    x = csr_array(parts, shape=tuple(archive["x_shape"].tolist())).toarray().astype(np.float32, copy=False)
    y, edge_index = archive["y"].astype(np.int64), archive["edge_index"].astype(np.int64)
    masks = [archive[f"{part}_mask"].astype(bool) for part in ("train", "val", "test")]
    nodes = len(x)
    fits = all(array.shape == (nodes,) for array in (y, *masks)) and edge_index.ndim == 2 and len(edge_index) == 2
    if not fits or (edge_index.size and not 0 <= edge_index.min() <= edge_index.max() < nodes):
        raise ValueError(f"its arrays do not fit the {nodes} nodes")
    return GraphBundle(name, name, x, y, edge_index, *masks)


def text_bundle(name: str, archive: Mapping[str, np.ndarray]) -> TextBundle:
    """Build a bundle of ``bytes``, UTF-8."""
    return TextBundle(name, name, archive["bytes"].tobytes().decode("utf-8"))


def audio_bundle(name: str, archive: Mapping[str, np.ndarray]) -> AudioBundle:
    """Build a bundle of 16-bit ``wave`` end to end, ``offset``, ``y``, ``speaker``, ``take`` and ``sample_rate``."""
    wave, offset = archive["wave"], archive["offset"].astype(np.int64)
    labels = [np.unique(archive[key], return_inverse=True)[1].astype(np.int64) for key in ("y", "speaker", "take")]
    clips = len(offset) - 1
    ordered = (
        offset.ndim == 1 and clips >= 1 and offset[0] == 0 and offset[-1] == len(wave) and (np.diff(offset) > 0).all()
    )
    if wave.dtype != np.int16 or not ordered or any(one.shape != (clips,) for one in labels):
        raise ValueError(f"its {wave.dtype} wave of {wave.shape} does not fit its {clips} clips")
    return AudioBundle(name, name, wave.astype(np.float32) / 32768, offset, *labels, int(archive["sample_rate"]))


def series_bundle(name: str, archive: Mapping[str, np.ndarray]) -> SeriesBundle:
    """Build a bundle of ``values`` and the names of their ``columns``."""
    values, columns = archive["values"].astype(np.float32), tuple(map(str, archive["columns"]))
    if values.ndim != 2 or values.shape[1] != len(columns):
        raise ValueError(f"its values are {values.shape} with {len(columns)} columns")
    return SeriesBundle(name, name, values, columns)
