import pytest
from hypothesis import given
from hypothesis import strategies as st

from rllib_arpo.rewards.words import exact_match, f1

SCORES = [
    ("The Eiffel Tower", "eiffel tower", 1.0),
    ("20 June 1837", "June 20, 1837", 1.0),
    ("1.0", "1", 1.0),
    ("1,000 people", "1000 people", 1.0),
    ("U.S.", "US", 1.0),
    ("don't", "dont", 1.0),
    ("Spiderman", "Spider-Man", 1.0),
    ("ACDC", "AC/DC", 1.0),
    ("coop", "co-op", 1.0),
    ("USA", "U.S.-A", 1.0),
    ("Paris-Roubaix", "Paris\u2013Roubaix", 1.0),
    ("Covid19", "Covid-19", 1.0),
    ("snake_case", "snakecase", 1.0),
    ("1.5-litre engine", "1.5litre engine", 1.0),
    ("1,000-km", "1000km", 1.0),
    ("1837-1838", "1837 1838", 1.0),
    ("1837-1838", "1837/1838", 1.0),
    ("the Spider-Man", "Spider Man", 0.0),  # as SQuAD: spiderman is one word
    ("Anglo-Saxon king", "Saxon king", 0.5),  # the king alone: 1/2 and 1/2
    ("∞", "∞", 1.0),
    ("Almeri\u0301a", "Almería", 1.0),  # an accent as a character of its own
    ("\u22123", "-3", 1.0),
    ("Vienna", "Vienna, Austria", 2 / 3),  # precision 1, recall 1/2
    ("in Vienna in Austria", "Vienna, Austria", 2 / 3),  # 2/4 and 2/2
    ("1.5 m", "15 m", 0.5),  # only the m is shared: 1/2 and 1/2
    ("New York", "New York City", 0.8),  # 2/2 and 2/3
]
NEAR_MISSES = [
    ("Paris", "Vienna"),
    ("1.5", "15"),
    ("-3", "3"),
    ("1/2", "12"),
    ("1-2", "12"),
    ("12:30", "1230"),
    ("v1.5", "v15"),
    ("1.5m", "15m"),
    ("1,2,3", "123"),
    ("-5", "5"),
    ("1837", "1838"),
    ("1,837", "1.837"),
    ("10", "1"),
    ("2.5.1", "2.5"),  # a version is no number
    ("yes no", "yes"),
    ("no", "yes"),
    ("yes", "no"),
    ("not yes", "yes"),
    ("yes, both are magazines", "yes"),
    ("no answer", "no"),
    ("the", "Vienna"),
    ("the", " "),
    ("", "Vienna"),
    ("", ""),
    ("?", "!"),
    ("Vienn", "Vienna"),
    ("Viennese", "Vienna"),
    ("Einstein", "Einsteins"),
    ("1939", "1940"),
    ("five", "5"),
    ("Todorovic", "Todorović"),
]
PARTS = [
    ("1837 or 1838", "1837"),
    ("Paris Vienna Rome Berlin", "Vienna"),
    ("20 June 1838", "20 June 1837"),
    ("James Monroe", "James Madison"),
    ("New York City", "New York"),
    ("not Frank Lowy", "Frank Lowy"),
    ("1.59 m", "1.95 m"),
    ("31 employees", "31,000 employees"),
    ("Titan III", "Titan IIIE"),
    ("Titan", "Titan IIIE"),
    ("Prince Edward", "Edward Fortunatus"),
    ("the daughter of Frank Lowy", "Frank Lowy"),
    ("Washington, Oregon", "Washington, D.C."),
    ("Crystal Dynamics and Eidos", "Crystal Dynamics"),
    ("High Courses", "High Courses for Scriptwriters"),
]


@pytest.mark.parametrize(("answer", "gold", "value"), SCORES)
def test_f1_of_the_words(answer, gold, value):
    assert f1(answer, gold) == pytest.approx(value)


@pytest.mark.parametrize(("answer", "gold"), NEAR_MISSES)
def test_near_misses_score_nothing(answer, gold):
    assert f1(answer, gold) == 0.0
    assert not exact_match(answer, gold)


@pytest.mark.parametrize(("answer", "gold"), PARTS)
def test_a_part_of_the_answer_scores_below_1_and_is_no_exact_match(answer, gold):
    assert 0.0 < f1(answer, gold) < 1.0
    assert not exact_match(answer, gold)


def test_exact_match_ignores_case_articles_and_punctuation_but_not_the_order():
    assert exact_match("The U.S.!", "us")
    assert not exact_match("Bloggs Joe", "Joe Bloggs")


@given(st.text(max_size=30), st.text(max_size=30))
def test_f1_lies_between_0_and_1_and_is_symmetric(left, right):
    assert 0 <= f1(left, right) <= 1
    assert f1(left, right) == f1(right, left)


@given(st.integers(-(10**6), 10**6), st.integers(-(10**6), 10**6))
def test_whole_numbers_are_equal_only_to_themselves(left, right):
    assert exact_match(str(left), str(right)) == (left == right)
    assert f1(str(left), str(right)) == float(left == right)


@pytest.mark.parametrize(
    "flood", ["1" * 10**4 + "a", "a." * 10**5, "1," * 10**5, "1-" * 10**5]
)
def test_a_flood_of_text_is_wrong(flood):
    assert f1(flood, "5") == 0.0
    assert not exact_match(flood, "5")
