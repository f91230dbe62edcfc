"""Near-duplicates of a list as subtopics: `python -m data_prep.novelty --run R --collection C --output QRELS`.

A passage that says what another one says is relevant, but not new. Passages of a list whose words overlap (Jaccard
similarity of word sets at `--similarity` or above) become one subtopic, directly or through others; the output is a
qrels file of diversity judgements, `query_id subtopic doc_id grade`, as alpha-nDCG wants them.
Only passages that are judged relevant are written, with their grade; `--all-relevant` takes the whole list with 1.
"""

import argparse
import re
from collections import Counter
from collections.abc import Sequence

import numpy as np
from scipy.sparse import csr_matrix
from scipy.sparse.csgraph import connected_components
from tqdm import tqdm

from setenc_hf.collection import open_collection
from setenc_hf.command import run_command
from setenc_hf.errors import InputError
from setenc_hf.files import atomic_file
from setenc_hf.trec import read_lists, read_qrels


def subtopics(texts: Sequence[str], similarity: float) -> np.ndarray:
    """Return each text's subtopic, from 1 in order of first appearance [texts].

    Two texts share a subtopic where the Jaccard similarity of their sets of lower-cased words is at least `similarity`,
    or a chain of such texts joins them.
    """
    vocabulary: dict[str, int] = {}
    words = [{vocabulary.setdefault(w, len(vocabulary)) for w in re.findall(r"\w+", text.lower())} for text in texts]
    sizes = np.array([len(found) for found in words])
    ends = np.concatenate([[0], np.cumsum(sizes)])
    columns = [column for found in words for column in sorted(found)]
    matrix = csr_matrix((np.ones(len(columns), np.int32), columns, ends), shape=(len(texts), len(vocabulary)))
    shared = (matrix @ matrix.T).toarray()
    united = np.maximum(sizes[:, None] + sizes[None, :] - shared, 1)
    _, components = connected_components(csr_matrix(shared / united >= similarity), directed=False)
    numbers: dict[int, int] = {}
    return np.array([numbers.setdefault(component, len(numbers) + 1) for component in components.tolist()])


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m data_prep.novelty", description=__doc__)
    parser.add_argument("--run", required=True, help="TREC run whose lists to group")
    parser.add_argument("--collection", required=True, help="an ir_datasets id or a folder: texts, and judgements")
    parser.add_argument("--qrels", help="judgements to use instead of the collection's own")
    parser.add_argument("--all-relevant", action="store_true", help="take every passage of a list as relevant, grade 1")
    parser.add_argument("--depth", type=int, default=100, help="passages of each list (default: %(default)s)")
    parser.add_argument("--similarity", type=float, default=0.7, help="least Jaccard similarity (default: %(default)s)")
    parser.add_argument("--output", required=True, help="qrels file to write")
    args = parser.parse_args(argv)
    if not 0 < args.similarity <= 1 or args.depth < 1:
        raise InputError("--similarity lies above 0 and at most at 1, --depth is at least 1")
    if args.all_relevant and args.qrels:
        raise InputError("--all-relevant takes no judgements; leave out --qrels")
    collection = open_collection(args.collection)
    grades: dict[tuple[str, str], int] = {}
    if not args.all_relevant:
        for qrel in read_qrels(args.qrels) if args.qrels else collection.qrels():
            pair = qrel.query_id, qrel.doc_id
            grades[pair] = max(qrel.relevance, grades.get(pair, qrel.relevance))
    counts: Counter = Counter()
    lists = list(read_lists(args.run, args.depth))
    texts = collection.texts({line.doc_id for _, lines in lists for line in lines})
    with atomic_file(args.output) as output:
        for query_id, lines in tqdm(lists, desc="subtopics", unit=" lists", disable=None):
            doc_ids = [line.doc_id for line in lines if args.all_relevant or grades.get((query_id, line.doc_id), 0) > 0]
            kept = [doc_id for doc_id in doc_ids if doc_id in texts]
            counts["passages left out: no text in the collection"] += len(doc_ids) - len(kept)
            counts["lists left out: no relevant passage"] += not kept
            if not kept:
                continue
            groups = subtopics([texts[doc_id] for doc_id in kept], args.similarity)
            for doc_id, subtopic in zip(kept, groups):
                output.write(f"{query_id} {subtopic} {doc_id} {grades.get((query_id, doc_id), 1)}\n")
            counts["passages"] += len(kept)
            counts["subtopics"] += int(groups.max())
        if not counts["passages"]:
            raise InputError(f"{args.run}: no list holds a relevant passage with a text; nothing was written")
    for reason, count in sorted(counts.items()):
        if count:
            print(f"{count:>12,}  {reason}")
    print(f"wrote {args.output}")


if __name__ == "__main__":
    run_command(main)
