"""The cache saves work and is never trusted."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

import provenn.catalog.compiled as module
from provenn.catalog.compiled import compiled


class Maker:
    def __init__(self) -> None:
        self.calls = 0

    def __call__(self) -> bytes:
        self.calls += 1
        return b"made %d" % self.calls


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "cache"
    monkeypatch.setattr(module, "cache_folder", lambda: folder)
    return folder


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "source"
    path.write_text("one")
    os.utime(path, ns=(1, 1))
    return path


def test_made_once(folder: Path, source: Path):
    make = Maker()
    assert [compiled("x", [source], make) for _ in range(3)] == [b"made 1"] * 3
    assert make.calls == 1
    assert len(list(folder.iterdir())) == 1, "no temporary file is left"


def test_made_anew_when_a_source_changes(folder: Path, source: Path, tmp_path: Path):
    make = Maker()
    compiled("x", [source], make)
    os.utime(source, ns=(2, 2))
    assert compiled("x", [source], make) == b"made 2"
    source.write_text("longer")
    os.utime(source, ns=(2, 2))
    assert compiled("x", [source], make) == b"made 3"
    other = tmp_path / "other"
    other.write_text("")
    assert compiled("x", [source, other], make) == b"made 4"
    assert compiled("x", [other, source], make) == b"made 4", "the order of the sources does not matter"
    assert compiled("x", [source], make) == b"made 5"


def test_names_do_not_mix(folder: Path, source: Path):
    assert compiled("x", [source], lambda: b"x") == b"x"
    assert compiled("y", [source], lambda: b"y") == b"y"
    assert compiled("x", [source], lambda: b"new") == b"x"


@pytest.mark.parametrize("damage", [lambda b: b[:-1], lambda b: b"", lambda b: b[:-1] + b"?", lambda b: b"\0" * len(b)])
def test_a_damaged_file_is_made_anew(folder: Path, source: Path, damage):
    make = Maker()
    compiled("x", [source], make)
    (file,) = folder.iterdir()
    file.write_bytes(damage(file.read_bytes()))
    assert compiled("x", [source], make) == b"made 2"
    assert compiled("x", [source], make) == b"made 2"


def test_an_unreadable_file_is_made_anew(folder: Path, source: Path):
    make = Maker()
    compiled("x", [source], make)
    (file,) = folder.iterdir()
    file.unlink()
    file.mkdir()
    assert compiled("x", [source], make) == b"made 2"
    assert list(folder.iterdir()) == [file], "the temporary file is taken away"


def test_a_folder_that_cannot_be_made_is_left_alone(folder: Path, source: Path):
    folder.write_text("a file stands where the folder should")
    make = Maker()
    assert compiled("x", [source], make) == b"made 1"
    assert compiled("x", [source], make) == b"made 2"
    assert folder.is_file()


def test_what_make_raises_comes_through(folder: Path, source: Path):
    with pytest.raises(ZeroDivisionError):
        compiled("x", [source], lambda: bytes(1 // 0))
    assert not folder.exists()
