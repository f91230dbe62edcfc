"""The lists a teacher orders: a run cut at its depth, joined with texts, with a count of everything left out."""

from collections import Counter
from dataclasses import dataclass, field

from setenc_hf.collection import Collection
from setenc_hf.errors import InputError
from setenc_hf.trec import Qrel, read_lists

MIN_RELEVANCE = 1


@dataclass
class ListsToRank:
    """`lists`: query id -> document ids, first stage's order; `texts` and `queries` hold every text of them."""

    lists: dict[str, list[str]]
    queries: dict[str, str]
    texts: dict[str, str]
    left_out: Counter[str] = field(default_factory=Counter)
    added: int = 0

    def report(self) -> list[str]:
        """Return one line for what was read and one for each reason something was left out."""
        passages = sum(map(len, self.lists.values()))
        added = f", {self.added:,} of them added as relevant" if self.added else ""
        lines = [f"read {len(self.lists):,} queries with {passages:,} passages{added}"]
        return lines + [f"left out {count:,} {what}" for what, count in self.left_out.items()]


def read_lists_to_rank(run: str, collection: Collection, depth: int, relevant: list[Qrel] | None = None) -> ListsToRank:
    """Read the top `depth` passages of every query of `run` with their texts.

    With `relevant`, passages judged `MIN_RELEVANCE` or higher that a list lacks are appended to it, the highest grade
    first: at the bottom, where the windows begin, so that the list grows and the first stage loses nothing.
    Queries the collection does not know and passages without text are left out and counted; raises `InputError` where
    nothing is left.
    """
    known = collection.queries()
    lists: dict[str, list[str]] = {}
    left_out: Counter[str] = Counter()
    for query_id, lines in read_lists(run, depth):
        if known.get(query_id, "").strip():
            lists[query_id] = [line.doc_id for line in lines]
        else:
            left_out["queries: the collection has no text for them"] += 1
    before = sum(map(len, lists.values()))
    for qrel in sorted(relevant or [], key=lambda qrel: -qrel.relevance):
        listed = lists.get(qrel.query_id)
        if listed is not None and qrel.relevance >= MIN_RELEVANCE and qrel.doc_id not in listed:
            listed.append(qrel.doc_id)
    added = sum(map(len, lists.values())) - before

    texts = {
        doc_id: text
        for doc_id, text in collection.texts({doc_id for listed in lists.values() for doc_id in listed}).items()
        if text.strip()
    }
    for query_id, listed in list(lists.items()):
        lists[query_id] = [doc_id for doc_id in listed if doc_id in texts]
        if missing := len(listed) - len(lists[query_id]):
            left_out["passages: the collection has no text for them"] += missing
        if not lists[query_id]:
            del lists[query_id]
            left_out["queries: none of their passages has a text"] += 1
    if not lists:
        what = "; ".join(f"{count} {reason}" for reason, count in left_out.items())
        raise InputError(f"{run}: no list to rank is left with the collection {collection.name} ({what})")
    return ListsToRank(lists, {query_id: known[query_id] for query_id in lists}, texts, left_out, added)
