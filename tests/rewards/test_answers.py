import functools

import pytest

from rllib_arpo.errors import DataError
from rllib_arpo.rewards.answers import ABILITIES, accuracy, close, parses, problem

CLOSE = [
    ("3.14", "3.14159", 1e-3, 0.0),
    ("100", "101", 0.01, 0.0),
    ("0.33", "1/3", 0.0, 0.01),
    ("0", "0.004", 0.0, 0.005),
    ("1.2e3", "1200", 0.0, 0.0),
    (r"1.2 \times 10^{3}", "1,200", 0.0, 0.0),
    ("about 5 km", "5000 m", 0.0, 0.0),
    ("≈ 5", "5", 0.0, 0.0),
    ("x = 5", "5", 0.0, 0.0),
    ("5 people", "5", 0.0, 0.0),
    ("50%", "0.5", 0.0, 0.0),
    ("$1,234.50", "1234.5", 0.0, 0.0),
    ("3 million", "3000000", 0.0, 0.0),
    ("-2.5", "-5/2", 0.0, 0.0),
]
NEAR_MISSES = [
    ("3.13", "3.14159", 1e-3, 0.0),
    ("102", "100", 0.01, 0.0),
    ("98.9", "100", 0.01, 0.0),
    ("0.35", "1/3", 0.0, 0.01),
    ("0.001", "0", 0.5, 0.0),  # a share of nothing
    ("0.006", "0", 0.0, 0.005),
    ("1.5", "15", 1e-6, 0.0),
    ("15", "1.5", 1e-6, 0.0),
    ("-3", "3", 1e-6, 0.0),
    ("3", "-3", 1e-6, 0.0),
    ("12", "1/2", 1e-6, 0.0),
    ("1", "1,000", 1e-6, 0.0),
    ("1e3", "100", 1e-6, 0.0),
    ("1e-3", "1e3", 1e-6, 0.0),
    ("1.2e4", "1200", 1e-6, 0.0),
    ("5 m", "5 km", 1e-6, 0.0),
    ("5 m", "5 s", 1e-6, 0.0),
    ("5 m", "5 m^2", 1e-6, 0.0),
    ("5 km", "5 kg", 1e-6, 0.0),
    ("5 cents", "$5", 1e-6, 0.0),
    ("5%", "0.5", 1e-6, 0.0),
    ("5%", "50", 1e-6, 0.0),
    ("3 million", "3", 1e-6, 0.0),
    ("3 million", "3 billion", 1e-6, 0.0),
    ("5 or 6", "5", 1e-6, 0.0),
    ("5, 6", "5", 1e-6, 0.0),
    ("5 6", "5", 1e-6, 0.0),
    ("5-6", "5", 1e-6, 0.0),
    ("4 to 6", "5", 10.0, 0.0),
    ("not 5", "5", 1e-6, 0.0),
    ("5?6", "5", 1e-6, 0.0),
    ("five", "5", 1e-6, 0.0),
    ("nan", "5", 1e-6, 0.0),
    ("inf", "5", 1e-6, 0.0),
    ("1/0", "0", 1e-6, 0.0),
    ("1e999", "5", 1e-6, 0.0),
    ("9" * 5000, "5", 1e-6, 0.0),
    ("", "5", 1e-6, 0.0),
    ("", "", 1e-6, 0.0),
    ("2019", "2020", 1e-6, 0.0),
    ("1.0000011", "1", 1e-6, 0.0),
]
GOLD = [
    # ability, understood, not understood
    ("math", r"\frac{1}{2}", "PICK_AMONG_CHOICES"),
    ("qa", "Soha Ali Khan", " ?! "),
    ("qa", "🇵🇰", "\u00a0"),
    ("exact", "42", ""),
    ("choice", "(B)", "..."),
    ("choice", "Paris", " "),
    ("numeric", "$3.50", "three"),
    ("numeric", "5 km", "5 or 6"),
]


@pytest.mark.parametrize(("answer", "gold", "rel_tol", "abs_tol"), CLOSE)
def test_numbers_within_the_tolerance_are_right(answer, gold, rel_tol, abs_tol):
    assert close(answer, gold, rel_tol=rel_tol, abs_tol=abs_tol)


@pytest.mark.parametrize(("answer", "gold", "rel_tol", "abs_tol"), NEAR_MISSES)
def test_near_misses_of_a_number_are_wrong(answer, gold, rel_tol, abs_tol):
    assert not close(answer, gold, rel_tol=rel_tol, abs_tol=abs_tol)


def test_the_ability_chooses_the_check():
    score = functools.partial(accuracy, "The B.", ["B"])
    assert [score(ability=ability) for ability in ("qa", "exact")] == [1.0, 1.0]
    assert accuracy("x", ["X"], ability="choice") == 1.0
    assert accuracy("x+1", ["1+x"], ability="math", timeout_s=20.0) == 1.0
    assert accuracy("x+1", ["1+x"], ability="exact") == 0.0
    assert accuracy("1.1", ["1"], ability="numeric") == 0.0
    assert accuracy("1.1", ["1"], ability="numeric", rel_tol=0.2) == 1.0


def test_the_best_over_the_accepted_answers_counts():
    accepted = ("New York City", "NYC")
    assert accuracy("nyc", accepted, ability="qa") == 1.0
    # "New York" against "New York City": precision 1, recall 2/3 -> 0.8
    assert accuracy("New York", accepted, ability="qa") == pytest.approx(0.8)
    assert accuracy("New York", accepted, ability="exact") == 0.0
    assert accuracy("0.5", ("2", "1/2"), ability="math") == 1.0
    assert accuracy("12", ("1/2",), ability="math") == 0.0
    assert accuracy("7", ("5", "7"), ability="numeric") == 1.0
    assert accuracy("c", ("B", "C"), ability="choice") == 1.0


def test_an_unknown_ability_is_refused_and_the_known_ones_are_named():
    with pytest.raises(DataError, match=r"'code'.*math.*choice"):
        accuracy("5", ["5"], ability="code")
    assert not parses("5", "code")


@pytest.mark.parametrize(("ability", "understood", "other"), GOLD)
def test_gold_answers_are_understood_or_not_by_their_check(ability, understood, other):
    assert parses(understood, ability)
    assert problem(understood, ability) is None
    assert not parses(other, ability)
    assert problem(other, ability)


@pytest.mark.parametrize("ability", ABILITIES)
def test_a_flood_of_text_is_wrong_for_every_check(ability):
    for piece in ("1", "1,", "(", "A, ", "\\frac{", "{1", " ", "$", "\\text{ a"):
        assert accuracy(piece * 20_000 + "a", ["5"], ability=ability) == 0.0
