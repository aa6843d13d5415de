"""SQuAD's measures on words, but a number keeps its sign and its decimal point.

So 1.5 is not 15 and -3 is not 3, as with the released code, which drops both. As in
HotpotQA's own measure "yes" and "no" get no credit for a part: "yes no" is no answer.
"""

import re
import unicodedata
from collections import Counter
from functools import lru_cache

from rllib_arpo.rewards.quantities import number

MAX_CHARS = 20_000  # no answer is longer; what follows is not read

_ARTICLES = frozenset({"a", "an", "the"})
_ALL_OR_NOTHING = (["yes"], ["no"], ["noanswer"])
# Possessive: a long run of digits must not be tried again from each of its digits.
_NUMBER = r"[-+]?(?:\d[\d,]*+\.?+\d*+|\.\d++)"
# A number on its own, or a word with the dots and apostrophes inside it (U.S.).
_WORD = re.compile(rf"(?<![\w.]){_NUMBER}(?!\.?\w)|\w+(?:[.'\u2019]\w+)*")


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
        word = re.sub("[.'\u2019]", "", match.group()) if value is None else str(value)
        if word not in _ARTICLES:
            found.append(word)
    return tuple(found)
