"""Bytes of trace files, read in place: plain, gzip, and tar archives of either."""

from __future__ import annotations

import gzip
import tarfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, NamedTuple, cast

from smg_sglang.errors import TraceError

#: What a gzip file begins with, whatever it is called.
_GZIP = b"\x1f\x8b"
_ENDINGS = (".json", ".json.gz")
_BROKEN = (OSError, EOFError, zlib.error, tarfile.TarError)


class Piece(NamedTuple):
    """A document of a trace and where it stands."""

    file: str
    where: str | None
    data: bytes

    def error(self, reason: str, further: str | None = None) -> TraceError:
        """What is wrong with it; `further` narrows the place down."""
        places = [place for place in (self.where, further) if place]
        return TraceError(self.file, ", ".join(places) or None, reason)


def is_collection(path: Path) -> bool:
    """Whether there are several files in it: a directory or a tar archive."""
    return path.is_dir() or (path.is_file() and _is_tar(path))


def lines(path: Path) -> Iterator[Piece]:
    """Each line of a file, gzip or not. Raises TraceError where it cannot be read to its end."""
    number = 0
    try:
        with _opened(path) as file:
            for number, line in enumerate(file, 1):
                yield Piece(str(path), f"line {number}", line)
    except _BROKEN as error:
        raise TraceError(str(path), f"line {number + 1}", f"cannot be read: {error}") from error


def whole(path: Path) -> Piece:
    """A whole file as one document."""
    try:
        with _opened(path) as file:
            return Piece(str(path), None, file.read())
    except _BROKEN as error:
        raise TraceError(str(path), None, f"cannot be read: {error}") from error


def members(path: Path) -> Iterator[Piece]:
    """Each `*.json` and `*.json.gz` of a directory or tar archive, by name; a README or licence
    beside is none.

    Raises TraceError where one cannot be read.
    """
    if path.is_dir():
        for file in sorted([*path.glob("**/*.json"), *path.glob("**/*.json.gz")]):
            yield whole(file)
        return
    try:
        with tarfile.open(path) as archive:
            inside = [m for m in archive.getmembers() if m.isfile() and m.name.endswith(_ENDINGS)]
            for member in sorted(inside, key=lambda m: m.name):
                data = cast(IO[bytes], archive.extractfile(member)).read()
                yield _unpacked(Piece(str(path), f"member {member.name}", data))
    except _BROKEN as error:
        raise TraceError(str(path), None, f"cannot be read: {error}") from error


def _unpacked(piece: Piece) -> Piece:
    if not piece.data.startswith(_GZIP):
        return piece
    try:
        return piece._replace(data=gzip.decompress(piece.data))
    except _BROKEN as error:
        raise piece.error(f"cannot be read: {error}") from error


def _is_tar(path: Path) -> bool:
    try:
        return tarfile.is_tarfile(path)
    except _BROKEN:
        return False


@contextmanager
def _opened(path: Path) -> Iterator[IO[bytes]]:
    """The file's bytes, unpacked where they begin like gzip (whatever the file is called)."""
    with path.open("rb") as raw:
        packed = raw.read(2) == _GZIP
        raw.seek(0)
        if not packed:
            yield raw
            return
        with gzip.open(raw) as unpacked:
            yield cast(IO[bytes], unpacked)
