"""Fetch data sets from the command line: ``python -m provenn.data NAME ... [--root FOLDER]``."""

from __future__ import annotations

import argparse
import sys

from provenn.data import CorruptDataError, DataUnavailableError, UnknownDataError, data_folder, load, names


def main() -> int:
    """Load each named set, fetching those that are not on disk, and say where they are."""
    parser = argparse.ArgumentParser(prog="python -m provenn.data", description="Fetch data sets.")
    parser.add_argument("name", nargs="+", help=", ".join(names()))
    parser.add_argument("--root", help="folder of the archives (default: $PROVENN_DATA, else the cache folder)")
    arguments = parser.parse_args()
    try:
        for name in arguments.name:
            print(f"{load(name, arguments.root).origin}: ready in {data_folder(arguments.root)}")
    except (UnknownDataError, DataUnavailableError, CorruptDataError) as error:
        print(error, file=sys.stderr)
        return 2 if isinstance(error, UnknownDataError) else 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
