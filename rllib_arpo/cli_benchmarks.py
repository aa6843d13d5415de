"""`rllib-arpo evaluate --benchmark`: answers to files, then files to numbers.

    OUT/predictions/gsm8k.jsonl    answers as they come; a killed run goes on here
    OUT/scores/gsm8k.jsonl         what each is worth, and why
    OUT/results.json               all numbers
    OUT/baseline/                  the same of `--baseline`, when that is a checkpoint

When no answer is missing nothing is started, so repeating the command scores again.
"""

from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from itertools import groupby
from pathlib import Path

import typer

from rllib_arpo.benchmark_work import (
    PREDICTIONS,
    Limits,
    Plan,
    Work,
    open_work,
    read_work,
    refuse_unlike,
)
from rllib_arpo.cli_evaluate import (
    Flags,
    Subject,
    open_subject,
    refuse_model_flags,
    start,
)
from rllib_arpo.cli_runs import started_ray
from rllib_arpo.data.benchmark_files import HubFile
from rllib_arpo.data.benchmarks import (
    CHAT_INSTRUCTIONS,
    TAG_INSTRUCTIONS,
    Benchmark,
    load_benchmark,
    parse_benchmarks,
)
from rllib_arpo.engines.engine import SamplingParams
from rllib_arpo.errors import ConfigError
from rllib_arpo.evaluation import answer_tasks
from rllib_arpo.evaluation_report import (
    Report,
    as_json,
    as_table,
    write_json,
    write_scores,
)
from rllib_arpo.evaluation_scores import (
    Scored,
    Summary,
    compare_scores,
    score_predictions,
    summarize,
)
from rllib_arpo.predictions import fingerprint_of_folder
from rllib_arpo.progress import Console

RESULTS_FILE = "results.json"
INSTRUCTIONS = {"tags": TAG_INSTRUCTIONS, "chat_template": CHAT_INSTRUCTIONS}

Sources = Sequence[tuple[Benchmark, Path | HubFile]]
# By the name of the benchmark.
Works = Mapping[str, Work]
Scores = Mapping[str, Sequence[Scored]]


def evaluate_benchmarks(flags: Flags, given: Collection[str]) -> None:
    """Answer, score, print and write.

    Raises:
        ConfigError: a flag cannot work, or OUT holds answers made otherwise.
        DataError: a benchmark's file is wrong.
    """
    plan = _plan(flags)
    sources = parse_benchmarks(flags.benchmark or "", flags.benchmark_dir)
    subject = open_subject(flags.checkpoint)
    old = flags.baseline
    is_out = old is not None and (old / PREDICTIONS).is_dir()
    other = open_subject(old) if old is not None and not is_out else None
    if subject.run is not None and (other is None or other.run is not None):
        refuse_model_flags(given, subject)
    fingerprint = fingerprint_of_folder(subject.folder)
    name = f"{flags.checkpoint.absolute().name}-{fingerprint[:8]}"
    out = flags.out or Path("runs") / "evaluate" / name
    works = _open(subject, fingerprint, plan, sources, flags, out)
    baseline: Works = {}
    todo = [(subject, works)]
    if other is not None:
        fingerprint = fingerprint_of_folder(other.folder)
        baseline = _open(other, fingerprint, plan, sources, flags, out / "baseline")
        todo.append((other, baseline))
    elif old is not None:
        baseline = {name: read_work(work, old) for name, work in works.items()}
    for name, work in baseline.items():
        refuse_unlike(works[name], work)
    console = Console()
    _answer_all(todo, flags, console, out)
    report = _report(works, baseline, plan, out)
    console.rich.print(as_table(report))
    result = as_json(report)
    for file in (out / RESULTS_FILE, flags.json_file):
        if file is not None:
            write_json(file, result)
    console.say(f"Answers, scores and numbers are in {out}.")


def _plan(flags: Flags) -> Plan:
    try:
        ks = sorted({int(word) for word in flags.k.split(",")})
    except ValueError:
        ks = [0]
    if ks[0] < 1:
        raise ConfigError(f'--k ("{flags.k}") must be whole numbers >= 1, as 1,3,5')
    return Plan(
        ks=ks,
        num_samples=flags.num_samples or ks[-1],
        seeds=range(flags.seed, flags.seed + flags.seeds),
        num_tasks=flags.num_tasks,
    )


def _open(
    subject: Subject,
    fingerprint: str,
    plan: Plan,
    sources: Sources,
    flags: Flags,
    out: Path,
) -> dict[str, Work]:
    dialogue = subject.dialogue or flags.dialogue
    settings = {"dialogue": dialogue}
    if subject.run is None:
        settings |= {"engine": flags.engine, "corpus": str(flags.corpus or "")}
    works: dict[str, Work] = {}
    for benchmark, source in sources:
        usual = benchmark.sampling
        works[benchmark.name] = open_work(
            load_benchmark(benchmark, source, instructions=INSTRUCTIONS[dialogue]),
            plan,
            out,
            checkpoint=subject.folder,
            fingerprint=fingerprint,
            sampling=SamplingParams(
                temperature=usual.temperature
                if flags.temperature is None
                else flags.temperature,
                top_p=flags.top_p or usual.top_p,
            ),
            limits=_limits(subject, flags, benchmark),
            settings=settings,
        )
    return works


def _limits(subject: Subject, flags: Flags, benchmark: Benchmark) -> Limits:
    if subject.run is not None:
        own = subject.run["env_config"]
        return Limits(
            max_response_tokens=own.get("max_response_tokens"),
            max_tool_calls=own.get("max_tool_calls"),
        )
    usual, calls = benchmark.sampling, flags.max_tool_calls
    return Limits(
        max_response_tokens=flags.max_response_tokens or usual.max_response_tokens,
        max_tool_calls=usual.max_tool_calls if calls is None else calls,
    )


def _answer_all(
    todo: Sequence[tuple[Subject, Works]], flags: Flags, console: Console, out: Path
) -> None:
    """Fill the files; Ray runs only if an answer is missing."""
    works = [work for _, of_subject in todo for work in of_subject.values()]
    total = sum(len(work.wanted) for work in works)
    done = total - sum(len(work.missing) for work in works)
    if done == total:
        return
    if done:
        console.say(f"{done} of {total} answers are there already.")
    try:
        with (
            started_ray(max(subject.num_actors(flags) for subject, _ in todo)),
            console.count(total, "answers", done=done) as advance,
        ):
            for subject, of_subject in todo:
                _answer(subject, of_subject, flags, advance)
    except KeyboardInterrupt:
        console.say(
            f"Stopped; the answers are saved in {out}. Repeat the command to go on."
        )
        raise typer.Exit(130) from None


def _answer(
    subject: Subject, works: Works, flags: Flags, advance: Callable[[int], None]
) -> None:
    """One algorithm for all benchmarks whose answers have the same budgets."""
    missing = sorted((work for work in works.values() if work.missing), key=_budgets)
    for _, same in groupby(missing, key=_budgets):
        together = list(same)
        algorithm = start(subject, flags, together[0].limits)
        try:
            for work in together:
                assert work.file is not None
                for predictions in answer_tasks(
                    algorithm,
                    work.missing,
                    sampling=work.sampling,
                    at_once=flags.answers_at_once,
                ):
                    work.file.append(predictions)
                    advance(len(predictions))
        finally:
            algorithm.stop()


def _budgets(work: Work) -> tuple[int, int]:
    limits = work.limits
    return limits.max_response_tokens or 0, limits.max_tool_calls or 0


def _report(works: Works, baseline: Works, plan: Plan, out: Path) -> Report:
    scores, others = _scores(works), _scores(baseline)
    for name, scored in scores.items():
        write_scores(out / "scores" / f"{name}.jsonl", scored)
    return Report(
        headers={name: work.header for name, work in works.items()},
        summaries=_summaries(works, scores, plan),
        baseline_headers={name: work.header for name, work in baseline.items()},
        baseline=_summaries(baseline, others, plan),
        comparisons={
            name: compare_scores(
                scores[name],
                others[name],
                by_f1=works[name].loaded.benchmark.metric == "f1",
            )
            for name in baseline
        },
        num_samples=plan.num_samples,
        seeds=plan.seeds,
    )


def _scores(works: Works) -> dict[str, Sequence[Scored]]:
    return {
        name: score_predictions(work.loaded, work.predictions)
        for name, work in works.items()
    }


def _summaries(works: Works, scores: Scores, plan: Plan) -> dict[str, Summary]:
    summaries: dict[str, Summary] = {}
    for name, scored in scores.items():
        # A baseline of another day may have fewer answers than are asked for here.
        counts = Counter((o.prediction.task_id, o.prediction.seed) for o in scored)
        ks = [k for k in plan.ks if k <= min(counts.values(), default=0)]
        summaries[name] = summarize(works[name].loaded, scored, ks=ks)
    return summaries
