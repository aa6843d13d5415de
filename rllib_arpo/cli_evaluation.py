"""`rllib-arpo evaluate`: what is evaluated, and on rows of a file how.

A checkpoint is a Hugging Face folder, whose tools and limits are flags, or a run's, who
brings its own. With `--benchmark` the work is done in `cli_benchmarks`, otherwise here.
"""

from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from rllib_arpo.arpo import ARPO
from rllib_arpo.benchmark_work import Limits
from rllib_arpo.cli_config import config_of_flags, find_checkpoint, is_model_folder
from rllib_arpo.cli_evaluate import BenchmarkFlags, Flags, ModelFlags
from rllib_arpo.cli_options import refuse
from rllib_arpo.cli_runs import num_actors, restore, settings_of, started_ray
from rllib_arpo.config import ARPOConfig
from rllib_arpo.data.sources import resolve_tasks
from rllib_arpo.envs.chat_dialogue import ChatTemplateDialogue
from rllib_arpo.envs.env_config import DEFAULTS
from rllib_arpo.errors import ConfigError
from rllib_arpo.evaluation import evaluate
from rllib_arpo.evaluation_report import write_json
from rllib_arpo.progress import Console
from rllib_arpo.storage import check_output

# What a run brings with it, and what only benchmarks take.
MODEL_FLAGS = tuple(field.name for field in fields(ModelFlags))
BENCHMARK_FLAGS = tuple(field.name for field in fields(BenchmarkFlags))
DIALOGUES = ("tags", "chat_template")
# Of tasks that are no benchmark's.
TEMPERATURE = 1.0
TOP_P = 1.0
LIMITS = Limits(**{field.name: DEFAULTS[field.name] for field in fields(Limits)})


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
        own = flags.of_model.num_env_runners
        return own if self.run is None else num_actors(self.run)


def evaluate_command(flags: Flags, given: Collection[str]) -> None:
    """Do what the command says.

    Args:
        flags: all of them.
        given: names of those that stand on the command line.

    Raises:
        ConfigError: a flag cannot work or has no effect, or there is no checkpoint.
        DataError: a row is wrong.
    """
    if flags.of_model.dialogue not in DIALOGUES:
        raise ConfigError(
            f'--dialogue ("{flags.of_model.dialogue}") must be one of {DIALOGUES}'
        )
    if flags.json_file is not None:
        check_output(flags.json_file, flag="--json")
    if flags.benchmark is not None:
        from rllib_arpo.cli_benchmarks import evaluate_benchmarks

        refuse(given, ("data",), "--benchmark")
        evaluate_benchmarks(flags, given)
        return
    refuse(given, BENCHMARK_FLAGS, "no --benchmark")
    evaluate_rows(flags, given)


def evaluate_rows(flags: Flags, given: Collection[str]) -> None:
    """Answer the tasks of a file, or a run's own, and print `tree_metrics`.

    Raises:
        ConfigError: as `evaluate_command`; or there are no tasks.
        DataError: a row is wrong.
    """
    # A wrong row must not cost the start of Ray and a model.
    data = flags.data
    tasks = resolve_tasks(data, setting="--data") if data is not None else None
    subject = open_subject(flags.checkpoint)
    if subject.run is not None:
        refuse_model_flags(given, subject)
    config = config_of(subject, flags, limits_of(flags, LIMITS))
    num_samples = flags.num_samples or 1
    with started_ray(subject.num_actors(flags)):
        algorithm = start(subject, config)
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
        write_json(flags.json_file, dict(result.metrics))


def open_subject(folder: Path) -> Subject:
    """The model or checkpoint of a folder.

    Raises:
        ConfigError: it holds neither.
        CheckpointError: the checkpoint is not whole.
    """
    if is_model_folder(folder):
        return Subject(folder=folder.absolute(), run=None)
    checkpoint = find_checkpoint(folder)
    return Subject(folder=checkpoint, run=settings_of(checkpoint))


def config_of(subject: Subject, flags: Flags, limits: Limits) -> ARPOConfig | None:
    """How a model answers; None for a run, who brings its own config.

    Args:
        subject: what is evaluated.
        flags: say what a model does not.
        limits: budgets of an answer.

    Raises:
        ConfigError: a flag cannot work.
        DataError: the corpus cannot be read.
    """
    if subject.run is not None:
        return None
    own = flags.of_model
    config = config_of_flags(
        data=None,
        model=str(subject.folder),
        seed=flags.seed,
        corpus=own.corpus,
        search=own.search,
        search_endpoint=own.search_endpoint,
        browse=own.browse,
        python=own.python,
        tool_cache=own.tool_cache,
        dialogue=own.dialogue,
        engine=own.engine,
        num_env_runners=own.num_env_runners,
        **asdict(limits),
    )
    config.validate()
    return config


def start(subject: Subject, config: ARPOConfig | None) -> ARPO:
    """The algorithm that answers for a subject; Ray is running.

    Args:
        subject: what is evaluated.
        config: `config_of` it.
    """
    return restore(subject.folder) if config is None else config.build_algo()


def limits_of(flags: Flags, usual: Limits) -> Limits:
    """Budgets of an answer of a model: a flag's, or else the usual."""
    own = flags.of_model
    return Limits(
        **{
            field.name: _or(getattr(own, field.name), getattr(usual, field.name))
            for field in fields(Limits)
        }
    )


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


def _or(value: Any, default: Any) -> Any:
    return default if value is None else value
