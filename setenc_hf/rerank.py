"""Re-rank a TREC run with a Set-Encoder.

    python -m setenc_hf.rerank --model M --run bm25.run --collection msmarco-passage/trec-dl-2019/judged \
        --output reranked.run [--qrels qrels.txt --measures nDCG@10]

Under `accelerate launch` the queries are shared out over the processes.
"""

import argparse
import resource
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from .collection import open_collection
from .command import run_command
from .errors import InputError
from .files import check_readable
from .hub import find_model, opening
from .measures import mean, parse_measures, per_query, run_scores
from .trec import read_lists, read_qrels, write_run

if TYPE_CHECKING:
    from .scoring import QueryPassages

DTYPES = ("auto", "float32", "bfloat16")
LONGEST_WAIT = timedelta(hours=3)  # of one process for the others, which may have a collection to build first


def read_inputs(run: str, collection_name: str, depth: int, counts: Counter) -> "list[QueryPassages]":
    """Return the lists to re-rank with their texts; count what has to be left out, and why."""
    from .scoring import QueryPassages

    collection = open_collection(collection_name)
    lists = []
    for query_id, lines in read_lists(run):
        counts["passages left out: below --depth"] += max(len(lines) - depth, 0)
        lists.append((query_id, [line.doc_id for line in lines[:depth]]))
    texts = collection.texts({doc_id for _, doc_ids in lists for doc_id in doc_ids})
    queries = collection.queries()
    inputs = []
    for query_id, doc_ids in lists:
        if query_id not in queries:
            counts["lists left out: query unknown to the collection"] += 1
            continue
        known = [doc_id for doc_id in doc_ids if doc_id in texts]
        counts["passages left out: no text in the collection"] += len(doc_ids) - len(known)
        if known:
            inputs.append(QueryPassages(query_id, queries[query_id], known, [texts[doc_id] for doc_id in known]))
        else:
            counts["lists left out: no passage has a text"] += 1
    if not inputs:
        raise InputError(f"nothing to re-rank: {run} and {collection_name} share no query with a passage")
    return inputs


def rerank(args: argparse.Namespace) -> None:
    """Re-rank and write; only the first process prints."""
    measures = parse_measures(args.measures)
    qrels = list(read_qrels(args.qrels)) if args.qrels else None
    if Path(args.output).is_dir():
        raise InputError(f"{args.output}: is a directory; name a file to write")
    check_readable(Path(args.run))

    import torch
    from accelerate import PartialState
    from accelerate.utils import gather_object
    from transformers.utils import logging

    from .modeling import SetEncoderForReranking, TextTooLong
    from .scoring import score_lists

    logging.disable_progress_bar()
    state = PartialState(cpu=not torch.accelerator.is_available(), timeout=LONGEST_WAIT)
    counts: Counter = Counter()
    # ir_datasets builds a store of texts, which several at once would spoil, whether the nodes share their disk or not
    with state.main_process_first(), state.local_main_process_first():
        inputs = read_inputs(args.run, args.collection, args.depth, counts)
    dtype = choose_dtype(args.dtype, state.device)
    args.model = find_model(args.model)
    with opening(args.model):
        model = SetEncoderForReranking.from_pretrained(args.model, dtype=dtype).to(state.device)
        tokenizer = model.open_tokenizer()
    if model.is_head_new:
        raise InputError(f"model {args.model!r} is no Set-Encoder: its score head would be random; fine-tune it first")
    mine = inputs[state.process_index :: state.num_processes]
    start = time.perf_counter()
    progress = tqdm(total=len(mine), desc="re-rank", unit=" lists", disable=None if state.is_main_process else True)

    def advance() -> Iterator[tuple[str, list[tuple[str, float]]]]:
        try:
            for query_id, doc_ids, scores in score_lists(model, tokenizer, mine, args.max_tokens_per_batch):
                progress.update()
                yield query_id, list(zip(doc_ids, scores, strict=True))
        except TextTooLong as error:
            raise InputError(f"model {args.model!r} cannot be used: {error}") from None

    if state.num_processes == 1:
        lines = write_run(args.output, advance(), args.tag)
    else:
        rows = dict(gather_object(list(advance())))
        if state.is_main_process:
            lines = write_run(args.output, ((item.query_id, rows[item.query_id]) for item in inputs), args.tag)
    seconds = time.perf_counter() - start
    progress.close()
    if not state.is_main_process:
        return
    for reason, count in sorted(counts.items()):
        if count:
            print(f"{count:>9,}  {reason}")
    passages = sum(len(item.passages) for item in inputs)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1 << 30 if sys.platform == "darwin" else 1 << 20)
    print(
        f"Re-ranked {len(inputs):,} lists ({lines:,} passages) in {seconds:.1f} s: {seconds / len(inputs):.3f} s a "
        f"list, {passages / seconds:,.0f} passages a second; {str(dtype).removeprefix('torch.')} on {state.device}, "
        f"peak memory {peak:.2f} GiB; wrote {args.output}"
    )
    if qrels is not None:
        values = per_query(measures, qrels, run_scores(read_lists(args.output)))
        print("  ".join(f"{name} {mean(queries):.4f}" for name, queries in values.items()))


def choose_dtype(name: str, device: Any) -> Any:
    """Return the torch type of a name; `auto` is bfloat16 where the device multiplies it faster, else float32.

    With AVX512-BF16 a list took .62 of the time in float32.
    """
    import torch

    from .cpu_linear import is_bfloat16_fast

    if name != "auto":
        return getattr(torch, name)
    return torch.bfloat16 if is_bfloat16_fast(device) else torch.float32


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m setenc_hf.rerank", description=__doc__.split("\n\n")[0])
    add = parser.add_argument
    add("--model", required=True, help="folder or hub id of a Set-Encoder")
    add("--run", required=True, help="first-stage run (TREC, plain or .gz)")
    add("--collection", required=True, help="an ir_datasets id or a folder: texts and queries")
    add("--output", required=True, help="run to write (.gz is compressed)")
    add("--depth", type=int, default=100, help="passages re-ranked of each list (default: %(default)s)")
    add("--max_tokens_per_batch", type=int, default=16_384, metavar="N",
        help="short lists go to the device together up to so many tokens (default: %(default)s)")  # fmt: skip
    add("--dtype", choices=DTYPES, default="auto", help="type of the weights (default: what the device does fastest)")
    add("--qrels", help="judgements to measure the result by")
    add("--measures", nargs="+", default=["nDCG@10"], help="names of ir_measures (default: nDCG@10)")
    add("--tag", default="set-encoder", help="last column of the run (default: %(default)s)")
    args = parser.parse_args(argv)
    if args.depth < 1:
        raise InputError(f"--depth re-ranks at least 1 passage, got {args.depth}")
    if args.max_tokens_per_batch < 1:
        raise InputError(f"--max_tokens_per_batch is at least 1, got {args.max_tokens_per_batch}")
    return args


def main(argv: Sequence[str] | None = None) -> None:
    rerank(parse(argv))


if __name__ == "__main__":
    run_command(main)
