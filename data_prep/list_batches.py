"""From lines of runs to samples, some thousand lists at a time: cut, merged, judged, labelled, counted."""

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa

from setenc_hf.errors import InputError
from setenc_hf.samples import IGNORE_LABEL
from setenc_hf.trec import Qrel

from .run_spill import Numbers, RunSpill

NOT_RETRIEVED = 0  # the rank of a passage that was added from the judgements
RANKED = np.dtype([("list", "<i4"), ("doc", "<i4"), ("rank", "<i4"), ("score", "<f4")])


class Judgements:
    """The judgements of the lists' queries, by number of list and document.

    Args:
        qrels: of a document judged more than once (for several subtopics), the highest relevance counts.
        query_ids: of the lists, each once.
        docs: numbers of documents; a relevant document that no run holds gets one where `add_relevant` is set.
    """

    def __init__(self, qrels: Iterable[Qrel], query_ids: Sequence[str], docs: Numbers, add_relevant: bool) -> None:
        lists = {query_id: number for number, query_id in enumerate(query_ids)}
        self.judged = np.zeros(len(query_ids), bool)  # [lists]
        grades: dict[int, int] = {}
        for qrel in qrels:
            number = lists.get(qrel.query_id)
            if number is None:
                continue
            self.judged[number] = True
            if add_relevant and qrel.relevance > 0:
                doc = docs.setdefault(qrel.doc_id, len(docs))
            else:
                doc = docs.get(qrel.doc_id, -1)
            if doc >= 0:
                pair = number << 32 | doc
                grades[pair] = max(qrel.relevance, grades.get(pair, qrel.relevance))
        pairs = np.fromiter(grades, np.int64, len(grades))
        values = np.fromiter(grades.values(), np.int64, len(grades))
        order = np.argsort(pairs, kind="stable")
        self.pairs, self.relevances = pairs[order], values[order]  # [judgements], for look-ups
        relevant = np.flatnonzero(values > 0)
        relevant = relevant[np.argsort(pairs[relevant] >> 32, kind="stable")]
        self.relevant = pairs[relevant]  # by list, then in the order of the judgements
        self.add_relevant = add_relevant

    def look_up(self, pairs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return each pair's relevance, 0 where unjudged, and whether it is judged, both [pairs]."""
        if not len(self.pairs):
            return np.zeros(len(pairs), np.int64), np.zeros(len(pairs), bool)
        places = np.minimum(np.searchsorted(self.pairs, pairs), len(self.pairs) - 1)
        found = self.pairs[places] == pairs
        return np.where(found, self.relevances[places], 0), found

    def missing(self, ranked: np.ndarray) -> np.ndarray:
        """Return the relevant pairs that are not among those of some whole lists."""
        start, end = np.searchsorted(self.relevant >> 32, [ranked["list"][0], ranked["list"][-1] + 1])
        relevant = self.relevant[start:end]
        pairs = np.sort(_pairs(ranked))
        places = np.minimum(np.searchsorted(pairs, relevant), len(pairs) - 1)
        return relevant[pairs[places] != relevant]


def cut_and_merge(lines: np.ndarray, depth: int, counts: Counter) -> np.ndarray:
    """Keep the top `depth` of each run's list, then each document of a list once, at its best rank; return `RANKED`.

    A document has the score of the run where it ranks best, ties going to the earlier run, whose lines come first.
    """
    ranks = _places(_starts(lines["list"], lines["run"]), len(lines)) + 1
    kept = ranks <= depth
    counts["run lines read"] += len(lines)
    counts["run lines below depth"] += len(lines) - int(kept.sum())
    lines = lines[kept]
    ranked = _ranked(lines["list"], lines["doc"], ranks[kept], lines["score"])
    if (lines["run"] == lines["run"][0]).all():
        return ranked
    ranked = ranked[np.lexsort((ranked["rank"], ranked["list"]))]  # stable: after the rank, the order of the runs
    _, first = np.unique(_pairs(ranked), return_index=True)
    counts["run lines merged (same passage in several runs)"] += len(ranked) - len(first)
    return ranked[np.sort(first)]


def add_relevant(ranked: np.ndarray, judgements: Judgements, counts: Counter) -> np.ndarray:
    """Add relevant passages that no run retrieved behind the lists they belong to, with rank 0."""
    added = judgements.missing(ranked)
    counts["relevant passages added (not retrieved)"] += len(added)
    joined = np.concatenate([ranked, _ranked(added >> 32, added & 0xFFFFFFFF, NOT_RETRIEVED, 0.0)])
    return joined[np.argsort(joined["list"], kind="stable")]


def _ranked(lists: np.ndarray, docs: np.ndarray, ranks: np.ndarray | int, scores: np.ndarray | float) -> np.ndarray:
    ranked = np.empty(len(lists), RANKED)
    ranked["list"], ranked["doc"], ranked["rank"], ranked["score"] = lists, docs, ranks, scores
    return ranked


def _pairs(ranked: np.ndarray) -> np.ndarray:
    """Return one number for each list and document, int64."""
    return ranked["list"].astype(np.int64) << 32 | ranked["doc"]


class RankedLists:
    """Lists as samples will hold them, in a file, with the documents that they need.

    Args:
        spill: runs that were read; consumed.
        path: the file to write.
        depth: passages kept of each run's list.
        judgements: adds relevant passages that no run retrieved, where it says so.
    """

    def __init__(self, spill: RunSpill, path: Path, depth: int, judgements: Judgements | None, counts: Counter) -> None:
        self.path = path
        self.is_needed = np.zeros(len(spill.docs), bool)  # by number of the document
        self.sizes = []
        with open(path, "wb") as file:
            for lines in spill.buckets():
                ranked = cut_and_merge(lines, depth, counts)
                if judgements is not None and judgements.add_relevant:
                    ranked = add_relevant(ranked, judgements, counts)
                self.is_needed[ranked["doc"]] = True
                self.sizes.append(len(ranked))
                file.write(ranked.data)

    def __iter__(self) -> Iterator[np.ndarray]:
        """Yield the lists, some thousand at a time, as `RANKED` [passages]."""
        with open(self.path, "rb") as file:
            for size in self.sizes:
                yield np.fromfile(file, RANKED, size)


class SampleMaker:
    """Makes samples of ranked passages; what is left out and why is added to `counts`.

    Args:
        query_ids: by number of list.
        queries: texts by query id.
        rows: each document's row in the corpus by its number, -1 where it has no text.
        judgements: for labels of relevance, else None.
        labels: one of `LABEL_KINDS`.
        schema: of the samples.
    """

    def __init__(
        self,
        query_ids: Sequence[str],
        queries: dict[str, str],
        rows: np.ndarray,
        judgements: Judgements | None,
        labels: str,
        schema: pa.Schema,
        counts: Counter,
    ) -> None:
        self.query_ids, self.queries, self.rows = query_ids, queries, rows
        self.judgements, self.labels, self.schema, self.counts = judgements, labels, schema, counts

    def batch(self, ranked: np.ndarray) -> pa.RecordBatch:
        """Return the samples of some whole lists in a row; those that cannot be used are missing."""
        counts, first = self.counts, int(ranked["list"][0])
        ids = self.query_ids[first : int(ranked["list"][-1]) + 1]
        usable = np.array([query_id in self.queries for query_id in ids])
        counts["lists left out: query unknown to the collection"] += int((~usable).sum())
        if self.judgements is not None:
            judged = self.judgements.judged[first : first + len(ids)]
            counts["lists left out: query without judgements"] += int((usable & ~judged).sum())
            usable = usable & judged
        ranked = ranked[usable[ranked["list"] - first]]
        with_text = self.rows[ranked["doc"]] >= 0
        counts["passages left out: no text in the collection"] += int((~with_text).sum())
        ranked = ranked[with_text]
        starts = _starts(ranked["list"])
        counts["lists left out: no passage has a text"] += int(usable.sum()) - len(starts)
        lengths = np.diff(starts, append=len(ranked))
        counts["lists of a single passage (kept)"] += int((lengths == 1).sum())
        counts["passages"] += len(ranked)
        query_ids = [self.query_ids[number] for number in ranked["list"][starts]]
        values = {
            "passages": pa.array(self.rows[ranked["doc"]]),
            "labels": pa.array(self._labels(ranked, starts, lengths)),
            "ranks": pa.array(ranked["rank"]),
            "scores": pa.array(ranked["score"], mask=ranked["rank"] == NOT_RETRIEVED),
        }
        offsets = pa.array(np.append(starts, len(ranked)), pa.int32())
        columns: dict[str, pa.Array] = {
            "query_id": pa.array(query_ids, pa.string()),
            "query": pa.array([self.queries[query_id] for query_id in query_ids], pa.string()),
            **{name: pa.ListArray.from_arrays(offsets, array) for name, array in values.items()},
        }
        return pa.record_batch([columns[field.name].cast(field.type) for field in self.schema], self.schema)

    def _labels(self, ranked: np.ndarray, starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        """Return the labels, float32 [passages]."""
        if self.judgements is not None:
            relevances, judged = self.judgements.look_up(_pairs(ranked))
            values = relevances.astype(np.float32)
            self.counts["passages taken as not relevant: unjudged"] += int((~judged).sum())
            if len(starts):
                without = np.maximum.reduceat(values, starts) <= 0
                self.counts["lists without a relevant passage (kept)"] += int(without.sum())
        elif self.labels == "rank":
            values = (np.repeat(lengths, lengths) - _places(starts, len(ranked))).astype(np.float32)
        else:
            values = ranked["score"]
        padding = np.flatnonzero(values == IGNORE_LABEL)
        if len(padding):
            query_id = self.query_ids[ranked["list"][padding[0]]]
            raise InputError(f"query {query_id!r}: the label {IGNORE_LABEL} marks padding; shift the scores")
        return values


def _starts(*groups: np.ndarray) -> np.ndarray:
    """Return where each run of equal values begins, in arrays that align."""
    changes = np.zeros(len(groups[0]), bool)
    changes[:1] = True
    for group in groups:
        changes[1:] |= group[1:] != group[:-1]
    return np.flatnonzero(changes)


def _places(starts: np.ndarray, total: int) -> np.ndarray:
    """Return each row's place within its group, from 0 [total]."""
    return np.arange(total) - np.repeat(starts, np.diff(starts, append=total))
