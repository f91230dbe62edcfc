r"""Text analysis as Lucene does it: UAX #29 words, English possessives, lower case, stop words, Porter's stemmer.

The grammar of words follows Lucene's `StandardTokenizer` (UAX #29 with one token per Han or Hiragana character, runs
of South-East Asian script and emoji kept whole, tokens cut at 255 characters). No word crosses a blank, so stretches
of ASCII take a short pattern that finds the same words nine times as fast.
"""

import re
from collections.abc import Callable, Iterator
from functools import cache, lru_cache

from setenc_hf.errors import InputError

MAX_WORD = 255  # Lucene's `maxTokenLength`: the scanner's buffer is full, and the rest begins a new token

_STOP_WORDS = """a an and are as at be but by for if in into is it no not of on or such that the their then there these
they this to was will with"""
STOP_WORDS = frozenset(_STOP_WORDS.split())  # those of Lucene's `EnglishAnalyzer`

# In ASCII every run of letters, digits and underscores is one word, and a mark joins two letters or two digits.
ASCII_WORD = re.compile(
    r"(?<!_)_*+[A-Za-z0-9]\w*(?:(?:(?<=[A-Za-z])[.':](?=[A-Za-z])|(?<=[0-9])[.,;'](?=[0-9]))\w+)*", re.ASCII
)
# A stretch without blanks that holds a character beyond ASCII; begun only where a stretch begins, to stay linear.
BEYOND_ASCII = re.compile(r"(?<![!-~])[!-~]*+[^\x00-\x7F]\S*")


class Analyzer:
    """`words(text)` splits; `term(word)` gives what is indexed for a word, `""` for a word that is dropped.

    The two steps are apart because a collection has few distinct words: an index builder asks `term` once for each.
    """

    def __init__(self, words: Callable[[str], list[str]], term: Callable[[str], str]) -> None:
        self.words = words
        self.term = term

    def terms(self, text: str) -> list[str]:
        """Return the terms of a text in their order; never raises."""
        return [term for word in self.words(text) if (term := self.term(word))]


def open_analyzer(name: str) -> Analyzer:
    """Return the analyzer of this name.

    `english` equals Lucene's and Anserini's default for English; `standard` has the same words in lower case, neither
    stemmed nor stopped, for other languages; `whitespace` is for texts that are tokenised already.
    """
    if name == "english":
        return Analyzer(split_words, _english_term())
    if name == "standard":
        return Analyzer(split_words, lower_case)
    if name == "whitespace":
        return Analyzer(str.split, str)
    raise InputError(f"--analyzer is one of {', '.join(ANALYZERS)}, got {name!r}")


ANALYZERS = ("english", "standard", "whitespace")


def split_words(text: str) -> list[str]:
    """Return the words of a text as Lucene's `StandardTokenizer` finds them."""
    if text.isascii():
        words = ASCII_WORD.findall(text)
    else:
        words, end, unicode_word = [], 0, _unicode_word()
        for stretch in BEYOND_ASCII.finditer(text):
            words += ASCII_WORD.findall(text, end, stretch.start())
            end = stretch.end()
            words += unicode_word.findall(stretch[0])
        words += ASCII_WORD.findall(text, end)
    if words and len(max(words, key=len)) > MAX_WORD:
        words = [part for word in words for part in _cut(word)]
    return words


def _cut(word: str) -> Iterator[str]:
    """Yield what a scanner sees that holds 255 characters at most; each part begins where a word may begin."""
    pattern = ASCII_WORD if word.isascii() else _unicode_word()
    end = 0
    while found := pattern.search(word[end : end + MAX_WORD + 1]):
        yield found[0][:MAX_WORD]
        end += found.start() + len(found[0][:MAX_WORD])


def lower_case(word: str) -> str:
    """Lower each character by itself, as Java does: no final sigma, and a dotted capital I becomes one letter."""
    return word.lower() if word.isascii() else "".join(character.lower()[0] for character in word)


def _english_term() -> Callable[[str], str]:
    try:
        from nltk.stem.porter import PorterStemmer
    except ImportError as error:
        raise InputError("English analysis needs nltk's stemmer: pip install 'setenc_hf[retrieval]'") from error
    stemmer = PorterStemmer(mode=PorterStemmer.MARTIN_EXTENSIONS)

    @lru_cache(500_000)  # a stem costs a hundred times a look-up, and most words come again
    def term(word: str) -> str:
        if word[-1] in "sS" and word[-2:-1] in ("'", "\u2019", "\uff07"):
            word = word[:-2]
        word = lower_case(word)
        if word in STOP_WORDS:
            return ""
        return stemmer.stem(word, to_lowercase=False)  # leaves words under 3 letters as they are, as Lucene does

    return term


@cache
def _unicode_word():
    """Compile the grammar of Lucene's `StandardTokenizerImpl.jflex`; every class takes its marks along (rule WB4)."""
    try:
        import regex
    except ImportError as error:
        raise InputError("Words beyond ASCII need the package regex: pip install 'setenc_hf[retrieval]'") from error

    def wb(*classes: str) -> str:
        return "".join(rf"\p{{WB={name}}}" for name in classes)

    marks = f"[{wb('Extend', 'Format', 'ZWJ')}]*+"
    letter = f"[{wb('ALetter', 'Hebrew_Letter')}]{marks}"
    digit = rf"[{wb('Numeric')}\uFF10-\uFF19]{marks}"
    katakana = f"[{wb('Katakana')}]{marks}"
    hebrew = f"[{wb('Hebrew_Letter')}]{marks}"
    joiner = f"(?:[{wb('ExtendNumLet')}]{marks})"
    mid_letter = f"[{wb('MidLetter', 'MidNumLet', 'Single_Quote')}]{marks}"
    mid_digit = f"[{wb('MidNum', 'MidNumLet', 'Single_Quote')}]{marks}"
    after_hebrew = (
        f"(?<=[{wb('Hebrew_Letter')}])(?:[{wb('Double_Quote')}]{marks}{hebrew}|[{wb('Single_Quote')}]{marks})"
    )
    piece = (
        f"(?:{katakana}(?:{joiner}*{katakana})*"
        f"|(?:{digit}(?:(?:{joiner}*|{mid_digit}){digit})*"
        f"|{letter}(?:(?:{joiner}*|{mid_letter}){letter}|{after_hebrew})*)+)"
    )
    word = f"(?<![{wb('ExtendNumLet')}]){joiner}*+{piece}(?:{joiner}+{piece})*{joiner}*"
    emoji_one = (
        r"[[\p{Emoji}\p{Extended_Pictographic}]--[0-9#*\U0001F1E6-\U0001F1FF]]\p{Emoji_Modifier}?[\uFE0E\uFE0F]?"
    )
    emoji = (
        rf"[0-9#*]\uFE0F?\u20E3|[\U0001F1E6-\U0001F1FF]{{2}}"
        rf"|{emoji_one}(?:\u200D{emoji_one})*(?:[\U000E0020-\U000E007E]+\U000E007F)?"
    )
    single = rf"[\p{{Script=Han}}\p{{Script=Hiragana}}]{marks}"
    return regex.compile(rf"{emoji}|{word}|(?:\p{{LB=SA}}{marks})+|{single}", regex.VERSION1)
