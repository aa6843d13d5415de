r"""Plain numbers and units, read exactly and without SymPy.

`number` reads 1,000 · -.5 · 3/4 · \frac34 · 1\frac45 · 3 1/2 · 1.2e-3 · 1.2\times10^{5}
as fractions; whatever else is no plain number. `split_unit` takes a unit off the end
(or a currency off the front). Units are compared only when both sides have one that
is known: "5" answers "5 cm", and so does "0.05 m", but "5 m" does not.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

MAX_DIGITS = 100  # longer ones are no answer, and int() refuses 4300

_WHOLE = r"(?:\d{1,3}(?:,\d{3})+|\d{1,3}(?: \d{3})+|\d+)"
_DECIMAL = rf"(?:{_WHOLE}(?:\.\d*)?|\.\d+)"
_TEX_FRACTION = (
    r"\\frac ?(?:\{ ?(?P<top>[-+]?\d+) ?\}|(?P<top1>\d)) ?"
    r"(?:\{ ?(?P<bottom>\d+) ?\}|(?P<bottom1>\d))"
)
_DECIMAL_FORM = re.compile(rf"([-+]?) ?({_DECIMAL})")
_FRACTION_FORM = re.compile(
    rf"(?P<sign>[-+]?) ?(?:(?P<whole>\d+) ?)?{_TEX_FRACTION}"
    r"|(?P<sign2>[-+]?) ?(?:(?P<whole2>\d+) )?(?P<top2>\d+) ?/ ?(?P<bottom2>\d+)"
)
_SCIENTIFIC_FORM = re.compile(
    rf"([-+]?{_DECIMAL})(?:[eE]| ?(?:\\times|\\cdot|\*|x) ?10 ?\^)"
    r" ?\{?([-+]?\d{1,2})\}?"
)


def number(text: str) -> Fraction | None:
    """Exact value of a plain number (in tidy form), None for anything else."""
    if len(text) > MAX_DIGITS:
        return None
    match = _DECIMAL_FORM.fullmatch(text)
    if match is not None:
        return Fraction(match[1] + re.sub("[, ]", "", match[2]))
    match = _SCIENTIFIC_FORM.fullmatch(text)
    if match is not None:
        return Fraction(re.sub("[, ]", "", match[1])) * Fraction(10) ** int(match[2])
    match = _FRACTION_FORM.fullmatch(text)
    if match is None:
        return None
    part = {
        name.rstrip("12"): value for name, value in match.groupdict().items() if value
    }
    if int(part["bottom"]) == 0:
        return None
    whole = int(part.get("whole", "0"))
    value = whole + Fraction(int(part["top"]), int(part["bottom"]))
    return -value if part.get("sign") == "-" else value


def same_number(left: str, right: str) -> bool | None:
    """Whether two plain numbers are equal, None unless both are plain numbers.

    A decimal of six or more places also equals the fraction that it abbreviates:
    0.333333 = 1/3, but 0.333 is not.
    """
    first, second = number(left), number(right)
    if first is None or second is None:
        return None
    return (
        first == second
        or _abbreviates(left, first, second)
        or _abbreviates(right, second, first)
    )


def _abbreviates(text: str, value: Fraction, exact: Fraction) -> bool:
    places = len(text.partition(".")[2])
    if places < 6 or not text[-places:].isdigit():
        return False
    repeats = exact.denominator
    for factor in (2, 5):
        while repeats % factor == 0:
            repeats //= factor
    return repeats > 1 and abs(value - exact) < Fraction(1, 10**places)


@dataclass(frozen=True, slots=True)
class Unit:
    """A known unit: `factor` of the dimension's base unit."""

    dimension: str
    factor: Fraction


def _units(dimension: str, **names: str) -> dict[str, Unit]:
    return {
        name: Unit(dimension, Fraction(factor))
        for factor_names, factor in names.items()
        for name in factor_names.split("_")
    }


UNITS: dict[str, Unit] = {
    **_units(
        "length",
        mm_millimeter_millimetre="1/1000",
        cm_centimeter_centimetre="1/100",
        dm_decimeter_decimetre="1/10",
        m_meter_metre="1",
        km_kilometer_kilometre="1000",
        in_inch_inche="0.0254",
        ft_foot_feet="0.3048",
        yd_yard="0.9144",
        mi_mile="1609.344",
    ),
    **_units("mass", mg_milligram="1/1000", g_gram="1", kg_kilogram="1000"),
    **_units("weight", oz_ounce="1/16", lb="1"),
    **_units("volume", ml_milliliter_millilitre="1/1000", l_liter_litre="1"),
    **_units(
        "time",
        s_sec_second="1",
        min_minute="60",
        h_hr_hour="3600",
        day="86400",
        week="604800",
    ),
    **_units("year", month="1/12", year="1"),
    **_units("angle", degree="1"),
    **_units("radian", rad_radian="1"),
    **_units("dollar", cent="1/100", dollar="1"),
    **_units("euro", euro="1"),
    **_units("sterling", pound="1"),
    **_units("percent", percent="1/100"),
}
_SIGNS = {"%": "percent", "^\\circ": "degree"}
_SCALES = {
    "hundred": 100,
    "thousand": 10**3,
    "million": 10**6,
    "billion": 10**9,
    "trillion": 10**12,
}
_NO_UNITS = frozenset({"or", "and", "to", "if", "mod", "not", "than"})
_NAME = r"[a-zA-Z]+(?:[ .][a-zA-Z]+)*\.?"
# 5\text{ cm}^{2} · 5 cm² · 5 square inches · 50% · 90^\circ · 12\pi cm
_TRAILING = re.compile(
    rf"(?P<rest>.*?[^\s\\]) ?(?:\\text\{{ ?(?P<text>{_NAME}) ?(?:\^\{{?[23]\}}?)?\}}"
    rf"|(?:(?<=[\d}}.]) ?|(?<=\w) )(?P<plain>{_NAME})|(?P<sign>%|\^\\circ(?: ?C)?))"
    r"(?P<power>\^\{?[23]\}?)?"
)
_LEADING = re.compile(r"(?P<sign>-?)(?:\\\$|(?P<currency>€|£)) ?(?P<rest>.*)")
# No other text, and more than a variable: "n\text{ even}" has no unit.
_ENDS_AMOUNT = re.compile(r"(?!.*\\text).*(?:\d|\\pi).*")


@dataclass(frozen=True, slots=True)
class Measure:
    """An answer in two parts.

    Attributes:
        amount: the text without its unit.
        unit: None when it has none, or one that is not known.
    """

    amount: str
    unit: Unit | None = None


def split_unit(text: str, *, words: bool = False, letters: bool = False) -> Measure:
    r"""Take the unit off an answer in tidy form.

    "2k" and "5m" are products, so a plain word is a unit only when it is a known one
    of two letters or more, or has four letters or more and follows a plain number.

    Args:
        text: the answer.
        words: whether any word after a plain number is a unit.
        letters: whether a known unit of one letter is one.
    """
    match = _LEADING.fullmatch(text)
    if match is not None:
        currencies = {None: UNITS["dollar"], "€": UNITS["euro"], "£": UNITS["pound"]}
        amount = split_unit(match["rest"], words=words, letters=letters).amount
        return Measure(match["sign"] + amount, currencies[match["currency"]])
    match = _TRAILING.fullmatch(text)
    if match is None:
        return Measure(text)
    if match["sign"] is not None:
        return Measure(match["rest"], UNITS[_SIGNS[match["sign"].rstrip("C ")]])
    names = (match["text"] or match["plain"]).lower().replace(".", " ").split()
    amount, value = match["rest"], number(match["rest"])
    if names[0] in _SCALES and value is not None:
        amount = str(value * _SCALES[names.pop(0)])
    if not names:
        return Measure(amount)
    if not _NO_UNITS.isdisjoint(names):
        return Measure(text)
    unit = _unit(names, (match["power"] or "").strip("^{}"))
    name = " ".join(names)
    if match["text"] is not None:
        is_unit = unit is not None or _ENDS_AMOUNT.fullmatch(amount) is not None
    elif unit is None:
        is_unit = value is not None and (words or len(name) >= 4)
    else:
        is_unit = words or letters or len(name) > 1
    return Measure(amount, unit) if is_unit else Measure(text)


def _unit(names: list[str], power: str) -> Unit | None:
    for word, value in (("square", "2"), ("sq", "2"), ("cubic", "3"), ("cu", "3")):
        if names[0] == word and len(names) > 1:
            names, power = names[1:], value
    if len(names) > 1:
        return None
    unit = UNITS.get(names[0]) or UNITS.get(names[0].removesuffix("s"))
    if unit is None or not power:
        return unit
    return Unit(f"{unit.dimension}^{power}", unit.factor ** int(power))


def measures(left: str, right: str) -> tuple[Measure, Measure]:
    """Split two answers; "5 m" has a unit when the other one has."""
    first, second = split_unit(left), split_unit(right)
    if first.unit is None and second.unit is not None:
        first = split_unit(left, letters=True)
    elif second.unit is None and first.unit is not None:
        second = split_unit(right, letters=True)
    return first, second


def same_measure(left: Measure, right: Measure) -> bool | None:
    """Whether two measures are equal.

    Returns:
        None when that is for others to decide: the units agree, or one is missing,
        but the amounts are no plain numbers.
    """
    factors = ratios(left.unit, right.unit)
    if 1 in factors:
        same = same_number(left.amount, right.amount)
        if same is not False:
            return same
    first, second = number(left.amount), number(right.amount)
    if first is None or second is None:
        return False
    return any(first * factor == second for factor in factors)


def ratios(left: Unit | None, right: Unit | None) -> Sequence[Fraction]:
    """Second amount / first amount of equal measures; none if they differ in kind."""
    percent = UNITS["percent"]
    if left is not None and right is not None:
        return [left.factor / right.factor] if left.dimension == right.dimension else []
    # 50% may be written 50 or 0.5
    if left == percent:
        return [Fraction(1), percent.factor]
    return [Fraction(1), 1 / percent.factor] if right == percent else [Fraction(1)]
