"""SQuAD's measures on words, but a number keeps its sign and its decimal point.

As SQuAD does (arXiv:1606.05250, evaluate-v1.1.py) this drops case, articles and
punctuation, also inside a word: Spider-Man is spiderman, AC/DC acdc, U.S. us. What it
does otherwise:

1. Numbers are compared by value: -3 is not 3, 1.5 not 15, 1,000 is 1000 and 1.0 is 1.
   The released code of ARPO drops sign and point.
2. Between two digits punctuation is kept, a point or a comma, or it separates: v1.5 is
   not v15, 1/2 and 1837-1838 are two words each. The comma of 1,000km is dropped.
3. The dashes and quotes of Unicode are punctuation as well. Other signs (™, °, emoji)
   and the marks that do not compose with their letter separate words; SQuAD keeps
   them.
4. "yes", "no" and "noanswer" get no credit for a part, as in HotpotQA's own measure:
   "yes no" is no answer.
5. Where no word is left, texts must be equal, and not blank.
6. Only the first `MAX_CHARS` characters are read.
"""

import re
import string
import unicodedata
from collections import Counter
from functools import lru_cache

from rllib_arpo.rewards.quantities import number

MAX_CHARS = 20_000  # no answer is longer; what follows is not read

_ARTICLES = frozenset({"a", "an", "the"})
_ALL_OR_NOTHING = (["yes"], ["no"], ["noanswer"])
# Possessive: a long run of digits must not be tried again from each of its digits.
_NUMBER = r"[-+]?(?:\d[\d,]*+\.?+\d*+|\.\d++)"
_MARKS = rf"[{re.escape(string.punctuation)}\u2010-\u2027]++"
_LETTER = r"[^\W\d_]"
_THOUSANDS = r"(?<=\d),(?=\d{3}(?!\d))"
# What does not end a word: marks beside a letter, 1.5, 1,000
_INSIDE = rf"(?:(?<=\d)\.(?=\d)|{_THOUSANDS}|(?<!\d){_MARKS}|{_MARKS}(?={_LETTER}))"
# A number on its own, or a word with what is inside it.
_WORD = re.compile(
    rf"(?<![\w.]){_NUMBER}(?!\.?\w|{_MARKS}{_LETTER})"
    rf"|[^\W_]+(?:{_INSIDE}[^\W_]+)*"
)
_DROPPED = re.compile(rf"{_THOUSANDS}|(?<!\d)[.,]|[.,](?!\d)|[^\w.,]|_")


def f1(answer: str, gold: str) -> float:
    """Harmonic mean of precision and recall of the words, in [0, 1]."""
    given, expected = words(answer), words(gold)
    if not given or not expected:
        return float(answer.strip() == gold.strip() != "")
    if given in _ALL_OR_NOTHING or expected in _ALL_OR_NOTHING:
        return float(given == expected)
    common = (Counter(given) & Counter(expected)).total()
    return 2 * common / (len(given) + len(expected))


def exact_match(answer: str, gold: str) -> bool:
    """Whether the words are the same, in the same order, and there are some."""
    given = words(answer)
    if not given:
        return answer.strip() == gold.strip() != ""
    return given == words(gold)


def words(text: str) -> list[str]:
    """Words in lower case without articles and punctuation; numbers by value."""
    return list(_words(text[:MAX_CHARS]))


@lru_cache(maxsize=4096)
def _words(text: str) -> tuple[str, ...]:
    text = unicodedata.normalize("NFC", text.lower().replace("\u2212", "-"))
    found: list[str] = []
    for match in _WORD.finditer(text):
        value = number(match.group().rstrip(".,"))
        word = _DROPPED.sub("", match.group()) if value is None else str(value)
        if word not in _ARTICLES:
            found.append(word)
    return tuple(found)
