import pytest

from rllib_arpo.rewards.choices import same_choice

RIGHT = [
    ("B", "B"),
    ("b", "B"),
    ("(B)", "B"),
    ("B.", "B"),
    ("B)", "B"),
    ("**B**", "B"),
    ("Option B", "B"),
    ("The answer is (B).", "B"),
    (r"\boxed{B}", "B"),
    (r"\text{(B)}", "B"),
    ("B. Paris", "B"),
    ("B: Paris", "(B) Paris"),
    ("B", "B. Paris"),
    ("paris", "B. Paris"),
    ("The Eiffel Tower", "C) Eiffel Tower"),
    ("0.5", "B. 1/2"),
    ("A, C", "AC"),
    ("CA", "A and C"),
    ("Paris", "Paris"),
]
NEAR_MISSES = [
    ("C", "B"),
    ("A", "B"),
    ("(D)", "B"),
    ("C.", "B"),
    ("b", "D"),
    ("8", "B"),
    ("", "B"),
    (" ", "B"),
    ("()", "B"),
    ("not B", "B"),
    ("B or C", "B"),
    ("B, C", "B"),
    ("ABCD", "B"),
    ("A B C D", "B"),
    ("B", "BC"),
    ("A, C", "A, D"),
    ("ABC", "AC"),
    ("any of them", "B"),
    ("A dog", "A"),
    ("BB", "B"),
    ("I think it is B", "B"),
    ("C. Paris", "B. Paris"),
    ("B. London", "B. Paris"),
    ("London", "B. Paris"),
    ("Par", "B. Paris"),
    ("Paris or London", "B. Paris"),
    ("Paris, Texas", "B. Paris"),
    ("B. Paris, Texas", "B. Paris"),
    ("Paris", "B"),
    ("-3", "A. 3"),
    ("1.5", "A. 15"),
    ("15", "C: 1.5"),
    ("A. 1.5", "A. 15"),
    ("12", "B. 1/2"),
    ("True", "B. False"),
    ("no", "A. yes"),
    ("none", "D. all of the above"),
    ("all", "D. all of the above"),
    ("Eiffel", "C) Eiffel Tower"),
    ("E", "Eiffel Tower"),
    ("x", "A"),
]


@pytest.mark.parametrize(("answer", "gold"), RIGHT)
def test_a_choice_is_named_by_its_letter_or_its_text(answer, gold):
    assert same_choice(answer, gold)


@pytest.mark.parametrize(("answer", "gold"), NEAR_MISSES)
def test_near_misses_are_wrong(answer, gold):
    assert not same_choice(answer, gold)
