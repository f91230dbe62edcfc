"""Samples with their texts inside, for `datasets` alone: `python -m data_prep.export_samples DIR --output EXPORT`.

One row a list (`query_id`, `query`, `doc_ids`, `passages`, `labels`, `ranks`, `scores`) in Parquet files, the
judgements where there are some, and a dataset card; `--push-to-hub USER/NAME` uploads it, with the token of
`hf auth login`.
"""

import argparse
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from tqdm import tqdm

from setenc_hf.command import run_command
from setenc_hf.errors import InputError
from setenc_hf.files import atomic_folder
from setenc_hf.samples import ListwiseSamples, source_lines

LISTS_PER_BATCH = 256
BYTES_PER_FILE = 500_000_000  # of text, before compression
UPLOADED = ["data/train-[0-9][0-9][0-9][0-9][0-9].parquet", "qrels.txt"]
SCHEMA = pa.schema(
    [
        ("query_id", pa.string()),
        ("query", pa.string()),
        ("doc_ids", pa.list_(pa.string())),
        ("passages", pa.list_(pa.string())),
        ("labels", pa.list_(pa.float32())),
        ("ranks", pa.list_(pa.int32())),
        ("scores", pa.list_(pa.float32())),
    ]
)
CARD = """---
task_categories:
- text-ranking
tags:
- listwise
- re-ranking
configs:
- config_name: default
  data_files: data/*.parquet
---

# Listwise samples

{lists:,} lists of {passages:,} passages with labels of kind `{labels}`, at most {depth} passages of each run's list,
made by {made_by}.

```python
from datasets import load_dataset

lists = load_dataset("{name}", split="train")
```

| column | holds |
| --- | --- |
| `query_id`, `query` | the query |
| `doc_ids`, `passages` | the passages' ids and texts |
| `labels` | higher is better |
| `ranks` | in the first stage's or teacher's run, from 1; 0: not retrieved, added from the judgements |
| `scores` | in that run; null where the rank is 0 |

## Sources

{sources}

## Counts

| | |
| --- | --- |
{counts}
"""


class Rows:
    """Rows of a memory-mapped table by number.

    `pyarrow.Table.take` copies all chunks of a text column into one first: the whole corpus for every batch, and an
    error beyond 2 GiB of it.
    """

    def __init__(self, table: pa.Table) -> None:
        self.chunks = table.to_batches()
        self.starts = np.cumsum([0, *map(len, self.chunks)])[:-1]

    def take(self, rows: np.ndarray) -> pa.Table:
        """Return the rows of these numbers, in this order; one may come several times."""
        wanted, places = np.unique(rows, return_inverse=True)
        of_chunk = np.searchsorted(self.starts, wanted, side="right") - 1
        taken = [
            self.chunks[number].take(pa.array(wanted[of_chunk == number] - self.starts[number]))
            for number in np.unique(of_chunk)
        ]
        return pa.Table.from_batches(taken).combine_chunks().take(pa.array(places))


def export_batches(samples: ListwiseSamples) -> Iterator[pa.RecordBatch]:
    """Yield the lists with their passages' ids and texts in place of row numbers."""
    corpus = Rows(samples.corpus.data.table)
    for part in samples.samples.data.table.to_batches(max_chunksize=LISTS_PER_BATCH):
        if not part.num_rows:  # lists that were all left out make an empty batch
            continue
        rows = part.column("passages")
        offsets = pa.array(np.asarray(rows.offsets) - rows.offsets[0].as_py(), pa.int32())
        texts = corpus.take(rows.flatten().to_numpy())
        columns = {name: part.column(name) for name in ("query_id", "query", "labels", "ranks", "scores")}
        for name, source in (("doc_ids", "doc_id"), ("passages", "text")):
            columns[name] = pa.ListArray.from_arrays(offsets, texts.column(source).combine_chunks())
        yield pa.record_batch([columns[field.name].cast(field.type) for field in SCHEMA], schema=SCHEMA)


def export(samples: ListwiseSamples, folder: Path, name: str) -> int:
    """Fill a folder with Parquet files, judgements and a card; return the number of lists.

    `name` is what the card tells readers to load.
    """
    (folder / "data").mkdir()
    writer, written, number, lists = None, 0, 0, 0
    with tqdm(total=len(samples), desc="export", unit=" lists", disable=None) as progress:
        for batch in export_batches(samples):
            if writer is None:
                writer = pq.ParquetWriter(folder / "data" / f"train-{number:05d}.parquet", SCHEMA, compression="zstd")
                number, written = number + 1, 0
            writer.write_batch(batch)
            written += batch.nbytes
            lists += batch.num_rows
            progress.update(batch.num_rows)
            if written > BYTES_PER_FILE:
                writer.close()
                writer = None
    if writer is not None:
        writer.close()
    if (samples.folder / "qrels.txt").exists():
        shutil.copyfile(samples.folder / "qrels.txt", folder / "qrels.txt")
    (folder / "README.md").write_text(card(samples, name), "utf-8")
    return lists


def card(samples: ListwiseSamples, name: str) -> str:
    """Return the dataset card; of local files it tells names and hashes, not where they lay."""
    meta = samples.meta
    counts = [f"| {reason} | {count:,} |" for reason, count in meta["counts"].items()]
    passages = meta["counts"]["passages"]
    return CARD.format(
        lists=len(samples), passages=passages, labels=meta["labels"], depth=meta["depth"], made_by=meta["made_by"],
        name=name, sources="\n".join(source_lines(meta["sources"])), counts="\n".join(counts),
    )  # fmt: skip


def push(folder: Path, repo_id: str, private: bool) -> str:
    """Upload an export to a dataset repository on the hub, made if need be; return its address."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError

    api = HfApi()
    try:
        address = api.create_repo(repo_id, repo_type="dataset", private=private, exist_ok=True)
        api.upload_folder(
            repo_id=repo_id,
            folder_path=str(folder),
            repo_type="dataset",
            commit_message="Upload listwise samples",
            delete_patterns=UPLOADED,  # of an earlier upload, which readers would get beside it
        )
    except (HfHubHTTPError, HFValidationError, LocalTokenNotFoundError, OSError) as error:
        reason = " ".join(str(error).split())[:300]
        raise InputError(f"--push-to-hub {repo_id}: the hub did not take it ({reason})") from None
    return str(address)


def publish(folder: Path, output: Path, repo_id: str | None, private: bool, overwrite: bool) -> None:
    """Export samples to `output`, upload them where a repository is named, and say so."""
    samples = ListwiseSamples.open(folder)
    with atomic_folder(output, overwrite=overwrite) as partial:
        lists = export(samples, partial, repo_id or output.name)
    print(f"Exported {lists:,} lists with their texts to {output}")
    if repo_id is not None:
        print(f"Uploaded them to {push(output, repo_id, private)}")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what exporting and uploading take."""
    parser.add_argument(
        "--push-to-hub", "--push_to_hub", metavar="USER/NAME", help="dataset repository to upload the export to"
    )
    parser.add_argument("--private", action="store_true", help="make a new repository private")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m data_prep.export_samples", description=__doc__.split("\n\n")[0])
    parser.add_argument("samples", type=Path, help="folder that data_prep.build_samples made")
    parser.add_argument("--output", type=Path, required=True, help="folder to write")
    parser.add_argument("--overwrite", action="store_true", help="replace the folder if it is there")
    add_arguments(parser)
    args = parser.parse_args(argv)
    publish(args.samples, args.output, args.push_to_hub, args.private, args.overwrite)


if __name__ == "__main__":
    run_command(main)
