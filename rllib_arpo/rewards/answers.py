"""Whether an answer is right, by the check of its task's ability.

    math      by value: 0.5 = 1/2, -3 is not 3           mathematics.py
    qa        F1 of the words, in [0, 1]                  words.py
    exact     all words the same, in the same order       words.py
    numeric   a number within a tolerance                 quantities.py
    choice    the letter of an option, or its text        choices.py

All but "math" take time linear in the answer, which is cut at a length; "math" has a
time limit that holds in any thread (math_worker.py).
"""

import re
from collections.abc import Sequence
from fractions import Fraction

from rllib_arpo.errors import DataError
from rllib_arpo.rewards.choices import choice, same_choice
from rllib_arpo.rewards.latex import tidy
from rllib_arpo.rewards.mathematics import MAX_CHARS, math_equal, math_problem
from rllib_arpo.rewards.quantities import Measure, number, ratios, split_unit
from rllib_arpo.rewards.words import exact_match, f1, words

ABILITIES = ("math", "qa", "exact", "numeric", "choice")

_ABOUT = re.compile(r"^(?:about|approximately|around|\\approx|[a-zA-Z]\w* ?=) *")


def accuracy(
    answer: str,
    accepted: Sequence[str],
    *,
    ability: str,
    timeout_s: float = 2.0,
    rel_tol: float = 1e-6,
    abs_tol: float = 0.0,
) -> float:
    """Best score in [0, 1] over the accepted answers; only "qa" gives parts of 1.

    Args:
        answer: what the model answered.
        accepted: the accepted answers, at least one.
        ability: one of `ABILITIES`.
        timeout_s: seconds for one comparison of "math"; a longer one is unequal.
        rel_tol: for "numeric", |answer - gold| <= max(rel_tol·|gold|, abs_tol).
        abs_tol: see `rel_tol`.

    Raises:
        DataError: there is no such ability.
    """
    if ability == "qa":
        return max(f1(answer, gold) for gold in accepted)
    if ability == "math":
        return float(any(math_equal(answer, gold, timeout_s) for gold in accepted))
    if ability == "exact":
        return float(any(exact_match(answer, gold) for gold in accepted))
    if ability == "choice":
        return float(any(same_choice(answer, gold) for gold in accepted))
    if ability == "numeric":
        return float(
            any(close(answer, g, rel_tol=rel_tol, abs_tol=abs_tol) for g in accepted)
        )
    raise DataError(
        f"ability {ability!r} has no answer check; known are {list(ABILITIES)}. Map "
        "the column to one of these, or pass a `reward_fn` of your own."
    )


def close(answer: str, gold: str, *, rel_tol: float, abs_tol: float) -> bool:
    """Whether two numbers, with or without units, differ by at most a tolerance.

    |answer - gold| <= max(rel_tol·|gold|, abs_tol). Known units are converted, units
    of different kinds are unequal, and an answer with two numbers is none.
    """
    given, expected = _measure(answer), _measure(gold)
    value, target = number(given.amount), number(expected.amount)
    if value is None or target is None:
        return False
    allowed = max(Fraction(rel_tol) * abs(target), Fraction(abs_tol))
    return any(
        abs(value * ratio - target) <= allowed
        for ratio in ratios(given.unit, expected.unit)
    )


def parses(answer: str, ability: str) -> bool:
    """Whether the check of an ability can understand a gold answer."""
    return problem(answer, ability) is None


def problem(answer: str, ability: str) -> str | None:
    """Why the check of an ability cannot understand a gold answer, None if it can.

    Most answers take microseconds; "math" asks a worker for what is no plain number,
    some ten milliseconds.
    """
    if ability == "math":
        return math_problem(answer)
    if ability == "numeric":
        known = number(_measure(answer).amount) is not None
        return None if known else "not a number"
    if ability == "choice":
        return None if choice(answer) is not None else "neither a letter nor a text"
    if ability in ("qa", "exact"):
        # A flag or ∞ is no word, and yet an answer.
        is_sign = not answer.isspace() and not answer.isascii()
        return None if words(answer) or is_sign else "no word in it"
    return f"ability {ability!r} has no answer check; known are {list(ABILITIES)}"


def _measure(text: str) -> Measure:
    if len(text) > MAX_CHARS:
        return Measure("")
    text = _ABOUT.sub("", tidy(text), count=1)
    return split_unit(text, words=True, letters=True)
