"""What :func:`provenn.data.load` returns: one frozen class for each kind of data set, of NumPy arrays."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int, Shaped, UInt8


@dataclass(frozen=True, eq=False)
class ImageBundle:
    """Labelled images with the standard test set. ``origin`` says where the pixels come from.

    Shape: images (N, H, W) if grey, (N, 3, H, W) if coloured, values 0 … 255; labels (N,).
    """

    name: str
    origin: str
    x_train: UInt8[np.ndarray, "train ..."]
    y_train: Int[np.ndarray, " train"]
    x_test: UInt8[np.ndarray, "test ..."]
    y_test: Int[np.ndarray, " test"]


@dataclass(frozen=True, eq=False)
class GraphBundle:
    """A graph with features and classes at its nodes, and the standard split of them.

    Shape: ``x`` (nodes, features) dense; ``edge_index`` (2, edges), every edge in both directions; masks (nodes,).
    """

    name: str
    origin: str
    x: Float[np.ndarray, "nodes features"]
    y: Int[np.ndarray, " nodes"]
    edge_index: Int[np.ndarray, "2 edges"]
    train_mask: Bool[np.ndarray, " nodes"]
    val_mask: Bool[np.ndarray, " nodes"]
    test_mask: Bool[np.ndarray, " nodes"]


@dataclass(frozen=True, eq=False)
class TableBundle:
    """A table with its targets: classes (samples,), one number (samples,) or several (samples, targets) a row."""

    name: str
    origin: str
    x: Float[np.ndarray, "samples features"]
    y: Shaped[np.ndarray, "samples ..."]
    feature_names: tuple[str, ...]
    target_names: tuple[str, ...]


@dataclass(frozen=True)
class TextBundle:
    """One text."""

    name: str
    origin: str
    text: str


@dataclass(frozen=True, eq=False)
class AudioBundle:
    """Labelled clips of mono sound, end to end in ``wave``; clip i runs from ``offset[i]`` to ``offset[i + 1]``.

    Shape: ``wave`` (samples,), in [−1, 1]; ``offset`` (clips + 1,); ``y``, ``speaker`` and ``take`` (clips,).
    """

    name: str
    origin: str
    wave: Float[np.ndarray, " samples"]
    offset: Int[np.ndarray, " bounds"]
    y: Int[np.ndarray, " clips"]
    speaker: Int[np.ndarray, " clips"]
    take: Int[np.ndarray, " clips"]
    sample_rate: int

    def clip(self, index: int) -> Float[np.ndarray, " samples"]:
        """Return one clip.

        Args:
            index: Which.
        """
        return self.wave[self.offset[index] : self.offset[index + 1]]

    def padded(self, length: int) -> Float[np.ndarray, "clips length"]:
        """Return all clips with one length: zeros follow the short ones, the long ones are cut.

        Args:
            length: In samples.
        """
        clips = np.zeros((len(self.y), length), dtype=self.wave.dtype)
        for index, row in enumerate(clips):
            clip = self.clip(index)[:length]
            row[: len(clip)] = clip
        return clips


@dataclass(frozen=True, eq=False)
class SeriesBundle:
    """A multivariate time series at equal steps. Shape: ``values`` (times, columns)."""

    name: str
    origin: str
    values: Float[np.ndarray, "times columns"]
    columns: tuple[str, ...]


Bundle = AudioBundle | ImageBundle | SeriesBundle | GraphBundle | TableBundle | TextBundle
