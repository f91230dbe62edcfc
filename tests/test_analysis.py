"""The analysis equals Lucene's: literal examples (their terms were checked with Lucene itself), and properties."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_prep.analysis import MAX_WORD, _unicode_word, open_analyzer, split_words
from setenc_hf.errors import InputError

LUCENE = {
    "The U.S.A.'s dogs' running e.g. 3.5,4 foo:bar x_y": "u.s.a s dog run e.g 3.5,4 foo:bar x_y",
    "O'Neil\u2019s can't 3;4 a.b.c. _a __ 12a.b3 3.a": "o'neil can't 3;4 a.b.c _a 12a.b3 3",
    "caresses ponies relational feed agreed is AS his": "caress poni relat feed agre hi",
    "geology vileli possibly conditional": "geologi vile possibl condit",
    "\u6771\u4eac\u30bf\u30ef\u30fc \u3072\u3089": "\u6771 \u4eac \u30bf\u30ef\u30fc \u3072 \u3089",
    "\u05e6\u05d4\"\u05dc \u05d3' abc": "\u05e6\u05d4\"\u05dc \u05d3' abc",
    "Acme\u00ae \U0001f44d\U0001f3fd \U0001f1e9\U0001f1ea x": "acm \u00ae \U0001f44d\U0001f3fd \U0001f1e9\U0001f1ea x",
    "\u039f\u0394\u039f\u03a3 \u0130stanbul": "\u03bf\u03b4\u03bf\u03c3 istanbul",
}


@pytest.mark.parametrize(("text", "terms"), LUCENE.items())
def test_english_terms(text, terms):
    assert open_analyzer("english").terms(text) == terms.split()


def test_other_analyzers():
    assert open_analyzer("standard").terms("The dogs' RUN.") == ["the", "dogs", "RUN".lower()]
    assert open_analyzer("whitespace").terms("The dogs' RUN.") == ["The", "dogs'", "RUN."]
    with pytest.raises(InputError, match="english, standard, whitespace"):
        open_analyzer("german")


@given(st.text() | st.text(alphabet="ab1_.,:;' é\u05d0\u0301\u30abー\u200d😀🏽", max_size=40))
def test_stretches_of_ascii_take_a_shortcut_that_changes_nothing(text):
    assert split_words(text) == _unicode_word().findall(text)


@given(st.text(), st.sampled_from(["english", "standard", "whitespace"]))
def test_analysis_never_raises_and_gives_no_empty_term(text, name):
    assert all(open_analyzer(name).terms(text))


@pytest.mark.parametrize(
    ("word", "lengths"),
    [("x" * 600, [255, 255, 90]), ("a." * 300, [255, 255, 87]), ("é" + "_" * 300 + "a", [255, 47])],
)
def test_long_words_are_cut_as_lucene_cuts_them(word, lengths):
    assert [len(part) for part in split_words(word)] == lengths


@pytest.mark.parametrize("text", ["_" * 100_000 + "x", "é" + "_" * 100_000, "a'" * 50_000 + "é", "a" * 100_000 + " é"])
def test_odd_texts_take_linear_time(text):
    assert all(len(word) <= MAX_WORD for word in split_words(text))
