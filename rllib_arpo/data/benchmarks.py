r"""The thirteen benchmarks of the paper: how each is read, asked and scored.

    tasks = load_benchmark("gsm8k", Path("gsm8k.jsonl"))

The files are the user's, as their publishers wrote them; nothing is bundled.

1. QA is scored by F1 as in the paper. Mathematics is compared by value where the paper
   asks a judge: no number of a run then depends on a second model.
2. GAIA, HLE, WebWalkerQA and xbench-DeepSearch want a judge. Without one an answer
   must be the accepted one word for word, which is stricter.
3. Sampling is the paper's: temperature 0.6, top-p 0.95, and the budgets of the
   training of the setting (arXiv:2507.19849, section 4.1 and appendix C.2).
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from rllib_arpo.data.benchmark_files import SUFFIXES, HubFile, read_rows
from rllib_arpo.data.benchmark_readers import (
    Question,
    Reader,
    gaia_question,
    gsm8k_question,
    hle_question,
    math_question,
    qa_question,
    webwalker_question,
    xbench_question,
)
from rllib_arpo.errors import ConfigError, DataError
from rllib_arpo.tree import Message, Task

Metric = Literal["math", "f1", "judge"]

# The system message of the paper's training rows, its `\boxed` put right.
TAG_INSTRUCTIONS = (
    "You are a helpful assistant that can solve the given question step by step with "
    "the help of the wikipedia search tool and python interpreter tool. Given a "
    "question, you need to first think about the reasoning process in the mind and "
    "then provide the answer. During thinking, you can invoke the wikipedia search "
    "tool to search and python interpreter tool to calculate the math problem for fact "
    "information about specific topics if needed. The reasoning process and answer are "
    "enclosed within <think> </think> and <answer> </answer> tags respectively, and "
    "the search query and result are enclosed within <search> </search> and <result> "
    "</result> tags respectively. For example, <think> This is the reasoning process. "
    "</think> <search> search query here </search> <result> search result here "
    "</result> <think> This is the reasoning process. </think> <python> python code "
    "here </python> <result> python interpreter result here </result> <think> This is "
    "the reasoning process. </think> <answer> The final answer is \\[ \\boxed{answer "
    "here} \\] </answer>. In the last part of the answer, the final exact answer is "
    "enclosed within \\boxed{} with latex format."
)
# A chat template tells of the tools by itself.
CHAT_INSTRUCTIONS = (
    "Reason step by step, with the help of the tools if needed, and put the final "
    "answer within \\boxed{}."
)


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingDefaults:
    """How the paper samples in a setting.

    Attributes:
        max_response_tokens: of the model and the tools after the prompt.
        max_tool_calls: per answer.
        max_result_tokens: of one tool result; ours, the released code has no such cap.
        temperature: logits are divided by it.
        top_p: nucleus.
    """

    max_response_tokens: int
    max_tool_calls: int
    max_result_tokens: int
    temperature: float = 0.6
    top_p: float = 0.95


REASONING = SamplingDefaults(
    max_response_tokens=4096, max_tool_calls=3, max_result_tokens=1024
)
DEEP_SEARCH = SamplingDefaults(
    max_response_tokens=8192, max_tool_calls=6, max_result_tokens=1536
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Benchmark:
    """One benchmark.

    Attributes:
        name: in flags, and of its file.
        title: in tables.
        read: a row's question.
        metric: "math", by value; "f1" of the words; "judge", where one is configured.
        sampling: the paper's.
        hub: where the Hugging Face Hub has it.
        aliases: other names of its file.
    """

    name: str
    title: str
    read: Reader
    metric: Metric
    sampling: SamplingDefaults
    hub: HubFile
    aliases: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchmarkTasks:
    """The tasks of a benchmark's file.

    Attributes:
        benchmark: which.
        tasks: at least one, in the order of the rows.
        skipped: why rows were left out -> how many.
    """

    benchmark: Benchmark
    tasks: Sequence[Task]
    skipped: Mapping[str, int]


def _hub(repo: str, config: str | None = None, split: str = "test") -> HubFile:
    return HubFile(repo=repo, config=config, split=split)


def _math(name: str, title: str, hub: HubFile, *aliases: str) -> Benchmark:
    return Benchmark(
        name=name,
        title=title,
        read=math_question,
        metric="math",
        sampling=REASONING,
        hub=hub,
        aliases=aliases,
    )


def _qa(name: str, title: str, subset: str, split: str, *aliases: str) -> Benchmark:
    return Benchmark(
        name=name,
        title=title,
        read=qa_question,
        metric="f1",
        sampling=REASONING,
        hub=_hub("RUC-NLPIR/FlashRAG_datasets", subset, split),
        aliases=aliases,
    )


def _deep(
    name: str, title: str, read: Reader, hub: HubFile, *aliases: str
) -> Benchmark:
    return Benchmark(
        name=name,
        title=title,
        read=read,
        metric="judge",
        sampling=DEEP_SEARCH,
        hub=hub,
        aliases=aliases,
    )


BENCHMARKS: Mapping[str, Benchmark] = {
    benchmark.name: benchmark
    for benchmark in (
        _math("aime24", "AIME24", _hub("HuggingFaceH4/aime_2024", split="train")),
        _math("aime25", "AIME25", _hub("math-ai/aime25")),
        _math("math500", "MATH500", _hub("HuggingFaceH4/MATH-500"), "math-500"),
        Benchmark(
            name="gsm8k",
            title="GSM8K",
            read=gsm8k_question,
            metric="math",
            sampling=REASONING,
            hub=_hub("openai/gsm8k", "main"),
        ),
        _math("math", "MATH", _hub("DigitalLearningGmbH/MATH-lighteval")),
        _deep(
            "webwalkerqa",
            "WebWalkerQA",
            webwalker_question,
            _hub("callanwu/WebWalkerQA", split="main"),
            "webwalker",
        ),
        _qa("hotpotqa", "HotpotQA", "hotpotqa", "dev", "hotpot"),
        _qa("2wiki", "2WikiMultihopQA", "2wikimultihopqa", "dev", "2wikimultihopqa"),
        _qa("musique", "MuSiQue", "musique", "dev"),
        _qa("bamboogle", "Bamboogle", "bamboogle", "test"),
        _deep(
            "gaia",
            "GAIA",
            gaia_question,
            _hub("gaia-benchmark/GAIA", "2023_all", "validation"),
        ),
        _deep("hle", "HLE", hle_question, _hub("cais/hle")),
        _deep(
            "xbench",
            "xbench-DeepSearch",
            xbench_question,
            _hub("xbench/DeepSearch", split="train"),
            "xbench-deepsearch",
            "deepsearch",
        ),
    )
}


def find_benchmark(name: str) -> Benchmark:
    """The benchmark of a name or alias, in any case.

    Raises:
        ConfigError: there is none.
    """
    wanted = name.strip().lower()
    for benchmark in BENCHMARKS.values():
        if wanted in (benchmark.name, *benchmark.aliases):
            return benchmark
    raise ConfigError(
        f'there is no benchmark "{name}": take one of {", ".join(BENCHMARKS)}'
    )


def parse_benchmarks(
    words: str, folder: Path | None = None
) -> list[tuple[Benchmark, Path | HubFile]]:
    """What "gsm8k,hotpotqa=rows.jsonl,hle=owner/name:config:split" asks for.

    Args:
        words: names with commas between; after `=` a file, or a data set of the
            Hugging Face Hub.
        folder: holds a file for each name without `=`; without it such a name is
            looked up in the Hub, where its publisher has it.

    Raises:
        ConfigError: a name or file is unknown, or a benchmark is named twice.
    """
    found: dict[str, tuple[Benchmark, Path | HubFile]] = {}
    for word in filter(None, (word.strip() for word in words.split(","))):
        name, equals, place = word.partition("=")
        benchmark = find_benchmark(name)
        if benchmark.name in found:
            raise ConfigError(f'benchmark "{benchmark.name}" is named twice')
        if equals:
            source = _source(benchmark, place.strip())
        else:
            source = benchmark.hub if folder is None else _file(benchmark, folder)
        found[benchmark.name] = (benchmark, source)
    if not found:
        raise ConfigError(
            f"no benchmark is named: take some of {', '.join(BENCHMARKS)}"
        )
    return list(found.values())


def load_benchmark(
    benchmark: Benchmark | str,
    source: Path | HubFile,
    *,
    instructions: str = TAG_INSTRUCTIONS,
) -> BenchmarkTasks:
    """Read all tasks of a benchmark.

    Args:
        benchmark: one of `BENCHMARKS`, or its name.
        source: a .jsonl, .json, .parquet or .csv file, or a data set of the Hub.
        instructions: system message; `TAG_INSTRUCTIONS` for the dialogue of tags,
            `CHAT_INSTRUCTIONS` for a chat template.

    Raises:
        ConfigError: there is no such benchmark, or the Hub cannot be asked.
        DataError: the file cannot be read, a row is wrong, or no row is left.
    """
    if isinstance(benchmark, str):
        benchmark = find_benchmark(benchmark)
    tasks: list[Task] = []
    skipped: Counter[str] = Counter()
    for row in read_rows(source):
        question = benchmark.read(row)
        if isinstance(question, str):
            skipped[question] += 1
        else:
            tasks.append(_task(benchmark, row.number, question, instructions))
    if not tasks:
        reasons = ", ".join(f"{n} {reason}" for reason, n in skipped.items())
        raise DataError(
            f"{source} holds no {benchmark.title} task ({reasons or 'it is empty'})"
        )
    return BenchmarkTasks(benchmark=benchmark, tasks=tasks, skipped=dict(skipped))


def _task(
    benchmark: Benchmark, number: int, question: Question, instructions: str
) -> Task:
    return Task(
        task_id=f"{benchmark.name}/{number}",
        messages=(
            Message(role="system", content=instructions),
            Message(role="user", content=question.text),
        ),
        answers=question.answers,
        ability=question.ability,
        source=benchmark.name,
        metadata={
            "question": question.text,
            "group": question.group,
            **question.metadata,
        },
    )


def _source(benchmark: Benchmark, place: str) -> Path | HubFile:
    if Path(place).is_file():
        return Path(place)
    repo, *rest = place.split(":")
    names = repo.split("/")
    if Path(place).suffix in SUFFIXES or len(names) != 2 or not all(names):
        raise ConfigError(
            f"{benchmark.name}={place}: there is no such file, and it is no data set "
            "of the Hugging Face Hub (owner/name[:config[:split]])"
        )
    config, split = [*rest, "", ""][:2]
    return HubFile(
        repo=repo,
        config=config or None,
        split=split or benchmark.hub.split,
    )


def _file(benchmark: Benchmark, folder: Path) -> Path:
    if not folder.is_dir():
        raise ConfigError(f"there is no folder {folder}")
    names = (benchmark.name, *benchmark.aliases)
    wanted = {f"{name}{suffix}" for name in names for suffix in SUFFIXES}
    found = [file for file in folder.iterdir() if file.name.lower() in wanted]
    if len(found) != 1:
        held = ", ".join(sorted(file.name for file in found)) or "none"
        raise ConfigError(
            f"{folder} must hold one file {benchmark.name}{'|'.join(SUFFIXES)}, and "
            f"holds {held}: or give the file as {benchmark.name}=PATH"
        )
    return found[0]
