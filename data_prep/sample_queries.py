"""Draw queries of a run: `python -m data_prep.sample_queries --run R --num-queries 1000 --seed 42 --output R2`.

The same seed draws the same queries whatever the order of the run's lines; the lines that are kept stay as they are,
in their order.
"""

import argparse
import random
from collections.abc import Mapping, Sequence

from setenc_hf.command import run_command
from setenc_hf.errors import InputError
from setenc_hf.files import atomic_file, read_lines
from setenc_hf.trec import read_run


def sample(query_ids: Sequence[str], num_queries: int, seed: int, strata: Mapping[str, str] | None = None) -> set[str]:
    """Return `num_queries` of `query_ids`; with `strata` (query id -> stratum), each in its share of the queries.

    Shares are rounded by the largest remainder, so that they sum to `num_queries`. Raises `InputError` where there are
    fewer queries, or one is in no stratum.
    """
    unique = sorted(set(query_ids))
    if not 1 <= num_queries <= len(unique):
        raise InputError(f"--num-queries must lie between 1 and the run's {len(unique):,} queries, got {num_queries:,}")
    draw = random.Random(seed)
    if strata is None:
        return set(draw.sample(unique, num_queries))
    members: dict[str, list[str]] = {}
    for query_id in unique:
        if query_id not in strata:
            raise InputError(f"--stratify: query {query_id!r} of the run is in no stratum")
        members.setdefault(strata[query_id], []).append(query_id)
    exact = {stratum: num_queries * len(ids) / len(unique) for stratum, ids in members.items()}
    shares = {stratum: int(share) for stratum, share in exact.items()}
    by_remainder = sorted(exact, key=lambda stratum: (shares[stratum] - exact[stratum], stratum))
    for stratum in by_remainder[: num_queries - sum(shares.values())]:
        shares[stratum] += 1
    return {query_id for stratum in sorted(members) for query_id in draw.sample(members[stratum], shares[stratum])}


def read_strata(path: str) -> dict[str, str]:
    """Read lines `query_id<TAB>stratum`; raises `InputError` with `file:line` on another form."""
    strata = {}
    for number, line in read_lines(path):
        columns = line.split("\t")
        if len(columns) != 2 or not columns[0].strip():
            raise InputError(f"{path}:{number}: a line is a query id, one tab and a stratum, got {line[:100]!r}")
        strata[columns[0].strip()] = columns[1].strip()
    return strata


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m data_prep.sample_queries", description=__doc__)
    parser.add_argument("--run", required=True, help="TREC run to draw from.")
    parser.add_argument("--num-queries", type=int, default=1000, help="Queries to draw (1000).")
    parser.add_argument("--seed", type=int, default=42, help="Seed of the draw (42).")
    parser.add_argument("--stratify", help="File `query_id<TAB>stratum`: draw from each stratum in its share.")
    parser.add_argument("--output", required=True, help="Run to write.")
    args = parser.parse_args(argv)

    query_ids = list(dict.fromkeys(line.query_id for line in read_run(args.run)))
    kept = sample(query_ids, args.num_queries, args.seed, read_strata(args.stratify) if args.stratify else None)
    count = 0
    with atomic_file(args.output) as output:
        for _, line in read_lines(args.run):
            if line.strip() and line.split(maxsplit=1)[0] in kept:
                output.write(f"{line}\n")
                count += 1
    print(f"wrote {args.output}: {len(kept):,} of {len(query_ids):,} queries, {count:,} lines, seed {args.seed}")


if __name__ == "__main__":
    run_command(main)
