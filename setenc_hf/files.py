"""Files that are there whole or not at all, and files that may be compressed."""

import gzip
import hashlib
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO
from zlib import error as ZlibError

from .errors import InputError

PARTIAL = ".partial"
OF_PROCESS = secrets.token_hex(4)  # containers that share a disk share the numbers of processes too
DAMAGED = (EOFError, gzip.BadGzipFile, ZlibError)  # what gzip raises for bytes that are not, or not all, there


def partial_path(path: Path) -> Path:
    """Return the name under which `path` is written before it is complete: beside it, and never mistaken for it."""
    return path.with_name(f".{path.name}.{os.getpid()}.{OF_PROCESS}{PARTIAL}")


@contextmanager
def atomic_file(path: str | Path) -> Iterator[IO[str]]:
    """Open `path` for writing text; it appears under its name only when the block ends without an error.

    A name that ends in `.gz` is compressed, with no time stamp in it, so that equal content gives equal bytes.
    """
    path = Path(path)
    if path.is_dir():
        raise InputError(f"{path}: is a directory; name a file to write")
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = partial_path(path)
    try:
        with open(partial, "wb") as raw:
            if path.suffix == ".gz":
                with (
                    gzip.GzipFile(fileobj=raw, filename="", mode="wb", mtime=0) as packed,
                    _text_writer(packed) as text,
                ):
                    yield text
            else:
                with _text_writer(raw, close=False) as text:
                    yield text
            raw.flush()
            os.fsync(raw.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def _text_writer(raw, close: bool = True) -> Iterator[IO[str]]:
    import io

    text = io.TextIOWrapper(raw, encoding="utf-8", newline="\n")
    yield text
    text.flush()
    if not close:
        text.detach()


@contextmanager
def partial_folder(path: Path) -> Iterator[Path]:
    """Give an empty folder beside `path`, and remove what is left of it at the end."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = partial_path(path)
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    try:
        yield partial
    finally:
        shutil.rmtree(partial, ignore_errors=True)


@contextmanager
def atomic_folder(path: str | Path, overwrite: bool = False) -> Iterator[Path]:
    """Give a folder to fill that appears as `path` only when the block ends without an error.

    An existing non-empty `path` is refused unless `overwrite` is set, and then replaced only at the end.
    """
    path = Path(path)
    check_folder(path, overwrite)
    with partial_folder(path) as partial:
        yield partial
        if path.exists():
            shutil.rmtree(path)
        os.replace(partial, path)


def check_folder(path: Path, overwrite: bool) -> None:
    """Raise `InputError` where a folder cannot be written as `path`."""
    if path.exists() and not path.is_dir():
        raise InputError(f"{path}: is a file; name a folder to write")
    if path.is_dir() and any(path.iterdir()) and not overwrite:
        raise InputError(f"{path}: exists and is not empty; choose another name or pass --overwrite")


@contextmanager
def shared_folder(path: Path) -> Iterator[Path]:
    """Give a folder to fill that appears as `path` when the block ends without an error, for content that `path` names.

    Whoever asks for the same path fills it with the same content: where another process was first, its folder stays.
    """
    with partial_folder(path) as partial:
        yield partial
        try:
            os.replace(partial, path)
        except OSError:
            if not path.is_dir():
                raise


def link_or_copy(source: Path, target: Path) -> None:
    """Make `target` the same file as `source`, or a copy of it where the file system cannot (another disk)."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def read_lines(path: str | Path) -> Iterator[tuple[int, str]]:
    """Yield (line number from 1, line without its end) of a UTF-8 text file, plain or `.gz`.

    Raises `InputError` naming the file, and the line where there is one: missing file, directory, truncated or
    corrupt gzip, bytes that are not UTF-8.
    """
    number = 0
    try:
        with open_bytes(path) as lines:
            for number, line in enumerate(lines, start=1):
                yield number, decode_line(path, number, line)
    except DAMAGED as error:
        raise InputError(
            f"{path}:{number + 1}: the gzip file is damaged or cut short ({error}); fetch it again"
        ) from None


def open_bytes(path: str | Path) -> IO[bytes]:
    """Open a file, plain or `.gz`, for reading its bytes; raises `InputError` where there is none."""
    path = Path(path)
    check_readable(path)
    return gzip.open(path, "rb") if path.suffix == ".gz" else open(path, "rb")  # type: ignore[return-value]


def decode_line(path: str | Path, number: int, line: bytes) -> str:
    """Return a line without its end; raises `InputError` with `file:line` where it is not UTF-8."""
    try:
        return line.decode("utf-8").rstrip("\r\n")
    except UnicodeDecodeError as error:
        raise InputError(
            f"{path}:{number}: not UTF-8 text ({error.reason} at byte {error.start} of the line)"
        ) from None


def check_readable(path: Path) -> None:
    """Raise `InputError` where `path` is not a file one can read."""
    if path.is_dir():
        raise InputError(f"{path}: is a directory, not a file")
    if not path.exists():
        raise InputError(f"{path}: no such file")


def sha256(path: str | Path) -> str:
    """Return the SHA-256 of a file's bytes, in hexadecimal."""
    check_readable(Path(path))
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
