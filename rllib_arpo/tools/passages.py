"""The parts of a long text that matter for a question: BM25 over its own passages.

No model, no state: the same text and question always give the same passages. Chinese
and Japanese, written without spaces, are compared by pairs of characters.
"""

import math
import re
from collections.abc import Callable, Iterator
from typing import NamedTuple

import bm25s
import numpy as np

PASSAGE_TOKENS = 120
GAP = "[...]"
_IDEOGRAPHS = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
_WORD = re.compile(rf"[{_IDEOGRAPHS}]+|[^\W{_IDEOGRAPHS}]+")
_SENTENCE = re.compile(r"(?<=[.!?])\s+|(?<=[\u3002\uff01\uff1f])")


class Excerpt(NamedTuple):
    """The passages that were kept.

    Attributes:
        text: in the order of the page, `GAP` between what did not follow directly.
        num_passages: how many were kept.
        num_in_all: how many there are.
    """

    text: str
    num_passages: int
    num_in_all: int


def estimate_tokens(text: str) -> int:
    """Roughly how many tokens a model's tokenizer makes of a text, seldom too few.

    Four ASCII letters a token; digits and all other characters one each.
    """
    num_letters = sum(c.isascii() and not c.isdigit() for c in text)
    return math.ceil(num_letters / 4) + len(text) - num_letters


def excerpt(
    text: str,
    question: str,
    *,
    max_tokens: int,
    count_tokens: Callable[[str], int] = estimate_tokens,
) -> Excerpt:
    """The passages that share most with a question, as many as fit.

    Without a word in common, they are the first ones of the text.

    Args:
        text: one paragraph a line.
        question: what is looked for.
        max_tokens: of the excerpt.
        count_tokens: counts those of a text.
    """
    # At least three fit, or one page's longest paragraph would be all of it.
    passage_tokens = max(min(PASSAGE_TOKENS, max_tokens // 3), 1)
    passages = split_passages(text, passage_tokens, count_tokens)
    gap_tokens = count_tokens(f"\n{GAP}\n")
    kept: list[int] = []
    num_tokens = 0
    for index in _ranked(passages, question):
        needed = count_tokens(passages[index]) + gap_tokens
        if kept and num_tokens + needed > max_tokens:
            break
        kept.append(index)
        num_tokens += needed
    lines: list[str] = []
    last = -1
    for index in sorted(kept):
        if index != last + 1:
            lines.append(GAP)
        lines.append(passages[index])
        last = index
    if last + 1 < len(passages):
        lines.append(GAP)
    return Excerpt("\n".join(lines), len(kept), len(passages))


def split_passages(
    text: str,
    max_tokens: int,
    count_tokens: Callable[[str], int] = estimate_tokens,
) -> list[str]:
    """Neighbouring paragraphs, cut at sentences where they are longer than a passage.

    Args:
        text: one paragraph a line.
        max_tokens: of a passage.
        count_tokens: counts those of a text.
    """
    passages: list[list[str]] = []
    room = 0
    for piece in _pieces(text, max_tokens, count_tokens):
        needed = count_tokens(piece) + 1  # and the end of its line
        if needed > room:
            passages.append([])
            room = max_tokens + 1
        passages[-1].append(piece)
        room -= needed
    return ["\n".join(pieces) for pieces in passages]


def _pieces(
    text: str, max_tokens: int, count_tokens: Callable[[str], int]
) -> Iterator[str]:
    """Paragraphs, and sentences or bare cuts of those that are too long."""
    for paragraph in text.splitlines():
        if not paragraph.strip():
            continue
        if count_tokens(paragraph) <= max_tokens:
            yield paragraph.rstrip()
            continue
        for sentence in _SENTENCE.split(paragraph):
            # Hardly a character is more than a token.
            fits = count_tokens(sentence) <= max_tokens
            step = max(len(sentence), 1) if fits else max_tokens
            for start in range(0, len(sentence), step):
                piece = sentence[start : start + step].strip()
                if piece:
                    yield piece


def _ranked(passages: list[str], question: str) -> list[int]:
    """Passages with a word of the question, best first; all in order if there are none.

    What is equally good comes in the order of the page.
    """
    words = [_words(passage) for passage in passages]
    in_order = list(range(len(passages)))
    if not any(words):
        return in_order
    index = bm25s.BM25()
    index.index(words, show_progress=False)
    wanted = [word for word in _words(question) if word in index.vocab_dict]
    if not wanted:
        return in_order
    scores = index.get_scores(wanted)
    order = np.argsort(-scores, kind="stable")
    return [int(i) for i in order if scores[i] > 0]


def _words(text: str) -> list[str]:
    words: list[str] = []
    for word in _WORD.findall(text.lower()):
        if re.match(rf"[{_IDEOGRAPHS}]", word) and len(word) > 2:
            words += (word[i : i + 2] for i in range(len(word) - 1))
        else:
            words.append(word)
    return words
