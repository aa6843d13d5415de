"""`rllib-arpo evaluate --benchmark`: answers to files, then files to numbers.

    OUT/predictions/gsm8k.jsonl    answers as they come; a killed run goes on here
    OUT/scores/gsm8k.jsonl         what each is worth, and why
    OUT/verdicts.sqlite            what the judge said, so that it is asked once
    OUT/results.json               all numbers
    OUT/baseline/                  the same of `--baseline`, when that is a checkpoint
    OUT/lock                       held by the process that evaluates here

When no answer is missing nothing is started, so repeating the command scores again.
"""

import os
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import astuple, dataclass, fields
from itertools import groupby
from pathlib import Path
from typing import Any

import typer

from rllib_arpo.benchmark_work import (
    PREDICTIONS,
    Limits,
    Plan,
    Work,
    open_work,
    read_work,
)
from rllib_arpo.cli_evaluate import BenchmarkFlags, Flags, ModelFlags
from rllib_arpo.cli_evaluation import (
    Subject,
    config_of,
    limits_of,
    open_subject,
    refuse_model_flags,
    start,
)
from rllib_arpo.cli_options import refuse
from rllib_arpo.cli_runs import NOTHING_WRITTEN, started_ray
from rllib_arpo.config import ARPOConfig
from rllib_arpo.data.benchmark_files import HubFile
from rllib_arpo.data.benchmarks import (
    CHAT_INSTRUCTIONS,
    TAG_INSTRUCTIONS,
    Benchmark,
    SamplingDefaults,
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
from rllib_arpo.predictions import differences, fingerprint_of_folder
from rllib_arpo.progress import Console
from rllib_arpo.rewards.judge import Judge
from rllib_arpo.run_lock import only_here
from rllib_arpo.tools.cache import ToolCache

RESULTS_FILE = "results.json"
VERDICTS_FILE = "verdicts.sqlite"
INSTRUCTIONS = {"tags": TAG_INSTRUCTIONS, "chat_template": CHAT_INSTRUCTIONS}

Sources = Sequence[tuple[Benchmark, Path | HubFile]]
# By the name of the benchmark.
Works = Mapping[str, Work]
Scores = Mapping[str, Sequence[Scored]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """Benchmarks that one algorithm answers; `config` is None for a run's own."""

    subject: Subject
    config: ARPOConfig | None
    works: Sequence[Work]


def evaluate_benchmarks(flags: Flags, given: Collection[str]) -> None:
    """Answer, score, print and write.

    Args:
        flags: all of them.
        given: names of those on the command line.

    Raises:
        ConfigError: a flag cannot work, OUT holds answers made otherwise, or another
            process evaluates there.
        DataError: a benchmark's file is wrong.
    """
    own = flags.of_benchmarks
    plan = _plan(flags)
    sources = parse_benchmarks(flags.benchmark or "", own.benchmark_dir)
    _check_judge(own, sources, given)
    subject, other = open_subject(flags.checkpoint), _other_checkpoint(own.baseline)
    if subject.run is not None and (other is None or other.run is not None):
        refuse_model_flags(given, subject)
    fingerprint = fingerprint_of_folder(subject.folder)
    out = own.out or _usual_out(flags.checkpoint, fingerprint)
    with only_here(out, does="evaluates"):
        works = _open(subject, fingerprint, plan, sources, flags, out)
        baseline: Works = {}
        todo = [(subject, works)]
        if other is not None:
            fingerprint = fingerprint_of_folder(other.folder)
            baseline = _open(other, fingerprint, plan, sources, flags, out / "baseline")
            todo.append((other, baseline))
        elif own.baseline is not None:
            baseline = {
                name: read_work(work, own.baseline) for name, work in works.items()
            }
        console = Console()
        for name, work in baseline.items():
            _tell_differences(works[name], work, console)
        _answer_all(todo, flags, console, out)
        _tell_nothing_written(works, console)
        with _judge(own, out) as judge:
            report = _report(works, baseline, plan, out, judge)
        console.rich.print(as_table(report))
        result = as_json(report)
        for file in (out / RESULTS_FILE, flags.json_file):
            if file is not None:
                write_json(file, result)
        console.say(f"Answers, scores and numbers are in {out}.")


def _plan(flags: Flags) -> Plan:
    own = flags.of_benchmarks
    try:
        ks = sorted({int(word) for word in own.k.split(",")})
    except ValueError:
        ks = [0]
    if ks[0] < 1:
        raise ConfigError(f'--k ("{own.k}") must be whole numbers >= 1, as 1,3,5')
    return Plan(
        ks=ks,
        num_samples=flags.num_samples or ks[-1],
        seeds=range(flags.seed, flags.seed + own.seeds),
        num_tasks=flags.num_tasks,
    )


def _check_judge(own: BenchmarkFlags, sources: Sources, given: Collection[str]) -> None:
    """Before any answer is made: it would be found after the last one."""
    if own.judge is None:
        refuse(given, ("judge_url", "judge_key"), "no --judge")
        return
    if all(benchmark.metric != "judge" for benchmark, _ in sources):
        names = ",".join(benchmark.name for benchmark, _ in sources)
        refuse(given, ("judge",), f"{names}, which are scored by rule")
    if own.judge_key and own.judge_key not in os.environ:
        raise ConfigError(
            f"the environment holds no {own.judge_key}, the judge's key: set it, name "
            'another with --judge-key, or give --judge-key "" if it wants none'
        )


@contextmanager
def _judge(own: BenchmarkFlags, out: Path) -> Iterator[Judge | None]:
    if own.judge is None:
        yield None
        return
    with Judge(
        own.judge,
        base_url=own.judge_url,
        api_key_env=own.judge_key or None,
        cache=ToolCache(out / VERDICTS_FILE),
    ) as judge:
        yield judge


def _other_checkpoint(baseline: Path | None) -> Subject | None:
    """That of `--baseline`; None without one, or when its answers are there."""
    if baseline is None or (baseline / PREDICTIONS).is_dir():
        return None
    return open_subject(baseline)


def _usual_out(checkpoint: Path, fingerprint: str) -> Path:
    name = f"{checkpoint.absolute().name}-{fingerprint[:8]}"
    return Path("runs") / "evaluate" / name


def _tell_differences(work: Work, baseline: Work, console: Console) -> None:
    here, there = work.header, baseline.header
    # A run does not say what a model's flags do.
    unsaid = here.settings.keys() ^ there.settings.keys()
    unlike = differences(here, there, besides={"model", *unsaid})
    if unlike:
        name = work.loaded.benchmark.title
        console.say(f"{name}: of the baseline and here differ {', '.join(unlike)}.")


def _open(
    subject: Subject,
    fingerprint: str,
    plan: Plan,
    sources: Sources,
    flags: Flags,
    out: Path,
) -> dict[str, Work]:
    dialogue = subject.dialogue or flags.of_model.dialogue
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
            limits=_limits(subject, flags, usual),
            settings={"dialogue": dialogue, **_tools(subject, flags.of_model)},
        )
    return works


def _limits(subject: Subject, flags: Flags, usual: SamplingDefaults) -> Limits:
    names = [field.name for field in fields(Limits)]
    if subject.run is not None:
        own = subject.run["env_config"]
        return Limits(**{name: own.get(name) for name in names})
    return limits_of(flags, Limits(**{name: getattr(usual, name) for name in names}))


def _tools(subject: Subject, own: ModelFlags) -> dict[str, Any]:
    """What else answers of a model depend on; a run's fingerprint covers its own."""
    if subject.run is not None:
        return {}
    return {
        "engine": own.engine,
        "corpus": None if own.corpus is None else str(own.corpus.absolute()),
        "search": own.search,
        "search_endpoint": own.search_endpoint,
        "browse": own.browse,
        "python": own.python,
    }


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
    jobs = [job for subject, own in todo for job in _jobs(subject, own, flags)]
    at_once = flags.of_benchmarks.answers_at_once
    try:
        with (
            started_ray(max(subject.num_actors(flags) for subject, _ in todo)),
            console.count(total, "answers", done=done) as advance,
        ):
            for job in jobs:
                _answer(job, at_once, advance)
    except KeyboardInterrupt:
        console.say(
            f"Stopped; the answers are saved in {out}. Repeat the command to go on."
        )
        raise typer.Exit(130) from None


def _jobs(subject: Subject, works: Works, flags: Flags) -> Iterator[Job]:
    """One algorithm for all benchmarks whose answers have the same budgets."""
    missing = sorted((work for work in works.values() if work.missing), key=_budgets)
    for _, same in groupby(missing, key=_budgets):
        together = list(same)
        config = config_of(subject, flags, together[0].limits)
        yield Job(subject=subject, config=config, works=together)


def _answer(job: Job, at_once: int, advance: Callable[[int], None]) -> None:
    algorithm = start(job.subject, job.config)
    try:
        for work in job.works:
            assert work.file is not None
            for predictions in answer_tasks(
                algorithm, work.missing, sampling=work.sampling, at_once=at_once
            ):
                work.file.append(predictions)
                advance(len(predictions))
    finally:
        algorithm.stop()


def _budgets(work: Work) -> tuple[int, ...]:
    return tuple(limit or 0 for limit in astuple(work.limits))


def _report(
    works: Works, baseline: Works, plan: Plan, out: Path, judge: Judge | None
) -> Report:
    scores, others = _scores(works, judge), _scores(baseline, judge)
    for name, scored in scores.items():
        write_scores(out / "scores" / f"{name}.jsonl", scored)
    return Report(
        headers={name: work.header for name, work in works.items()},
        summaries=_summaries(works, scores, plan, judged=judge is not None),
        baseline_headers={name: work.header for name, work in baseline.items()},
        baseline=_summaries(baseline, others, plan, judged=judge is not None),
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
        judge=judge,
    )


def _tell_nothing_written(works: Works, console: Console) -> None:
    written = (p.num_model_tokens for w in works.values() for p in w.predictions)
    if not any(written):
        console.say(NOTHING_WRITTEN)


def _scores(works: Works, judge: Judge | None) -> dict[str, Sequence[Scored]]:
    return {
        name: score_predictions(work.loaded, work.predictions, judge=judge)
        for name, work in works.items()
    }


def _summaries(
    works: Works, scores: Scores, plan: Plan, *, judged: bool
) -> dict[str, Summary]:
    summaries: dict[str, Summary] = {}
    for name, scored in scores.items():
        # A baseline of another day may have fewer answers than are asked for here.
        counts = Counter((o.prediction.task_id, o.prediction.seed) for o in scored)
        ks = [k for k in plan.ks if k <= min(counts.values(), default=0)]
        summaries[name] = summarize(works[name].loaded, scored, ks=ks, judged=judged)
    return summaries
