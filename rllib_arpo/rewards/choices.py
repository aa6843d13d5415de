"""Multiple choice: "B", "(B)", "B. Paris", "B: Paris", or the option's text alone."""

import re
from dataclasses import dataclass

from rllib_arpo.rewards.latex import tidy
from rllib_arpo.rewards.quantities import same_number
from rllib_arpo.rewards.words import exact_match, words

_LABEL = re.compile(r"(?:(?:option|choice) )?\(?([A-Za-z])[.:)]{0,2}", re.IGNORECASE)
_LABELLED = re.compile(r"(?:\(([A-Za-z])\)[.:]?|([A-Za-z])[.:)]) *(.+)", re.DOTALL)
_SEVERAL = re.compile(r"[A-J](?:(?:, ?|,? ?and | )?[A-J])+")


@dataclass(frozen=True, slots=True)
class Choice:
    """What was chosen.

    Attributes:
        letters: sorted capitals, empty when only a text was given.
        text: the option's text, empty when only letters were given.
    """

    letters: str
    text: str


def choice(answer: str) -> Choice | None:
    """Read an answer as a choice, None when it is blank."""
    text = tidy(answer.replace("**", ""))
    letters = sorted(re.findall("[A-J]", text))
    if _SEVERAL.fullmatch(text) is not None and len(set(letters)) == len(letters):
        return Choice("".join(letters), "")
    match = _LABEL.fullmatch(text)
    if match is not None:
        return Choice(match[1].upper(), "")
    match = _LABELLED.fullmatch(text)
    if match is not None:
        return Choice((match[1] or match[2]).upper(), match[3])
    return Choice("", text) if words(text) else None


def same_choice(answer: str, gold: str) -> bool:
    """Whether both name the same option.

    The letter decides; when both give a text too, it must not contradict. An answer
    with only a text is right if the gold answer has the same text.
    """
    given, right = choice(answer), choice(gold)
    if given is None or right is None:
        return False
    same_text = same_number(given.text, right.text)
    if same_text is None:
        same_text = exact_match(given.text, right.text)
    if given.letters and right.letters:
        return given.letters == right.letters and (
            same_text or not given.text or not right.text
        )
    return bool(given.text and right.text) and same_text
