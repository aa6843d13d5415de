r"""Whether two mathematical answers are equal, by value.

1. Equal texts, plain numbers, units, number bases, words and labelled choices
   ("C. 20 mph") are compared here, in well under a millisecond.
2. A gold answer that is a plain number is answered by a number as one writes it
   down, which the question's own expression is not: 48+24 is wrong for 72.
3. Whatever is left goes to math-verify in a worker process that can be killed,
   because SymPy may run for ever and its own timeout needs the main thread.

math-verify alone takes `seat` for `east` (a product of letters), 52_8 for 52_9,
`5 6` for 11 and (2, 1) for {1, 2}; these never reach it.
"""

import re
from fractions import Fraction

from rllib_arpo.rewards.choices import choice, same_choice
from rllib_arpo.rewards.latex import is_balanced, is_simple, tidy
from rllib_arpo.rewards.math_worker import can_parse, symbolic_equal
from rllib_arpo.rewards.quantities import (
    UNITS,
    Measure,
    measures,
    number,
    same_measure,
    split_unit,
)

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

# x= · x_{1}= · P(A)= · a+b= · \angle ABC= ; no digits but as index and argument
_NAME = re.compile(
    r"(?=[^=]*[a-zA-Z])(?:[a-zA-Z\\{}|' +-]|_\w|_\{\w+\}|\([^()=]*\))+=[ ]?"
)
# (18) · {18}, but not the one of 5(18) or \frac{18}
_LONE_BRACKETS = re.compile(r"(?<![\w\\)}\]])[({]([-+]?[\d.,]+)[)}]")
_BRACKETS = re.compile(r"([-+]?)(?:[(\[]|\\?\{)(.+?)(?:[)\]]|\\?\})")
_WHOLE = r"\d{1,3}(?:,\d{3})+|\d+"
_QUOTIENT = re.compile(
    rf"(?P<sign>[-+]?)(?:\\frac\{{(?P<top>[-+]?(?:{_WHOLE}))\}}"
    rf"\{{(?P<bottom>[-+]?(?:{_WHOLE}))\}}"
    rf"|(?P<top2>{_WHOLE})(?:[/:]| ?\\div ?)(?P<bottom2>[-+]?(?:{_WHOLE})))"
)
_POWER_OF_TEN = re.compile(r"([-+]?)10\^\{?([-+]?\d{1,2})\}?")


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
    if number(split_unit(right).amount) is not None:
        return _same_number(left, right)
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


def _same_number(answer: str, gold: str) -> bool:
    """Whether an answer is a number as one writes it down, and equals the gold one.

    It may have a name (x=5), a unit and brackets. A percentage is also the share that
    it means, but no count: 50% is 0.5, and 1800% is not 18.
    """
    name = _NAME.match(answer)
    if name is not None:
        if _problem(name[0]) is not None:
            return False
        answer = answer[name.end() :]
    if not is_balanced(answer):
        return False
    given, expected = measures(_plain(answer), gold)
    if given.unit is None:  # 18^\circ\text{F} has two
        given = split_unit(given.amount)
    value = number(expected.amount)
    is_count = value is not None and value.denominator == 1 and abs(value) > 1
    if is_count and expected.unit is None and given.unit == UNITS["percent"]:
        given = Measure(given.amount)
    return same_measure(Measure(_plain(given.amount), given.unit), expected) is True


def _plain(text: str) -> str:
    r"""A written number as `number` reads it; other texts keep what they say.

    Without brackets, 1{,}000 as 1,000, 10^{3} as 1e3, 18_{10} as 18, and 1:2, (1)/(2)
    or \frac{1}{-2} as a fraction.
    """
    text = _LONE_BRACKETS.sub(r"\1", text.replace("{,}", ","))
    inner = _BRACKETS.fullmatch(text)
    if inner is not None:
        text = inner[1] + inner[2]
    text = re.sub(r"(?<=\d)_(?:10|\{10\})$", "", text)
    power = _POWER_OF_TEN.fullmatch(text)
    if power is not None:
        return f"{power[1]}1e{power[2]}"
    match = _QUOTIENT.fullmatch(text)
    if match is None or number(text) is not None:
        return text
    top, bottom = (
        int((match[name] or match[name + "2"]).replace(",", ""))
        for name in ("top", "bottom")
    )
    if bottom == 0:
        return text
    value = Fraction(top, bottom)
    return str(-value if match["sign"] == "-" else value)


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
