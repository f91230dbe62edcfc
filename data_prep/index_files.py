"""What every index on disk shares: `index.json` with format, version and settings, texts in Arrow, workers."""

import fcntl
import json
import os
import sys
import threading
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context, parent_process
from pathlib import Path
from typing import IO, Any

import numpy as np
import pyarrow as pa

from setenc_hf.collection import Collection, LocalCollection
from setenc_hf.errors import InputError
from setenc_hf.files import atomic_file

INDEX_FILE = "index.json"


def write_json(path: Path, values: dict[str, Any]) -> None:
    """Write a json file, whole or not at all."""
    with atomic_file(path) as file:
        json.dump(values, file, indent=1, ensure_ascii=False)
        file.write("\n")


def read_json(path: Path) -> dict[str, Any]:
    """Read a json object; raises `InputError` naming the file where it holds anything else."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise InputError(f"{path}: not json ({error}); remove the index and build it again") from None
    if not isinstance(values, dict):
        raise InputError(f"{path}: not a json object; remove the index and build it again")
    return values


def check_settings(path: Path, wanted: dict[str, Any]) -> dict[str, Any] | None:
    """Return what the json file `path` holds, or None where there is none; it must agree with `wanted`.

    Raises `InputError` naming the first setting that differs: an index of other settings is never searched silently.
    """
    if not path.exists():
        return None
    found = read_json(path)
    for name, value in wanted.items():
        if found.get(name) != value:
            raise InputError(
                f"{path}: made with {name} {found.get(name)!r}, this command has {value!r}; "
                "name another --index-dir, or remove this one to build it anew"
            )
    return found


def process_rank() -> tuple[int, int]:
    """Return this process's number and the number of processes, as `accelerate launch` sets them."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


@contextmanager
def one_builder(folder: Path) -> Iterator[None]:
    """Let one process build the index in `folder`; another waits, and finds it built.

    The lock is the kernel's (`flock`), so that a killed process leaves none behind; a file system that knows no locks
    is told of.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / ".lock"
    try:
        opened: IO[bytes] = open(path, "ab")  # noqa: SIM115, closed below
    except PermissionError:  # another user's, which can be locked all the same
        opened = open(path, "rb")  # noqa: SIM115
    with opened as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"{folder}: another process is building this index; waiting for it", file=sys.stderr)
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError as error:
            print(f"{folder}: cannot be locked ({error}); build it with one command at a time", file=sys.stderr)
        yield


def corpus_source(collection: Collection) -> dict[str, str]:
    """Return what identifies a collection's passages alone, so that one index serves every set of queries over them."""
    if isinstance(collection, LocalCollection):
        return collection.corpus_sources()
    import ir_datasets

    return {"ir_datasets": ir_datasets.docs_parent_id(collection.name)}


def write_texts(path: Path, texts: Iterable[str]) -> None:
    """Write texts as one Arrow column that `read_texts` maps into memory."""
    column = texts if isinstance(texts, pa.Array) else pa.array(texts, pa.large_string())
    table = pa.table({"text": column})
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, table.schema) as writer:
        writer.write_table(table)


def read_texts(path: Path) -> pa.LargeStringArray:
    """Map the texts of `write_texts` into memory; nothing is read before it is asked for."""
    column = pa.ipc.open_file(pa.memory_map(str(path))).read_all()["text"]
    return column.chunk(0) if column.num_chunks == 1 else pa.array([], pa.large_string())


def check_unique(doc_ids: pa.LargeStringArray) -> None:
    """Raise `InputError` naming an id that stands twice, and where."""
    import pyarrow.compute as pc

    counts = doc_ids.value_counts()
    double = pc.filter(counts.field("values"), pc.greater(counts.field("counts"), 1))
    if len(double):
        doc_id = double[0].as_py()
        rows = pc.indices_nonzero(pc.equal(doc_ids, doc_id)).to_pylist()
        raise InputError(
            f"document {doc_id!r} stands {len(rows)} times in the collection (passages {rows[0] + 1} and "
            f"{rows[1] + 1}); an id names one passage"
        )


def map_array(path: Path) -> np.ndarray:
    """Map an array of `np.save` into memory, read-only."""
    try:
        return np.load(path, mmap_mode="r", allow_pickle=False)
    except ValueError:  # an array without elements cannot be mapped
        return np.load(path, allow_pickle=False)


def worker_pool(num_proc: int, initializer: Any = None, initargs: tuple = ()) -> ProcessPoolExecutor:
    """Return a pool of fresh processes (never forked: readers and thread pools do not survive a fork)."""
    return ProcessPoolExecutor(num_proc, get_context("spawn"), _start_worker, (initializer, initargs))


def _start_worker(initializer: Any, initargs: tuple) -> None:
    def end_with_parent() -> None:  # a killed command must not leave workers that wait for ever
        parent = parent_process()
        if parent is not None:
            parent.join()
            os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()
    if initializer is not None:
        initializer(*initargs)
