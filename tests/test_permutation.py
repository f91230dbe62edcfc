"""The parser of an LLM's answer: a permutation or nothing, whatever the text."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_prep.permutation import parse_permutation


def named(answer: str, num_passages: int = 3) -> list[int] | None:
    ranking = parse_permutation(answer, num_passages)
    return None if ranking is None else [place + 1 for place in ranking.order]


@pytest.mark.parametrize(
    "answer",
    [
        "[3] > [1] > [2]",
        "3 > 1 > 2",
        "3] > [1] > [2]",
        "[3]>[1]>[2]",
        "[3] > [1] >\n[2]",
        "[3] >= [1] = [2]",
        "Passage 3 > Passage 1 > Passage 2",
        "**[3]** > **[1]** > **[2]**",
        "[3] &gt; [1] &gt; [2]",
        "1. [3]\n2. [1]\n3. [2]",
        "1) 3\n2) 1\n3) 2",
        "Rank 1: [3]\nRank 2: [1]\nRank 3: [2]",
        "1. Passage 3: good\n2. Passage 1\n3. Passage 2",
        "[3]\n[1]\n[2]",
        "3\n1\n2",
        "- [3]\n- [1]\n- [2]",
        "[3] as it tells the 1 thing asked\n[1] less so\n[2] off the point",
        "[3], [1], [2]",
        "3, 1 and 2",
        "[3] [1] [2]",
        "[3, 1, 2]",
        '["3", "1", "2"]',
        "[[3], [1], [2]]",
        '```json\n{\n  "ranking": [\n    3,\n    1,\n    2\n  ]\n}\n```',
        '{"ranking": [3, 1, 2], "why": "2 > 1"}',
        "The top 5 passages are: [3] > [1] > [2]",
        "The top 5\n3 > 1 > 2",
        "The top 2 passages are 3, 1, 2.",
        "Final ranking: 3, 1, 2 (best first)",
        "Here it is:\n\n[3] > [1] > [2]\n\nPassage 3 has 2 proofs.",
        "2 > 1 is clear, so: [3] > [1] > [2]",
        "<think>[1] > [2] > [3]? No.</think>[3] > [1] > [2]",
        "In the given order: [1] > [2] > [3]. But no.</think>\n\n[3] > [1] > [2]",
        "I'm sorry for the delay: [3] > [1] > [2]",
    ],
)
def test_every_form_of_a_whole_ranking(answer):
    assert parse_permutation(answer, 3) == ((2, 0, 1), {})


@pytest.mark.parametrize(
    "answer",
    [
        "",
        " \n ",
        "I'm sorry, but I can't rank these passages.",
        "I'm sorry, I can't rank passages [1], [2] and [3].",
        "I\u2019m sorry, I can\u2019t rank\n[1]\n[2]\n[3]",
        "I cannot answer in the form [2] > [1].",
        "The top 5 passages are relevant.",
        "The top 3 of 5 passages answer the query in 2 ways.",
        "1. The first passage\n2. The second",
        "1.\n2.\n3.",
        "In 1,200 cases out of 3",
        "Passages [3], [1] and [2] are good while [1] is not",
        "[] > []",
        "[9] > [8]",
        "3",
        "<think>[1] > [2] > [3]",
        "\u0663 > \u0661 > \u0662",
    ],
)
def test_what_is_no_ranking(answer):
    assert parse_permutation(answer, 3) is None


@pytest.mark.parametrize(
    ("answer", "order", "repairs"),
    [
        ("[3] > [1]", [3, 1, 2], {"missing": 1}),
        ("1] > [2]", [1, 2, 3], {"missing": 1}),
        ("[3]", [3, 1, 2], {"missing": 2}),
        ("[3] > [3] > [1] > [2]", [3, 1, 2], {"repeated": 1}),
        ("[0] > [3] > [4] > [1] > [2]", [3, 1, 2], {"out of range": 2}),
        ("[3] > [9] > [3]", [3, 1, 2], {"out of range": 1, "repeated": 1, "missing": 2}),
        ("[3] > [1] > [2", [3, 1, 2], {"missing": 1}),
        (f"{'9' * 5000} > 3 > 1 > 2", [3, 1, 2], {"out of range": 1}),
    ],
)
def test_repairs_are_made_and_counted_by_kind(answer, order, repairs):
    assert named(answer) == order
    assert parse_permutation(answer, 3).repairs == repairs


def test_a_last_identifier_that_was_cut_is_not_believed():
    assert named("[3] > [2] > [1", 12)[:2] == [3, 2]
    assert named("[3] > [2] > [1", 12)[2] == 1  # as the first of the missing
    assert parse_permutation("[3] > [2] > [1", 12).repairs == {"missing": 10}


WRITERS = {
    "arrows": lambda ids: " > ".join(f"[{number}]" for number in ids),
    "bare arrows": lambda ids: " > ".join(map(str, ids)),
    "prompt ended in [": lambda ids: " > ".join(f"[{number}]" for number in ids)[1:],
    "numbered": lambda ids: "\n".join(f"{place}. [{number}]" for place, number in enumerate(ids, start=1)),
    "lines": lambda ids: "\n".join(f"[{number}]" for number in ids),
    "commas": lambda ids: ", ".join(map(str, ids)),
    "json": lambda ids: json.dumps({"ranking": list(ids)}),
    "text around": lambda ids: f"The top 5 of 7:\n{' > '.join(f'[{n}]' for n in ids)}\nas 3 of 4 are good.",
}


@given(st.integers(2, 40).flatmap(lambda n: st.permutations(range(1, n + 1))), st.sampled_from(sorted(WRITERS)))
def test_any_permutation_in_any_form_is_read_back(identifiers, form):
    ranking = parse_permutation(WRITERS[form](identifiers), len(identifiers))
    assert ranking is not None
    assert [place + 1 for place in ranking.order] == list(identifiers)
    assert ranking.repairs == {}


PIECES = st.sampled_from(
    [
        "[",
        "]",
        ">",
        " > ",
        ",",
        "\n",
        " ",
        "1",
        "2",
        "17",
        "99",
        "[3]",
        "1.",
        "passage ",
        "are ",
        "{",
        "}",
        '"',
        "<think>",
    ]
)


@given(st.text() | st.lists(PIECES, max_size=60).map("".join), st.integers(1, 25))
def test_never_an_exception_and_always_a_permutation(answer, num_passages):
    ranking = parse_permutation(answer, num_passages)
    if ranking is not None:
        assert sorted(ranking.order) == list(range(num_passages))
        assert set(ranking.repairs) <= {"out of range", "repeated", "missing"}


@pytest.mark.parametrize("piece", ["[", "[1] > ", "[1]\n", "1, ", " ", "<think>", '{"a":', "[[1],", "1] "])
def test_long_answers_take_no_time(piece):
    ranking = parse_permutation(piece * 5_000, 20)
    assert ranking is None or sorted(ranking.order) == list(range(20))
