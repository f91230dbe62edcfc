"""A collection by one string: an `ir_datasets` id, or a local folder in our own layout or BEIR's.

A local folder holds
`corpus.jsonl[.gz]` (`doc_id` or `_id`, `text`, optional `title`) or `corpus.tsv[.gz]` (`doc_id<TAB>text`);
`queries.tsv|jsonl[.gz]` or one file a split, `queries.dev.tsv`; `qrels.txt`, `qrels.dev.txt` or `qrels/dev.tsv`.
"""

import json
from collections.abc import Collection as Ids
from collections.abc import Iterator, Set
from pathlib import Path
from typing import NamedTuple

from .errors import InputError
from .files import read_lines, sha256
from .trec import Qrel, read_qrels

DOCS_PER_LOOKUP = 10_000
TEXT_ENDINGS = ("jsonl", "jsonl.gz", "tsv", "tsv.gz")


class Doc(NamedTuple):
    """A passage with its text as the model reads it: title and text joined by a blank where there is a title."""

    doc_id: str
    text: str


def query_key(text: str) -> str:
    """Return what two queries have in common that ask the same in the same words."""
    return text.strip().lower()


class Collection:
    """What every source of passages, queries and judgements offers; `open_collection` makes one from its name."""

    name: str

    def count(self) -> int | None:
        """Return how many passages there are, without parsing them; None where only reading them would tell."""
        raise NotImplementedError

    def docs(self) -> Iterator[Doc]:
        """Yield every passage, in the collection's order."""
        raise NotImplementedError

    def pick(self, doc_ids: Ids[str]) -> Iterator[Doc]:
        """Yield those of `doc_ids` that the collection holds, each once, in an order that never changes."""
        raise NotImplementedError

    def texts(self, doc_ids: Ids[str]) -> dict[str, str]:
        """Return the text of each of `doc_ids` that the collection holds; what it lacks is absent."""
        return {doc.doc_id: doc.text for doc in self.pick(doc_ids)}

    def queries(self) -> dict[str, str]:
        """Return every query's text by its id."""
        raise NotImplementedError

    def check_queries(self) -> None:
        """Raise `InputError` where there are none."""
        raise NotImplementedError

    def qrels(self) -> list[Qrel]:
        """Return the judgements; raises `InputError` where there are none, or several sets to choose from."""
        raise NotImplementedError

    def sources(self) -> dict[str, str]:
        """Return what identifies the data: each file with its SHA-256, or the `ir_datasets` id and its version."""
        raise NotImplementedError

    def corpus_sources(self) -> dict[str, str]:
        """Return what identifies the passages alone: equal for collections that share them."""
        raise NotImplementedError


def open_collection(name: str) -> Collection:
    """Return the collection of this name: a folder where there is one, else an `ir_datasets` id."""
    if Path(name).is_dir():
        return LocalCollection(name)
    if name.startswith((".", "/", "~")) or Path(name).exists():
        raise InputError(f"{name}: no such folder; a collection is a folder with corpus.jsonl or an ir_datasets id")
    return IrDatasetsCollection(name)


class LocalCollection(Collection):
    """A folder of `corpus`, `queries` and `qrels` files; see the module's text for their names."""

    def __init__(self, folder: str | Path) -> None:
        self.name = str(folder)
        self.folder = Path(folder)
        found = [
            path
            for ending in ("jsonl", "jsonl.gz", "tsv", "tsv.gz")
            if (path := self.folder / f"corpus.{ending}").exists()
        ]
        if len(found) != 1:
            what = f"holds {' and '.join(path.name for path in found)}" if found else "holds no corpus"
            raise InputError(f"{folder}: {what}; a collection has exactly one of corpus.jsonl[.gz] and corpus.tsv[.gz]")
        self.corpus_path = found[0]
        self._corpus_hash: str | None = None

    def count(self) -> int | None:
        return sum(1 for _, line in read_lines(self.corpus_path) if line.strip())

    def docs(self) -> Iterator[Doc]:
        return (doc for _, doc in self._numbered_docs())

    def _numbered_docs(self) -> Iterator[tuple[int, Doc]]:
        empty = True
        read = self._read_jsonl if ".jsonl" in self.corpus_path.name else self._read_tsv
        for number, doc_id, title, text in read(self.corpus_path, ("doc_id", "_id")):
            empty = False
            yield number, Doc(doc_id, f"{title} {text}" if title else text)
        if empty:
            raise InputError(f"{self.corpus_path}: holds no passage")

    def pick(self, doc_ids: Ids[str]) -> Iterator[Doc]:
        wanted = doc_ids if isinstance(doc_ids, Set) else set(doc_ids)
        seen = set[str]()
        for number, doc in self._numbered_docs():
            if doc.doc_id not in wanted:
                continue
            if doc.doc_id in seen:
                raise InputError(
                    f"{self.corpus_path}:{number}: document {doc.doc_id!r} stands twice; ids must be unique"
                )
            seen.add(doc.doc_id)
            yield doc

    def queries(self) -> dict[str, str]:
        self.check_queries()
        queries: dict[str, str] = {}
        for path in self._files("queries", TEXT_ENDINGS):
            read = self._read_jsonl if ".jsonl" in path.name else self._read_tsv
            for number, query_id, _, text in read(path, ("query_id", "_id")):
                if queries.setdefault(query_id, text) != text:
                    raise InputError(f"{path}:{number}: query {query_id!r} stands twice, with different texts")
        return queries

    def check_queries(self) -> None:
        if not self._files("queries", TEXT_ENDINGS):
            raise InputError(f"{self.folder}: holds no queries.tsv or queries.jsonl")

    def qrels(self) -> list[Qrel]:
        paths = self._qrels_files()
        if not paths:
            raise InputError(f"{self.folder}: holds no qrels.txt and no qrels/*.tsv; name the judgements with --qrels")
        main = self.folder / "qrels.txt"  # the plain name wins over qrels.novelty.txt and the like
        if len(paths) > 1 and main not in paths:
            names = ", ".join(str(path.relative_to(self.folder)) for path in paths)
            raise InputError(f"{self.folder}: holds several sets of judgements ({names}); name one with --qrels")
        return list(read_qrels(main if main in paths else paths[0]))

    def sources(self) -> dict[str, str]:
        paths = [*self._files("queries", TEXT_ENDINGS), *self._qrels_files()]
        return self.corpus_sources() | {str(path.relative_to(self.folder)): sha256(path) for path in paths}

    def corpus_sources(self) -> dict[str, str]:
        if self._corpus_hash is None:
            self._corpus_hash = sha256(self.corpus_path)
        return {self.corpus_path.name: self._corpus_hash}

    def _qrels_files(self) -> list[Path]:
        return self._files("qrels", ("txt", "tsv")) + sorted((self.folder / "qrels").glob("*.tsv"))

    def _files(self, stem: str, endings: tuple[str, ...]) -> list[Path]:
        """Return `stem.ending` and `stem.*.ending`, in order of name."""
        patterns = [pattern for ending in endings for pattern in (f"{stem}.{ending}", f"{stem}.*.{ending}")]
        return sorted({path for pattern in patterns for path in self.folder.glob(pattern)})

    @staticmethod
    def _read_jsonl(path: Path, id_keys: tuple[str, str]) -> Iterator[tuple[int, str, str, str]]:
        """Yield (line number, id, title, text)."""
        for number, line in read_lines(path):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:  # also a number of thousands of digits, or too deep a nest
                reason = getattr(error, "msg", error)
                raise InputError(f"{path}:{number}: not JSON ({reason}): {line[:100]!r}") from None
            if not isinstance(row, dict):
                raise InputError(f"{path}:{number}: not a JSON object: {line[:100]!r}")
            row_id = next((row[key] for key in id_keys if key in row), None)
            if isinstance(row_id, int) and not isinstance(row_id, bool):
                row_id = str(row_id)
            if not isinstance(row_id, str) or len(row_id.split()) != 1:
                raise InputError(f"{path}:{number}: `{id_keys[0]}` must be text without blanks, got {row_id!r}")
            title, text = row.get("title") or "", row.get("text")
            if not isinstance(text, str) or not isinstance(title, str):
                raise InputError(f"{path}:{number}: `text` (and `title`, where given) must be text, got {text!r:.80}")
            try:
                f"{row_id}{title}{text}".encode()
            except UnicodeEncodeError:
                raise InputError(f"{path}:{number}: not text: half of a surrogate pair in {line[:100]!r}") from None
            yield number, row_id, title, text

    @staticmethod
    def _read_tsv(path: Path, _id_keys: tuple[str, str]) -> Iterator[tuple[int, str, str, str]]:
        for number, line in read_lines(path):
            if not line.strip():
                continue
            columns = line.split("\t")
            if len(columns) != 2 or len(columns[0].split()) != 1:
                raise InputError(f"{path}:{number}: a line is an id, one tab and a text, got {line[:100]!r}")
            yield number, columns[0].strip(), "", columns[1]


class IrDatasetsCollection(Collection):
    """A collection of the `ir_datasets` catalogue, such as `msmarco-passage/train/judged`."""

    def __init__(self, name: str) -> None:
        import ir_datasets

        self.name = name
        try:
            self.dataset = ir_datasets.load(name)
        except KeyError:
            raise InputError(f"{name}: neither a folder nor an ir_datasets id; see https://ir-datasets.com") from None

    def count(self) -> int | None:
        return self.dataset.docs_count()

    def docs(self) -> Iterator[Doc]:
        self._require("docs")
        for doc in self.dataset.docs_iter():
            yield Doc(doc.doc_id, doc.default_text())

    def pick(self, doc_ids: Ids[str]) -> Iterator[Doc]:
        self._require("docs")
        store = self.dataset.docs_store()
        ordered = sorted(set(doc_ids))
        for start in range(0, len(ordered), DOCS_PER_LOOKUP):
            wanted = ordered[start : start + DOCS_PER_LOOKUP]
            found = store.get_many(wanted)  # in no order, and without what it lacks
            for doc_id in wanted:
                if doc_id in found:
                    yield Doc(doc_id, found[doc_id].default_text())

    def check_queries(self) -> None:
        self._require("queries")

    def queries(self) -> dict[str, str]:
        self.check_queries()
        return {query.query_id: query.default_text() for query in self.dataset.queries_iter()}

    def qrels(self) -> list[Qrel]:
        self._require("qrels")
        return [
            Qrel(q.query_id, q.doc_id, q.relevance, getattr(q, "iteration", "0")) for q in self.dataset.qrels_iter()
        ]

    def sources(self) -> dict[str, str]:
        from importlib.metadata import version

        return {self.name: f"ir_datasets {version('ir_datasets')}"}

    def corpus_sources(self) -> dict[str, str]:
        import ir_datasets

        (made_by,) = self.sources().values()
        return {ir_datasets.docs_parent_id(self.name) or self.name: made_by}

    def _require(self, what: str) -> None:
        if not getattr(self.dataset, f"has_{what}")():
            raise InputError(f"{self.name}: this ir_datasets collection has no {what}; name another subset of it")
