"""`ir_measures` for people who live in the `evaluate` library: `evaluate.load(".../setenc_hf/ranking_measures")`."""

import datasets
import evaluate
import ir_measures

DESCRIPTION = "Effectiveness of rankings by ir_measures: nDCG@10, MRR@10, R@100, AP and every other measure it knows."
CITATION = """\
@inproceedings{macavaney2022irmeasures,
  title = {Streamlining Evaluation with ir-measures},
  author = {MacAvaney, Sean and Macdonald, Craig and Ounis, Iadh},
  booktitle = {ECIR},
  year = {2022},
}
"""
INPUTS = """
Args:
    predictions: a row a query: {"query_id": "q1", "doc_ids": ["d1", "d2"], "scores": [2.5, 1.0]}; a higher score ranks
        first, equal scores rank in the order given.
    references: a row a query, in the same order: {"query_id": "q1", "doc_ids": ["d2"], "relevances": [3]}.
    measures: names of ir_measures, ["nDCG@10"] by default.
Returns:
    {measure: mean over the queries}.
"""


@evaluate.utils.file_utils.add_start_docstrings(DESCRIPTION, INPUTS)
class RankingMeasures(evaluate.Metric):
    """Means over queries of measures of `ir_measures`."""

    def _info(self) -> evaluate.MetricInfo:
        text, texts = datasets.Value("string"), datasets.List(datasets.Value("string"))
        scores, grades = datasets.List(datasets.Value("float64")), datasets.List(datasets.Value("int32"))
        return evaluate.MetricInfo(
            description=DESCRIPTION,
            citation=CITATION,
            inputs_description=INPUTS,
            features=datasets.Features(
                {
                    "predictions": {"query_id": text, "doc_ids": texts, "scores": scores},
                    "references": {"query_id": text, "doc_ids": texts, "relevances": grades},
                }
            ),
            reference_urls=["https://ir-measur.es"],
        )

    def _compute(self, predictions, references, measures=("nDCG@10",)):  # type: ignore[no-untyped-def]
        run, qrels = {}, {}
        for ranked, judged in zip(predictions, references):
            query_id = ranked["query_id"]
            if judged["query_id"] != query_id:
                raise ValueError(f"row of query {query_id!r} is judged by a row of query {judged['query_id']!r}")
            if query_id in run:
                raise ValueError(f"query {query_id!r} has two rows; give one row a query")
            if not len(ranked["doc_ids"]) == len(ranked["scores"]) == len(set(ranked["doc_ids"])):
                raise ValueError(f"query {query_id!r}: `doc_ids` must be unique and align with `scores`")
            order = sorted(range(len(ranked["scores"])), key=[-score for score in ranked["scores"]].__getitem__)
            run[query_id] = {ranked["doc_ids"][place]: float(-rank) for rank, place in enumerate(order)}
            qrels[query_id] = dict(zip(judged["doc_ids"], judged["relevances"], strict=True))
        parsed = {name: ir_measures.parse_measure(name) for name in measures}
        values = ir_measures.calc_aggregate(list(parsed.values()), qrels, run)
        return {name: values[measure] for name, measure in parsed.items()}
