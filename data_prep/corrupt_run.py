"""Re-order a run, to see whether a re-ranker minds: `python -m data_prep.corrupt_run --run R --order O --output R2`.

`ideal` puts the lists by judged relevance, best first, `inverse-ideal` worst first, `random` in an order drawn from the
seed and the query; passages stay the same. Unjudged passages count as not relevant. Within one grade, the run's own
order stays. A Set-Encoder gives all of them the same scores (Schlatt et al., ECIR 2025, on robustness to order).
"""

import argparse
import random
from collections import Counter
from collections.abc import Sequence

from setenc_hf.collection import open_collection
from setenc_hf.command import run_command
from setenc_hf.errors import InputError
from setenc_hf.trec import read_lists, read_qrels, write_run

ORDERS = ("ideal", "inverse-ideal", "random")


def reorder(doc_ids: Sequence[str], order: str, grades: dict[str, int], seed: str) -> list[str]:
    """Return the documents of a list in another order; `random` depends on `seed` and the set of documents alone."""
    if order == "random":
        shuffled = sorted(doc_ids)
        random.Random(seed).shuffle(shuffled)
        return shuffled
    sign = -1 if order == "ideal" else 1
    return sorted(doc_ids, key=lambda doc_id: sign * grades.get(doc_id, 0))


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m data_prep.corrupt_run", description=__doc__)
    parser.add_argument("--run", required=True, help="TREC run to re-order")
    parser.add_argument("--order", choices=ORDERS, required=True, help="order to give each list")
    parser.add_argument("--qrels", help="judgements of ideal and inverse-ideal (TREC, or BEIR's .tsv)")
    parser.add_argument("--collection", help="instead of --qrels: a collection whose own judgements to use")
    parser.add_argument("--depth", type=int, help="passages of each list to re-order and write (default: all)")
    parser.add_argument("--seed", type=int, default=42, help="of random (default: %(default)s)")
    parser.add_argument("--output", required=True, help="run to write")
    args = parser.parse_args(argv)
    if args.depth is not None and args.depth < 1:
        raise InputError(f"--depth keeps at least 1 passage, got {args.depth}")
    if (args.order == "random") != (not args.qrels and not args.collection) or (args.qrels and args.collection):
        raise InputError("ideal and inverse-ideal need judgements, by --qrels or by --collection; random takes none")
    judged: dict[str, dict[str, int]] = {}
    if args.order != "random":
        qrels = read_qrels(args.qrels) if args.qrels else open_collection(args.collection).qrels()
        for qrel in qrels:
            grades = judged.setdefault(qrel.query_id, {})
            grades[qrel.doc_id] = max(qrel.relevance, grades.get(qrel.doc_id, qrel.relevance))
    counts: Counter = Counter()
    lists = []
    for query_id, lines in read_lists(args.run, args.depth):
        if args.order != "random" and query_id not in judged:
            counts["lists left out: query without judgements"] += 1
            continue
        doc_ids = [line.doc_id for line in lines]
        grades = judged.get(query_id, {})
        counts["passages taken as not relevant: unjudged"] += sum(doc not in grades for doc in doc_ids) if judged else 0
        ordered = reorder(doc_ids, args.order, grades, f"{args.seed} {query_id}")
        lists.append((query_id, [(doc_id, float(len(ordered) - place)) for place, doc_id in enumerate(ordered)]))
    if not lists:
        raise InputError(f"{args.run}: no query of the run has judgements; no run was written")
    total = write_run(args.output, lists, args.order)
    for reason, count in counts.items():
        if count:
            print(f"{count:>12,}  {reason}")
    print(f"wrote {args.output}: {len(lists):,} queries, {total:,} lines, order {args.order}")


if __name__ == "__main__":
    run_command(main)
