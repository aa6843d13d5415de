"""Whether an answer is right: by value for mathematics, by tokens for questions.

1. `math_equal`: equal strings and plain numbers are compared here; whatever is left
   goes to math-verify in a worker process that can be killed, because SymPy may run
   for ever and its own timeout needs the main thread.
2. `f1` and `exact_match`: the SQuAD measures, but a number keeps its sign and its
   decimal point, so that 1.5 is not 15 and -3 is not 3.
"""

import re
from collections import Counter
from collections.abc import Sequence
from fractions import Fraction

from rllib_arpo.rewards.math_worker import symbolic_equal

_ARTICLES = frozenset({"a", "an", "the"})
_NUMBER = r"[-+]?(?:\d[\d,]*\.?\d*|\.\d+)"
# A number on its own, or a word with the dots and apostrophes inside it (U.S.).
_WORD = re.compile(rf"(?<![\w.]){_NUMBER}(?!\.?\w)|\w+(?:[.'\u2019]\w+)*")
_PLAIN = re.compile(r"([-+]?)(\d{1,3}(?:,\d{3})+|\d*)(\.\d*)?")
_TEX_FRACTION = re.compile(r"([-+]?)\\[dt]?frac\{?(\d+)\}?\{?(\d+)\}?")
_RATIO = re.compile(r"([-+]?\d+)/(\d+)")


def accuracy(
    answer: str, accepted: Sequence[str], *, ability: str, timeout_s: float = 2.0
) -> float:
    """Best score in [0, 1] over the accepted answers: math 0 or 1, otherwise F1."""
    if ability == "math":
        return float(any(math_equal(answer, gold, timeout_s) for gold in accepted))
    return max(f1(answer, gold) for gold in accepted)


def f1(answer: str, gold: str) -> float:
    """Harmonic mean of precision and recall of the words, in [0, 1]."""
    words, expected = _words(answer), _words(gold)
    if not words or not expected:
        return float(answer.strip() == gold.strip() != "")
    common = (Counter(words) & Counter(expected)).total()
    return 2 * common / (len(words) + len(expected))


def exact_match(answer: str, gold: str) -> bool:
    """Whether the words are the same, in the same order."""
    return _words(answer) == _words(gold)


def math_equal(answer: str, gold: str, timeout_s: float = 2.0) -> bool:
    r"""Whether two answers have the same value: 0.5 = 1/2 = \frac{1}{2}.

    A comparison that takes longer than `timeout_s` seconds counts as unequal.
    """
    left, right = _tidy(answer), _tidy(gold)
    if not left or not right:
        return False
    if left == right:
        return True
    left_value, right_value = _value(left), _value(right)
    if left_value is not None and right_value is not None:
        return left_value == right_value
    return symbolic_equal(answer, gold, timeout_s)


def _words(text: str) -> list[str]:
    words: list[str] = []
    for match in _WORD.finditer(text.lower()):
        value = _value(match.group().rstrip(".,"))
        word = re.sub("[.'\u2019]", "", match.group()) if value is None else str(value)
        if word not in _ARTICLES:
            words.append(word)
    return words


def _tidy(text: str) -> str:
    text = text.strip().strip("$").strip()
    for waste in ("\\left", "\\right", "\\!", "\\,", "\\;", "\\ ", " ", "\\$"):
        text = text.replace(waste, "")
    return text.rstrip(".").removesuffix("\\%").removesuffix("%")


def _value(text: str) -> Fraction | None:
    """Exact value of a plain number or fraction, None for anything else."""
    for pattern in (_TEX_FRACTION, _RATIO):
        match = pattern.fullmatch(text)
        if match is not None:
            *sign, top, bottom = match.groups()
            if int(bottom) == 0:
                return None
            return Fraction(int("".join((*sign, top))), int(bottom))
    match = _PLAIN.fullmatch(text)
    if match is None or not any(c.isdigit() for c in text):
        return None
    sign, whole, decimals = match.groups()
    digits = whole.replace(",", "") or "0"
    return Fraction(f"{sign}{digits}{decimals or ''}")
