"""`rllib-arpo evaluate`: what it is given, and what is evaluated.

A checkpoint is a Hugging Face folder, whose tools and limits are flags, or a run's, who
brings its own. With `--benchmark` the work is done in `cli_benchmarks`, otherwise here.
"""

import json
import pickle
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rllib_arpo.arpo import ARPO
from rllib_arpo.benchmark_work import Limits
from rllib_arpo.cli_config import config_of_flags, find_checkpoint, is_model_folder
from rllib_arpo.cli_runs import num_actors, restore, started_ray
from rllib_arpo.config import ARPOConfig
from rllib_arpo.data.sources import resolve_tasks
from rllib_arpo.envs.chat_dialogue import ChatTemplateDialogue
from rllib_arpo.errors import ConfigError
from rllib_arpo.evaluation import evaluate
from rllib_arpo.progress import Console

# What a run brings with it.
MODEL_FLAGS = (
    "corpus",
    "max_response_tokens",
    "max_tool_calls",
    "engine",
    "num_env_runners",
    "dialogue",
)
BENCHMARK_FLAGS = ("benchmark_dir", "k", "seeds", "out", "baseline", "answers_at_once")
DIALOGUES = ("tags", "chat_template")
TEMPERATURE = 1.0
TOP_P = 1.0
MAX_RESPONSE_TOKENS = 1024
MAX_TOOL_CALLS = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class Flags:
    """The words of the command; None where it has none and the default depends."""

    checkpoint: Path
    data: Path | None
    benchmark: str | None
    benchmark_dir: Path | None
    num_tasks: int | None
    k: str
    num_samples: int | None
    seed: int
    seeds: int
    temperature: float | None
    top_p: float | None
    max_response_tokens: int | None
    max_tool_calls: int | None
    corpus: Path | None
    dialogue: str
    engine: str
    num_env_runners: int
    out: Path | None
    baseline: Path | None
    answers_at_once: int
    json_file: Path | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Subject:
    """What is evaluated.

    Attributes:
        folder: of a Hugging Face model, or a whole checkpoint.
        run: settings of the checkpoint's algorithm, None for a model.
    """

    folder: Path
    run: Mapping[str, Any] | None

    @property
    def dialogue(self) -> str | None:
        """How a run talks to its model: one of `DIALOGUES`; None for a model."""
        if self.run is None:
            return None
        chosen = self.run["env_config"].get("dialogue", "tags")
        if isinstance(chosen, ChatTemplateDialogue):
            return "chat_template"
        kind = chosen.get("type") if isinstance(chosen, Mapping) else chosen
        return "chat_template" if kind == "chat_template" else "tags"

    def num_actors(self, flags: Flags) -> int:
        """Actors that its algorithm starts."""
        return flags.num_env_runners if self.run is None else num_actors(self.run)


def evaluate_command(flags: Flags, given: Collection[str]) -> None:
    """Do what the command says.

    Args:
        flags: all of them.
        given: names of those that stand on the command line.

    Raises:
        ConfigError: a flag cannot work or has no effect, or there is no checkpoint.
        DataError: a row is wrong.
    """
    if flags.dialogue not in DIALOGUES:
        raise ConfigError(f'--dialogue ("{flags.dialogue}") must be one of {DIALOGUES}')
    if flags.benchmark is not None:
        from rllib_arpo.cli_benchmarks import evaluate_benchmarks

        refuse(given, ("data",), "--benchmark")
        evaluate_benchmarks(flags, given)
        return
    refuse(given, BENCHMARK_FLAGS, "no --benchmark")
    # A wrong row must not cost the start of Ray and a model.
    data = flags.data
    tasks = resolve_tasks(str(data), setting="--data") if data is not None else None
    subject = open_subject(flags.checkpoint)
    if subject.run is not None:
        refuse_model_flags(given, subject)
    num_samples = flags.num_samples or 1
    limits = Limits(
        max_response_tokens=flags.max_response_tokens,
        max_tool_calls=flags.max_tool_calls,
    )
    with started_ray(subject.num_actors(flags)):
        algorithm = start(subject, flags, limits)
        try:
            tasks = tasks or algorithm.eval_tasks
            if not tasks:
                raise ConfigError(
                    f"{flags.checkpoint} has no tasks of its own: give some with --data"
                )
            result = evaluate(
                algorithm,
                tasks[: flags.num_tasks],
                temperature=_or(flags.temperature, TEMPERATURE),
                top_p=_or(flags.top_p, TOP_P),
                num_samples=num_samples,
                seed=flags.seed,
            )
        finally:
            algorithm.stop()
    title = f"{len(result.trees)} tasks, {num_samples} answers each"
    Console().table(title, result.metrics)
    if flags.json_file is not None:
        text = json.dumps(dict(result.metrics), indent=2)
        flags.json_file.write_text(text + "\n")


def open_subject(folder: Path) -> Subject:
    """The model or checkpoint of a folder.

    Raises:
        ConfigError: it holds neither.
        CheckpointError: the checkpoint is not whole.
    """
    if is_model_folder(folder):
        return Subject(folder=folder.absolute(), run=None)
    checkpoint = find_checkpoint(folder)
    with (checkpoint / "class_and_ctor_args.pkl").open("rb") as file:
        (settings,), _ = pickle.load(file)["ctor_args_and_kwargs"]
    return Subject(folder=checkpoint, run=settings)


def start(subject: Subject, flags: Flags, limits: Limits) -> ARPO:
    """The algorithm that answers for a subject; Ray is running.

    Args:
        subject: what is evaluated.
        flags: say what a model does not.
        limits: budgets of an answer of a model; a run has its own.

    Raises:
        ConfigError: a flag cannot work.
    """
    if subject.run is not None:
        return restore(subject.folder)
    return _config(subject, flags, limits).build_algo()


def refuse(given: Collection[str], names: Collection[str], source: str) -> None:
    """Refuse flags that would have no effect beside `source`.

    Raises:
        ConfigError: one of `names` is given.
    """
    for name in names:
        if name in given:
            flag = f"--{name.replace('_', '-')}"
            raise ConfigError(f"{flag} has no effect with {source}: leave it out")


def refuse_model_flags(given: Collection[str], subject: Subject) -> None:
    """Refuse what only a Hugging Face folder takes.

    Raises:
        ConfigError: it is given.
    """
    refuse(
        given,
        MODEL_FLAGS,
        f"{subject.folder}, a checkpoint that brings its own settings",
    )


def _config(subject: Subject, flags: Flags, limits: Limits) -> ARPOConfig:
    config = config_of_flags(
        data=None,
        model=str(subject.folder),
        corpus=flags.corpus,
        max_response_tokens=limits.max_response_tokens or MAX_RESPONSE_TOKENS,
        max_tool_calls=_or(limits.max_tool_calls, MAX_TOOL_CALLS),
        engine=flags.engine,
        num_env_runners=flags.num_env_runners,
        seed=flags.seed,
    )
    return config.environment(env_config={"dialogue": flags.dialogue})


def _or(value: Any, default: Any) -> Any:
    return default if value is None else value
