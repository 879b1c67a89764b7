"""Load a data set by its name."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar, overload

import numpy as np

from provenn.core.nearest import unknown_name_message
from provenn.data.archives import audio_bundle, graph_bundle, image_bundle, read_archive, series_bundle, text_bundle
from provenn.data.bundles import AudioBundle, Bundle, GraphBundle, ImageBundle, SeriesBundle, TableBundle, TextBundle
from provenn.data.download import DataUnavailableError, fetch
from provenn.data.sources import SOURCES

Root = str | os.PathLike[str] | None
ImageName = Literal["mnist", "cifar10"]
GraphName = Literal["cora", "citeseer"]
TextName = Literal["tinyshakespeare"]
AudioName = Literal["fsdd"]
SeriesName = Literal["etth1"]
Built = TypeVar("Built")
TableName = Literal["digits", "iris", "wine", "breast_cancer", "diabetes", "linnerud"]

_BUILDERS: dict[str, Any] = {
    "mnist": image_bundle,
    "cifar10": image_bundle,
    "cora": graph_bundle,
    "citeseer": graph_bundle,
    "tinyshakespeare": text_bundle,
    "fsdd": audio_bundle,
    "etth1": series_bundle,
}
_HOLDS = {
    "fsdd": "wave (int16, end to end), offset, y, speaker, take and sample_rate of the Free Spoken Digit Dataset",
    "etth1": "values (17420, 7) and columns of ETTh1, a transformer's hourly load and oil temperature",
}
"""What to put into an archive that has no address to be fetched from."""
_BUNDLED = ("digits", "iris", "wine", "breast_cancer", "diabetes", "linnerud")


class UnknownDataError(ValueError):
    """No data set has this name; the message gives the three nearest."""


def names() -> list[str]:
    """Return the names that :func:`load` knows."""
    return sorted([*_BUILDERS, *_BUNDLED])


def data_folder(root: Root = None) -> Path:
    """Return the folder of downloaded sets: ``root``, else ``$PROVENN_DATA``, else the platform's cache folder."""
    chosen = root or os.environ.get("PROVENN_DATA")
    if chosen:
        return Path(chosen).expanduser()
    import platformdirs

    return platformdirs.user_cache_path("provenn") / "data"


@overload
def load(name: ImageName, root: Root = None) -> ImageBundle: ...
@overload
def load(name: GraphName, root: Root = None) -> GraphBundle: ...
@overload
def load(name: TextName, root: Root = None) -> TextBundle: ...
@overload
def load(name: AudioName, root: Root = None) -> AudioBundle: ...
@overload
def load(name: SeriesName, root: Root = None) -> SeriesBundle: ...
@overload
def load(name: TableName, root: Root = None) -> TableBundle: ...
@overload
def load(name: str, root: Root = None) -> Bundle: ...
def load(name: str, root: Root = None) -> Bundle:
    """Load a data set; one that is not on disk is downloaded from its official source first.

    Args:
        name: ``"mnist"``, ``"cifar10"``; ``"cora"``, ``"citeseer"`` (public split); ``"tinyshakespeare"``; ``"fsdd"``
            (spoken digits) and ``"etth1"`` (a time series), which must lie in the folder; or one that scikit-learn
            brings along: ``"digits"``, ``"iris"``, ``"wine"``, ``"breast_cancer"``, ``"diabetes"``, ``"linnerud"``.
        root: Folder of the archives; without it ``$PROVENN_DATA``, else the platform's cache folder.

    Returns:
        A bundle of its kind. A CIFAR-10 archive of JPEG files is decoded (some four seconds) and says so in
        ``origin``.

    Raises:
        UnknownDataError: There is no such set.
        DataUnavailableError: It is not on disk and cannot be fetched.
        CorruptDataError: Its archive is damaged.
    """
    if name in _BUNDLED:
        return _bundled(name)
    if name not in _BUILDERS:
        raise UnknownDataError(unknown_name_message("data set", name, names()))
    if name in _HOLDS:
        return local_archive(name, _HOLDS[name], _BUILDERS[name], root)
    path = data_folder(root) / f"{name}.npz"
    if not path.exists():
        fetch(name, SOURCES[name], path)
    bundle: Bundle = read_archive(path, name, _BUILDERS[name])
    return bundle


def local_archive(
    name: str, holds: str, build: Callable[[str, Mapping[str, np.ndarray]], Built], root: Root = None
) -> Built:
    """Read an archive that has no address to be fetched from, and must lie in the data folder.

    Args:
        name: The set's name; the file is ``name.npz``.
        holds: What to put into it, in words, for who has none.
        build: ``build(name, archive)`` makes of its arrays what is wanted, and raises where they do not fit.
        root: Folder of the archives, as for :func:`load`.

    Returns:
        What ``build`` returned.

    Raises:
        DataUnavailableError: It is not there.
        CorruptDataError: It is damaged, or ``build`` could not use it.
    """
    path = data_folder(root) / f"{name}.npz"
    if not path.exists():
        raise DataUnavailableError(
            f"data set {name!r} needs the file {path.name} in the folder {path.parent}, and has no address to be "
            f"fetched from; it holds {holds}. PROVENN_DATA names another folder"
        )
    return read_archive(path, name, build)


def _bundled(name: str) -> TableBundle:
    from sklearn import datasets

    found = getattr(datasets, f"load_{name}")()
    target = np.asarray(found.target)
    y = target.astype(np.int64) if target.dtype.kind in "iu" else target
    # A regression on one target has no names for classes.
    targets = tuple(str(one) for one in found.get("target_names", ()))
    return TableBundle(name, f"{name} (scikit-learn)", found.data, y, tuple(map(str, found.feature_names)), targets)
