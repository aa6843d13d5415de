"""Questions that are the same, or that hold a benchmark's question.

Compared are words: lower case, Unicode in its compatible form, no white space. Equal
questions keep their signs (1 + 1 is not 1 - 1). A row that is not equal overlaps with
a benchmark's question when it holds half or more of that question's sequences of 13
words, as in the decontamination of GPT-3 (arXiv:2005.14165, appendix C). One sequence
alone says little: "where m and n are relatively prime positive integers find m n".
"""

import re
import unicodedata
from collections import Counter
from collections.abc import Iterable

from rllib_arpo.tree import Task, question

NGRAM = 13
MIN_SHARE = 0.5

_TOKEN = re.compile(r"\w+|[^\w\s]")


def normalized(text: str) -> str:
    """What two spellings of the same question have in common."""
    folded = unicodedata.normalize("NFKC", text).casefold()
    return " ".join(_TOKEN.findall(folded)).rstrip("?!. ")


class BenchmarkQuestions:
    """The questions of benchmarks, to be looked for in training rows.

    Args:
        tasks: the benchmarks'.
    """

    def __init__(self, tasks: Iterable[Task]) -> None:
        self._ids: list[str] = []
        self._num_grams: list[int] = []
        self._equal: dict[str, int] = {}
        self._holders: dict[int, list[int]] = {}
        for number, task in enumerate(tasks):
            text = normalized(question(task))
            grams = _grams(text)
            self._ids.append(task.task_id)
            self._num_grams.append(len(grams))
            self._equal.setdefault(text, number)
            for gram in grams:
                self._holders.setdefault(gram, []).append(number)

    def find(self, text: str) -> str | None:
        """What of a benchmark is in a normalised question; None if nothing is."""
        equal = self._equal.get(text)
        if equal is not None:
            return f"the question of {self._ids[equal]}"
        held = Counter(
            number for gram in _grams(text) for number in self._holders.get(gram, ())
        )
        shares = ((held[number] / self._num_grams[number], number) for number in held)
        share, number = max(shares, default=(0.0, -1))
        if share < MIN_SHARE:
            return None
        return f"{share:.0%} of the question of {self._ids[number]}, word for word"


def _grams(text: str) -> set[int]:
    """Hashes of the sequences of words; none for a question that is shorter."""
    words = re.findall(r"\w+", text)
    return {
        hash(" ".join(words[first : first + NGRAM]))
        for first in range(len(words) - NGRAM + 1)
    }
