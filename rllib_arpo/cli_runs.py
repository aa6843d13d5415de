"""What the commands do with a run: start it, go on with it, train and finish it."""

import logging
import os
import pickle
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import ray
import typer

from rllib_arpo.arpo import ARPO
from rllib_arpo.cli_config import checkpoint_to_resume
from rllib_arpo.config import ARPOConfig
from rllib_arpo.errors import ConfigError
from rllib_arpo.metrics import NUM_TOKENS_SAMPLED
from rllib_arpo.progress import Console
from rllib_arpo.runs import Record, Run, train
from rllib_arpo.stop_signals import Stopped

NOTHING_WRITTEN = (
    "Warning: the model wrote no token, for every prompt fills its context. Take a "
    "model with a longer one."
)


@contextmanager
def started_ray(num_actors: int = 0) -> Iterator[None]:
    """Ray for the time of a command: the cluster at RAY_ADDRESS, or a local one.

    Args:
        num_actors: a local Ray has a (logical) CPU for each, or they would wait for
            ever on a machine with fewer cores.
    """
    local: dict[str, Any] = {
        # Not one that somebody else started here.
        "address": "local",
        "include_dashboard": False,
        "num_cpus": max(os.cpu_count() or 1, num_actors),
    }
    ray.init(
        log_to_driver=False,
        logging_level=logging.ERROR,
        **({} if os.environ.get("RAY_ADDRESS") else local),
    )
    try:
        yield
    finally:
        ray.shutdown()


def num_actors(settings: Mapping[str, Any]) -> int:
    """Actors that an algorithm with these settings starts."""
    return (
        settings["num_env_runners"]
        + settings["num_learners"]
        + settings["evaluation_num_env_runners"]
    )


def settings_of(checkpoint: Path) -> Mapping[str, Any]:
    """The settings of a checkpoint's algorithm."""
    with (checkpoint / "class_and_ctor_args.pkl").open("rb") as file:
        (settings,), _ = pickle.load(file)["ctor_args_and_kwargs"]
    return settings


def num_actors_of(checkpoint: Path) -> int:
    """Actors that the algorithm of a checkpoint starts."""
    return num_actors(settings_of(checkpoint))


def start_run(
    config: ARPOConfig,
    folder: Path,
    iterations: int,
    *,
    mlflow: str | None = None,
    data_files: tuple[str, ...] = (),
) -> None:
    """Train from the start, into a new folder.

    Args:
        config: of the algorithm.
        folder: of the run.
        iterations: to stop after.
        mlflow: URI of the store to track it in, "default" for the usual one.
        data_files: whose hashes MLflow gets, besides those that the config names.

    Raises:
        ConfigError: the config cannot work, or the folder holds a run already, also
            one that another process just began.
    """
    from rllib_arpo.tracking.attach import track

    config.validate()
    run = Run(folder)
    with run.held():
        if config.engine_log_dir is None:
            config.engine(log_dir=str(run.folder / "logs"))
        run.write_config(config)
        if mlflow is not None:
            track(config, run.folder, mlflow, data_files=data_files)
        with started_ray(num_actors(vars(config))):
            with Console().waiting(
                f"Start the actors and the engine ({config.engine_name})"
            ):
                algorithm = config.build_algo()
            _train(algorithm, run, iterations)


def resume_run(folder: Path, iterations: int) -> None:
    """Train on from a run's checkpoint, up to iteration `iterations`.

    Raises:
        ConfigError: there is no checkpoint, or it has come as far already, or another
            process trains in the folder.
    """
    checkpoint_to_resume(folder)
    run = Run(folder, resume=True)
    with run.held():
        # Another process may have gone on until here.
        checkpoint = checkpoint_to_resume(folder)
        with started_ray(num_actors_of(checkpoint)):
            _resume(checkpoint, run, iterations)


def _resume(checkpoint: Path, run: Run, iterations: int) -> None:
    algorithm = restore(checkpoint)
    if algorithm.iteration >= iterations:
        done = algorithm.iteration
        algorithm.stop()
        raise ConfigError(
            f"{run.folder} has reached iteration {done} already: give more than that "
            f"with --iterations ({iterations})"
        )
    run.forget_after(algorithm.iteration)
    _train(algorithm, run, iterations)


def restore(checkpoint: Path) -> ARPO:
    """The algorithm of a checkpoint, at the iteration where it was saved."""
    return cast(ARPO, ARPO.from_checkpoint(str(checkpoint)))


def _train(algorithm: ARPO, run: Run, iterations: int) -> None:
    from rllib_arpo.tracking.attach import end_tracking

    console = Console()
    stage = type(algorithm).__name__
    records: list[Record] = []
    status = "FAILED"
    try:
        with console.progress(iterations, stage, done=algorithm.iteration) as advance:

            def note(record: Record) -> None:
                records.append(record)
                advance(record)
                if record.get(NUM_TOKENS_SAMPLED) == 0:
                    console.say(NOTHING_WRITTEN)

            train(
                algorithm,
                run,
                num_iterations=iterations,
                stage=stage,
                on_iteration=note,
                on_alarm=console.alarm,
            )
        run.save_checkpoint(algorithm)
        algorithm.save_pretrained(run.model)
        status = "FINISHED"
    except KeyboardInterrupt as stopped:
        status = "KILLED"
        console.say(f"Stopped; {_what_to_do(run, iterations)}")
        code = stopped.exit_code if isinstance(stopped, Stopped) else 130
        raise typer.Exit(code) from None
    finally:
        algorithm.stop()
        end_tracking(algorithm, status=status)
    console.times(records)
    curves = run.plot()
    console.say(f"Model: {run.model}. Checkpoint: {run.checkpoint}. Curves: {curves}.")


def _what_to_do(run: Run, iterations: int) -> str:
    """How to go on with a run that was to have so many iterations."""
    checkpoint = run.checkpoint
    if checkpoint is None:
        return "no iteration is saved. Start again with another --out."
    # A killed save may have left it as iteration_000012.before.
    done = int(checkpoint.stem.removeprefix("iteration_"))
    command = (
        f"train --resume {run.folder} --iterations {iterations}"
        if done < iterations
        else f"export {run.folder} {run.model}"
    )
    return f"iteration {done} is saved. Go on with: rllib-arpo {command}"
