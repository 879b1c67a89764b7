"""Data sets by name, as typed bundles of NumPy arrays; simulators are in ``toys``, corpora in ``language``.

Loads no torch.
"""

from provenn.data.archives import CorruptDataError
from provenn.data.bundles import AudioBundle, Bundle, GraphBundle, ImageBundle, SeriesBundle, TableBundle, TextBundle
from provenn.data.download import DataUnavailableError
from provenn.data.loading import UnknownDataError, data_folder, load, local_archive, names

__all__ = [
    "AudioBundle",
    "Bundle",
    "CorruptDataError",
    "DataUnavailableError",
    "GraphBundle",
    "ImageBundle",
    "SeriesBundle",
    "TableBundle",
    "TextBundle",
    "UnknownDataError",
    "data_folder",
    "load",
    "local_archive",
    "names",
]
