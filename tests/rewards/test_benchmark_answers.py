"""Gold answers of public benchmarks are right against themselves."""

import ast
import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from rllib_arpo.rewards.answers import accuracy, parses

FOLDER = Path(__file__).parents[3] / "shared" / "data" / "benchmarks"
MATHEMATICS = ("aime24", "gsm8k", "math500")
# Answers of each kind that these files hold.
SAMPLES = {
    "aime24": ["204", "025", "33"],
    "gsm8k": ["#### 18", "4*5=20\n#### 1,080", "#### -3", "#### 0.5"],
    "math500": [
        r"\left( 3, \frac{\pi}{2} \right)",
        r"\text{Evelyn}",
        r"90^\circ",
        "x=5",
        "1,-2",
        "52_8",
        r"11\sqrt2",
        r"\begin{pmatrix} -1/3 \\ 2/3 \\ 5/3 \end{pmatrix}",
        r"(0,9) \cup (9,36)",
        r"11,\! 111,\! 111,\! 100",
        r"864 \mbox{ inches}^2",
        r"\{1\pm\sqrt{5},-2\}",
        r"\$18.90",
        r"137 \frac{1}{2}",
        r"5x - 7y + 11z + 4 = 0",
        r"\text{(C)}",
    ],
    "hotpotqa": ["['1.95 m']", "['yes']", ["Frank Lowy"]],
    "2wiki": [["Washington, D.C.", "D.C."], ["Bernard-Roger, Count of Bigorre"]],
    "bamboogle": [["james madison"], "['20 June 1837', '1837']"],
}


def accepted(name: str, answer: object) -> list[str]:
    """As the benchmark's own scorer reads the field."""
    if name == "gsm8k":
        return [str(answer).rpartition("####")[2].strip()]
    if isinstance(answer, list):
        return [str(one) for one in answer]
    text = str(answer)
    return (
        ast.literal_eval(text)
        if text.startswith("[") and name not in (MATHEMATICS)
        else [text]
    )


def wrong(name: str, answers: Iterator[object]) -> list[str]:
    ability = "math" if name in MATHEMATICS else "qa"
    return [
        one
        for answer in answers
        for one in accepted(name, answer)
        if accuracy(one, accepted(name, answer), ability=ability) != 1.0
        or accuracy(one, [one], ability=ability) != 1.0
        or not parses(one, ability)
    ]


@pytest.mark.parametrize("name", SAMPLES)
def test_answers_of_each_kind_are_right_against_themselves(name):
    assert wrong(name, iter(SAMPLES[name])) == []


@pytest.mark.parametrize("name", SAMPLES)
def test_all_gold_answers_are_right_against_themselves(name):
    file = FOLDER / f"{name}.jsonl"
    if not file.exists():
        pytest.skip(f"{file} is not there: the data are not part of a clone")
    lines = file.read_text().splitlines()
    assert wrong(name, (json.loads(line)["answer"] for line in lines)) == []
    assert len(lines) > 20
