r"""From a row of a public file to a question: one reader for each way of publishing.

    math        a problem and an answer, or a solution that ends in \boxed{}
    gsm8k       a worked solution whose last line is "#### 18"
    qa          a question and accepted answers: a list, or a list as text
    gaia, hle   rows that need a file or an image are skipped
    xbench      encrypted, so that crawlers do not find it

A reader returns a `Question`, or a text that says why the row is skipped.
"""

import ast
import base64
import binascii
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, cast

from rllib_arpo.data.benchmark_files import BenchmarkRow

GSM8K_MARK = "####"
NO_PUBLIC_ANSWER = "?"


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """What a row asks.

    Attributes:
        text: the question.
        answers: accepted answers, at least one.
        ability: the answer check.
        group: part of the benchmark that it belongs to, "" for none.
        metadata: more that tools or readers may want.
    """

    text: str
    answers: tuple[str, ...]
    ability: str
    group: str = ""
    metadata: Mapping[str, Any] = field(default_factory=dict)


Reader = Callable[[BenchmarkRow], Question | str]


def math_question(row: BenchmarkRow) -> Question | str:
    r"""AIME, MATH500, MATH: `answer`, or what the solution's last `\boxed{}` holds."""
    if any(row.fields.get(name) not in (None, "") for name in ("answer", "expected")):
        answer = row.text("answer", "expected")
    else:
        solution = row.text("solution")
        boxed = last_boxed(solution)
        if not boxed:
            raise row.error("solution", r"holds no \boxed{}, and there is no `answer`")
        answer = boxed
    return Question(
        text=row.text("problem", "question", "prompt"),
        answers=(answer,),
        ability="math",
        group=_optional(row, "level"),
    )


def gsm8k_question(row: BenchmarkRow) -> Question | str:
    """The number after "####", without its thousands' commas."""
    solution = row.text("answer", "solution")
    _, mark, answer = solution.rpartition(GSM8K_MARK)
    if not mark or not answer.strip():
        raise row.error("answer", f"no answer after {GSM8K_MARK!r}")
    return Question(
        text=row.text("question", "problem"),
        answers=(answer.strip().replace(",", ""),),
        ability="math",
    )


def qa_question(row: BenchmarkRow) -> Question | str:
    """HotpotQA, 2WikiMultihopQA, MuSiQue, Bamboogle; aliases are accepted too."""
    if row.fields.get("answerable") in (False, "false", "False"):
        return "cannot be answered"
    column, given = row.first("golden_answers", "answer", "answers")
    answers = [*_listed(row, column, given)]
    aliases = row.fields.get("answer_aliases") or []
    answers += [one for one in _listed(row, "answer_aliases", aliases)]
    return Question(
        text=row.text("question"),
        answers=tuple(dict.fromkeys(answers)),
        ability="qa",
    )


def webwalker_question(row: BenchmarkRow) -> Question | str:
    """WebWalkerQA: the question alone; where to start is metadata."""
    info = row.fields.get("info")
    if isinstance(info, str):
        info = json.loads(info) if info.startswith("{") else {}
    info = {str(k).lower(): v for k, v in (info or {}).items()}
    return Question(
        text=row.text("question"),
        answers=(row.text("answer"),),
        ability="qa",
        group=str(info.get("difficulty_level") or "").lower(),
        metadata={"root_url": _optional(row, "root_url")},
    )


def gaia_question(row: BenchmarkRow) -> Question | str:
    """GAIA: those of the validation set that need no file (103 in the paper)."""
    if _optional(row, "file_name"):
        return "needs a file"
    answer = row.text("final_answer", "answer")
    if answer == NO_PUBLIC_ANSWER:
        return "has no public answer"
    return Question(
        text=row.text("question"),
        answers=(answer,),
        ability="exact",
        group=_optional(row, "level"),
    )


def hle_question(row: BenchmarkRow) -> Question | str:
    """Humanity's Last Exam: those without an image."""
    if row.fields.get("image"):
        return "needs an image"
    multiple = _optional(row, "answer_type") == "multipleChoice"
    return Question(
        text=row.text("question", "problem"),
        answers=(row.text("answer"),),
        ability="choice" if multiple else "exact",
        group=_optional(row, "category"),
    )


def xbench_question(row: BenchmarkRow) -> Question | str:
    """xbench-DeepSearch: question and answer are decrypted if there is a `canary`."""
    question, answer = row.text("prompt", "question"), row.text("answer")
    key = row.fields.get("canary")
    if isinstance(key, str) and key:
        question, answer = (
            _decrypted(row, column, text, key)
            for column, text in (("prompt", question), ("answer", answer))
        )
    return Question(text=question, answers=(answer,), ability="exact")


def last_boxed(text: str) -> str | None:
    r"""Content of the last `\boxed` of a solution, None without one.

    As `boxed` of a dialogue, but for `\fbox` and the `\boxed 2` of older solutions.
    """
    start = max(text.rfind("\\boxed"), text.rfind("\\fbox"))
    if start < 0:
        return None
    rest = text[start:].removeprefix("\\boxed").removeprefix("\\fbox")
    if not rest.startswith("{"):
        words = rest.partition("$")[0].split()
        return words[0] if words else None
    depth = 0
    for position, character in enumerate(rest):
        depth += (character == "{") - (character == "}")
        if depth == 0:
            return rest[1:position].strip()
    return None


def xor_decrypted(text: str, key: str) -> str:
    """Base64, then every byte xor a byte of the key, which is repeated.

    Raises:
        ValueError: it is no base64, or what comes out is no text.
    """
    data, repeated = base64.b64decode(text, validate=True), key.encode()
    size = len(repeated)
    plain = bytes(byte ^ repeated[i % size] for i, byte in enumerate(data))
    return plain.decode()


def _decrypted(row: BenchmarkRow, column: str, text: str, key: str) -> str:
    try:
        return xor_decrypted(text, key).strip()
    except (binascii.Error, ValueError) as error:
        problem = f"cannot be decrypted with the row's `canary`: {error}"
        raise row.error(column, problem) from error


def _optional(row: BenchmarkRow, column: str) -> str:
    value = row.fields.get(column)
    return "" if value is None else str(value).strip()


def _listed(row: BenchmarkRow, column: str, given: object) -> list[str]:
    if isinstance(given, str) and given.lstrip().startswith("["):
        try:
            given = ast.literal_eval(given.strip())
        except (ValueError, SyntaxError) as error:
            raise row.error(column, f"is no list: {given!r:.80}") from error
    listed = cast(list[object], given) if isinstance(given, list) else [given]
    answers: list[str] = []
    for one in listed:
        if isinstance(one, bool) or not isinstance(one, str | int | float):
            raise row.error(column, f"expected text, got {one!r:.80}")
        if str(one).strip():
            answers.append(str(one).strip())
    if listed and not answers:
        raise row.error(column, "every accepted answer is blank")
    return answers
