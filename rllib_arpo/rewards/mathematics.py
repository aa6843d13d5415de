r"""Whether two mathematical answers are equal, by value.

1. Equal texts, plain numbers, units, number bases, words and labelled choices
   ("C. 20 mph") are compared here, in well under a millisecond.
2. Whatever is left goes to math-verify in a worker process that can be killed,
   because SymPy may run for ever and its own timeout needs the main thread.

math-verify alone takes `seat` for `east` (a product of letters), 52_8 for 52_9,
`5 6` for 11 and (2, 1) for {1, 2}; these never reach it.
"""

import re

from rllib_arpo.rewards.choices import choice, same_choice
from rllib_arpo.rewards.latex import is_balanced, is_simple, tidy
from rllib_arpo.rewards.math_worker import can_parse, symbolic_equal
from rllib_arpo.rewards.quantities import measures, number, same_measure, split_unit

MAX_CHARS = 500  # no final answer is longer; parsing time grows faster than length

# Letters of any script, and ①②③, which name statements in Chinese problems
_PROSE = re.compile(r"(?:[^\W\d_]|[\u2460-\u2473])(?:[^\W\d_]|[\u2460-\u2473' -])*")
_SHORT_WORDS = frozenset({"yes", "no", "odd"})
_COMMAND = re.compile(r"\\(?:begin|end|text|operatorname)\{[^{}]*\}|\\[a-zA-Z]+")
_LONG_WORD = re.compile(r"[a-zA-Z]{4}")
_TWO_NUMBERS = re.compile(r"\d \d")
_BASED = re.compile(r"(\w+)_\{?(\d+)\}?")
_LABELLED = re.compile(r"\(?[A-H]\)?[.:)] *\S.*")
_LETTER = re.compile(r"[A-H]")


def math_equal(answer: str, gold: str, timeout_s: float = 2.0) -> bool:
    r"""Whether two answers have the same value: 0.5 = 1/2 = \frac{1}{2}.

    A comparison that takes longer than `timeout_s` seconds counts as unequal, and so
    does an answer longer than `MAX_CHARS`.
    """
    if max(len(answer), len(gold)) > MAX_CHARS:
        return False
    left, right = tidy(answer), tidy(gold)
    if not left or not right:
        return False
    if left == right:
        return True
    if _is_choice(right) and _is_choice(left):
        return same_choice(left, right)
    option = choice(right) if _LABELLED.fullmatch(right) else None
    if option is not None and option.letters:
        return math_equal(answer, option.text, timeout_s)
    if _is_prose(left) or _is_prose(right):
        return left.casefold() == right.casefold()
    given, expected = measures(left, right)
    same = same_measure(given, expected)
    if same is not None:
        return same
    left, right = given.amount, expected.amount
    bases = _BASED.fullmatch(left), _BASED.fullmatch(right)
    if bases[1] is not None and bases[1][1].isdigit():
        # The base may be left out, for the question names it.
        with_base = bases[0].groups() if bases[0] is not None else (left, bases[1][2])
        return with_base == bases[1].groups()
    if _problem(left) or _problem(right) or _set_and_tuple(left, right):
        return False
    return symbolic_equal(left, right, timeout_s)


def math_problem(answer: str, timeout_s: float = 2.0) -> str | None:
    """Why `math_equal` could not recognise this gold answer, None when it can."""
    if len(answer) > MAX_CHARS:
        return f"longer than {MAX_CHARS} characters"
    text = tidy(answer)
    if not text:
        return "blank"
    if number(text) is not None or _is_choice(text) or _is_prose(text):
        return None
    amount = split_unit(text).amount
    if number(amount) is not None:
        return None
    problem = _problem(amount)
    if problem is None and not is_simple(amount) and not can_parse(amount, timeout_s):
        problem = "math-verify cannot parse it"
    return problem


def _is_choice(text: str) -> bool:
    return _LETTER.fullmatch(text) is not None or _LABELLED.fullmatch(text) is not None


def _is_prose(text: str) -> bool:
    """Words, whose letters are no factors: Evelyn, no solution, yes."""
    return _PROSE.fullmatch(text) is not None and (
        not text.isascii()
        or _LONG_WORD.search(text) is not None
        or text.casefold() in _SHORT_WORDS
    )


def _problem(text: str) -> str | None:
    if not is_balanced(text):
        return "brackets that do not close"
    if _LONG_WORD.search(_COMMAND.sub(" ", text)):
        return "words beside mathematics"
    if _TWO_NUMBERS.search(text):
        return "two numbers side by side"
    return None


def _set_and_tuple(left: str, right: str) -> bool:
    opens = {text[:1] if text[:1] in ("(", "[") else text[:2] for text in (left, right)}
    return "\\{" in opens and bool(opens & {"(", "["}) and len(opens) == 2
