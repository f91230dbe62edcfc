"""Train re-rankers on the same lists, re-rank TREC Deep Learning 2019 with each, and compare them.

    python -m benchmarks.effectiveness --data DATA --output O [--seeds 1 2 3] [--systems set-encoder pointwise ...]

DATA holds `msmarco-dev`, `trec-dl/dl19`, `trec-dl/dl21` and `trec-dl/dl22` (queries, corpus, qrels, runs). What is
finished under `O` is not done again, so that an interrupted benchmark goes on and systems can be added one by one.
`--markdown FILE` writes the tables there. Settings are those of `recipes/minilm-*.json`.

