"""Read a ranking out of what an LLM wrote, and nothing that is not one.

A ranking is a *chain* of identifiers, never digits wherever they stand. In order of strength:

- an arrow chain, anywhere in the text: `[3] > [1] > [2]`, `3 > 1 > 2`, `1] > [2]` (the prompt ended in `[`);
- a series that stands by itself, from the start of a line, a colon or "are" to the end of the line, or as an array:
  `[3], [1], [2]`, `3, 1, 2`, `[3, 1, 2]`, `{"ranking": [3, 1, 2]}`, `[3] [1] [2]`;
- lines that each begin with an identifier, or hold nothing else: `[3]` above `[1]`, `1. [3]`, `2) Passage 1 is ...`.

"The top 5 passages are relevant" holds no chain. Where there are several, the one naming most passages is taken, an
arrow chain counting double, the last of equals. It is then repaired as the field does: identifiers outside the window
and repetitions are dropped, missing ones appended in their first order (Sun et al. 2023, arXiv 2304.09542).
"""

import json
import re
from collections.abc import Iterator
from itertools import pairwise
from typing import NamedTuple

MOST_CANDIDATES = 20  # chains looked at closely, the largest first: an endless babble takes no time
REPAIRS = ("out of range", "repeated", "missing")


class Ranking(NamedTuple):
    """`order`: places from 0, best first, always a permutation of the window. `repairs`: kind -> identifiers mended."""

    order: tuple[int, ...]
    repairs: dict[str, int]


class Chain(NamedTuple):
    identifiers: list[int]
    arrows: bool
    start: int
    end: int


IDENTIFIER = re.compile(
    r"(?:\b(?:passages?|documents?|docs?)\s*)?(?:(?P<open>[\[(]{1,3})\s{0,9})?#?"
    r"(?<![\w.\-])(?P<number>[0-9]+)(?![\w\-]|\.[0-9])"
    r"(?:\s*(?P<close>[\])]+))?",
    re.IGNORECASE,
)
ARROW = re.compile(r"[\s]*(?:[>=≥≻→]|->)[>=\s]*")
COMMA = re.compile(r"\s*(?:[,;]\s*(?:and\b)?|\band\b)\s*")
COMMA_IN_ARROWS = re.compile(r"\s*,\s*")
BLANK = re.compile(r"[ \t]*")
THOUGHT = re.compile(r"<(think|thinking|thought|reasoning)>.*?(?:</\1>|\Z)", re.DOTALL | re.IGNORECASE)
ENUMERATOR = re.compile(
    r"^[ \t]*(?:[-•][ \t]+)?(?:(?:rank[ \t]*)?#?[0-9]+[ \t]*[.):\-]"
    r"(?:[ \t]*(?=\[)|[ \t]+(?=(?:passage|document|doc)\b|[0-9]+[ \t]*$)))?",
    re.IGNORECASE | re.MULTILINE,
)
LINE_IDENTIFIER = re.compile(
    r"^(?:(?:passage|document|doc)[ \t]*\[?#?([0-9]+)\]?(?![0-9])|\[[ \t]*([0-9]+)[ \t]*\]|([0-9]+)[ \t]*,?[ \t]*$)",
    re.IGNORECASE | re.MULTILINE,
)
# what stands before belongs to a thought whose opening tag the prompt held
THOUGHT_BEFORE = re.compile(r"\A.*</(?:think|thinking|thought|reasoning)>", re.DOTALL | re.IGNORECASE)
REFUSAL = re.compile(
    r"\b(?:sorry|apolog\w+|can(?:no|')t|cannot|unable|not able|won't|refuse|as an ai|not possible|impossible)\b",
    re.IGNORECASE,
)
ASIDE = re.compile(r"\s*\([^()]*\)")
LEAD = re.compile(r"(?:^|[:{]|\b(?:are|is|as follows))$", re.IGNORECASE)
MARKS = str.maketrans("［］【】’，、", "[][]',,", '*`"')  # noqa: RUF001, the marks of other keyboards, and of Markdown


def parse_permutation(answer: str, num_passages: int) -> Ranking | None:
    """Return the ranking of `num_passages` passages (identifiers from 1) that `answer` states, or None.

    None means that the answer states no ranking: it is empty, a refusal, prose. Never raises, whatever the text.
    """
    text = THOUGHT_BEFORE.sub("", THOUGHT.sub("", answer)).replace("&gt;", ">")
    text = (_json_array(text) or text).translate(MARKS)
    text = ENUMERATOR.sub("", text).strip()
    candidates = []
    for chain in (*_series(text), *_lines(text)):
        named = len({number for number in chain.identifiers if 1 <= number <= num_passages})
        if named:
            candidates.append((named * (2 if chain.arrows else 1), chain.start, named, chain))
    for _, _, named, chain in sorted(candidates, reverse=True, key=lambda candidate: candidate[:2])[:MOST_CANDIDATES]:
        if _is_ranking(chain, text, named, num_passages):
            return _repair(chain.identifiers, num_passages)
    return None


def _json_array(text: str) -> str | None:
    """Return the array of an answer that is JSON as a whole: alone, or the first one in an object."""
    try:
        content = json.loads(text.strip().removeprefix("```json").strip("`\n "))
    except (ValueError, RecursionError):
        return None
    values = content.values() if isinstance(content, dict) else [content]
    return next((json.dumps(value) for value in values if isinstance(value, list)), None)


def _is_ranking(chain: Chain, text: str, named: int, num_passages: int) -> bool:
    """Tell a ranking from identifiers in passing, as in "I can't rank [1] > [2]" or a lone number."""
    around = text[: chain.start] + " " + text[chain.end :]
    if REFUSAL.search(around) and not (chain.arrows and named == num_passages):
        return False
    return named >= 2 or not re.search(r"\w", around)


def _series(text: str) -> Iterator[Chain]:
    """Yield the chains within running text: identifiers joined by arrows, or by commas or blanks and standing alone."""
    found = list(IDENTIFIER.finditer(text))
    for joint in (ARROW, COMMA, BLANK):
        first = 0
        for last in range(len(found)):
            if last + 1 < len(found) and _joined(text, found[last], found[last + 1], joint):
                continue
            chain = found[first : last + 1]
            first = last + 1
            if joint is ARROW:
                # an unclosed last bracket may hold the head of a longer number, cut by the limit on the answer
                if len(chain) > 2 and chain[-1]["open"] and not chain[-1]["close"] and chain[-1].end() == len(text):
                    chain = chain[:-1]
                if any(ARROW.fullmatch(text, a.end(), b.start()) for a, b in pairwise(chain)):
                    yield _chain(chain, arrows=True)
            # a lone identifier ranks only in brackets and as the whole answer, a lone number never
            elif (len(chain) > 1 or (len(found) == 1 and chain[0]["close"])) and _stands_alone(text, chain):
                yield _chain(chain, arrows=False)


def _joined(text: str, left: re.Match[str], right: re.Match[str], joint: re.Pattern[str]) -> bool:
    between = text[left.end() : right.start()]
    bracketed = bool(left["close"] and right["open"])
    if joint is BLANK and bool(left["close"]) != bool(right["open"]):
        return False
    if joint is ARROW and bracketed and COMMA_IN_ARROWS.fullmatch(between):
        return True
    return joint.fullmatch(between) is not None


def _stands_alone(text: str, chain: list[re.Match[str]]) -> bool:
    first, last = chain[0], chain[-1]
    before = text[text.rfind("\n", 0, first.start()) + 1 : first.start()]
    if not LEAD.search(before.rstrip()):
        return False
    after = ASIDE.sub("", text[last.end() :].partition("\n")[0])
    return not re.search(r"[\w\[(]", after)


def _lines(text: str) -> Iterator[Chain]:
    """Yield the chain of the lines that begin with an identifier."""
    found = list(LINE_IDENTIFIER.finditer(text))
    if len(found) > 1:
        identifiers = [_number(next(filter(None, match.groups()))) for match in found]
        yield Chain(identifiers, False, found[0].start(), found[-1].end())


def _chain(found: list[re.Match[str]], arrows: bool) -> Chain:
    return Chain([_number(match["number"]) for match in found], arrows, found[0].start(), found[-1].end())


def _number(digits: str) -> int:
    return int(digits[-9:]) if len(digits.lstrip("0")) <= 9 else 0  # int() refuses thousands of digits; 0 is no passage


def _repair(identifiers: list[int], num_passages: int) -> Ranking:
    """Drop what is outside 1..num_passages and what stands again, append what is missing in its first order."""
    inside = [number - 1 for number in identifiers if 1 <= number <= num_passages]
    order = list(dict.fromkeys(inside))
    missing = sorted(set(range(num_passages)) - set(order))
    counts = (len(identifiers) - len(inside), len(inside) - len(order), len(missing))
    return Ranking((*order, *missing), {kind: count for kind, count in zip(REPAIRS, counts) if count})
