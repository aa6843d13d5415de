"""`EngineReplica`: the body of a Ray Serve deployment that generates turns.

It holds one engine for each version of the weights that is in use:

1. `prepare` loads new weights beside the old ones, while turns go on. It raises where
   they cannot be loaded, and nothing has changed.
2. `reconfigure`, which Serve calls with a deployment's `user_config`, makes a version
   the newest: answers that begin from now on are written by it. It loads what was not
   prepared, but cannot refuse: Serve stops a replica whose `reconfigure` raises. So
   prepare all replicas first. Then, too, each has the version that another one began
   an answer with.
3. Later turns of an answer ask for the version of its first one. An old engine is
   closed when no turn of it has run for as long as an answer may take.
"""

import asyncio
import functools
import logging
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import ExitStack, aclosing, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rllib_arpo.agent_weights import Weights, export_weights, find_weights
from rllib_arpo.checkpoints import CHECKPOINTS
from rllib_arpo.engines.engine import Engine, GenerationRequest
from rllib_arpo.errors import ARPOError, ConfigError, EngineError
from rllib_arpo.serving.engine_client import (
    EngineChunk,
    EngineLostError,
    turn,
    version_gone,
)
from rllib_arpo.serving.turn_server import TurnServer
from rllib_arpo.serving.turn_wire import TurnAddress

logger = logging.getLogger(__name__)

# Turns lost one after another that make a replica unhealthy: a single one may have
# met a lack of memory.
MAX_LOST_TURNS = 3
# vLLM takes all memory by default; two engines are there while weights change.
SHARE, VLLM_SHARE = "gpu_memory_utilization", 0.45
SHARES = {SHARE, "kv_cache_memory_bytes"}


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineSettings:
    """How a replica computes, whatever the weights.

    Attributes:
        engine: "torch" or "vllm".
        engine_kwargs: as in `ARPOConfig.engine`.
        dtype: "float32" or "bfloat16".
    """

    engine: str = "torch"
    engine_kwargs: Mapping[str, Any] = field(default_factory=dict)
    dtype: str = "float32"


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicaState:
    """Which weights a replica holds.

    Attributes:
        newest: version that writes the answers that begin; None before there is one.
        versions: those that turns may ask for, the newest first.
        failure: why the last `reconfigure` kept the version before, None if it did not.
    """

    newest: str | None
    versions: tuple[str, ...]
    failure: str | None


@dataclass(slots=True, kw_only=True)
class _Loaded:
    """Weights in an engine.

    Attributes:
        engine: computes with them.
        num_running: turns in flight.
        ending: closes the engine at its time, None while it is to stay.
    """

    engine: Engine
    num_running: int = 0
    ending: asyncio.TimerHandle | None = None

    def close(self) -> None:
        self.stay()
        self.engine.close()

    def stay(self) -> None:
        if self.ending is not None:
            self.ending.cancel()
            self.ending = None


OpenEngine = Callable[[EngineSettings, Path], Awaitable[Engine]]


async def open_engine(settings: EngineSettings, folder: Path) -> Engine:
    """Start an engine; the event loop goes on meanwhile where the engine lets it.

    Args:
        settings: of the engine.
        folder: of a Hugging Face model.

    Raises:
        ConfigError: the folder or a setting is wrong.
        EngineError: the engine does not start.
    """
    if settings.engine == "torch":
        from rllib_arpo.engines.torch_engine import TorchEngine

        return await asyncio.to_thread(
            TorchEngine.from_pretrained,
            str(folder),
            dtype=settings.dtype,  # type: ignore[arg-type]
            **settings.engine_kwargs,
        )
    from rllib_arpo.engines.vllm_engine import VLLMEngine

    memory = {} if SHARES & settings.engine_kwargs.keys() else {SHARE: VLLM_SHARE}
    return await VLLMEngine.start(
        str(folder),
        dtype=settings.dtype,
        log_file=_vllm_log(),
        **memory,
        **settings.engine_kwargs,
    )


@functools.cache
def _vllm_log() -> Path:
    """To which all engines of this process append; it outlasts them."""
    return Path(tempfile.mkdtemp(prefix="rllib_arpo_")) / "vllm.log"


class EngineReplica:
    """Generates turns by the newest version of the weights, or one that is asked for.

    Serve calls `reconfigure` before the first turn.

    Args:
        settings: of all engines.
        max_request_s: longest time that an answer may take.
        open_engine: starts an engine on a Hugging Face folder.
    """

    def __init__(
        self,
        settings: EngineSettings = EngineSettings(),
        *,
        max_request_s: float = 600.0,
        open_engine: OpenEngine = open_engine,
    ) -> None:
        self._loaded: dict[str, _Loaded] = {}
        self._turns = TurnServer(self.generate)
        self._newest: str | None = None
        if settings.engine not in ("torch", "vllm"):
            raise ConfigError(
                f"`engine` ({settings.engine!r}) must be 'torch' or 'vllm'"
            )
        self._settings = settings
        self._max_request_s = max_request_s
        self._open_engine = open_engine
        self._lock = asyncio.Lock()
        self._num_lost = 0
        self._failure: str | None = None

    async def state(self) -> ReplicaState:
        """Which weights are there."""
        return ReplicaState(
            newest=self._newest, versions=self._versions(), failure=self._failure
        )

    async def prepare(self, user_config: Mapping[str, Any]) -> str:
        """Load weights, to be taken by the `reconfigure` that follows.

        Until then they write turns of answers only that another replica began. They
        are dropped if no `reconfigure` comes within `max_request_s`.

        Args:
            user_config: as in `reconfigure`.

        Returns:
            Their version.

        Raises:
            ConfigError: the weights are not there or cannot be loaded.
            CheckpointError: the checkpoint is not whole.
            EngineError: the engine does not start.
        """
        async with self._lock:
            version = await self._load(user_config)
            self._end_later(version)
            return version

    async def reconfigure(self, user_config: Mapping[str, Any]) -> None:
        """Let weights write the answers that begin from now on.

        If they cannot be loaded, those before go on and `state` says why.

        Args:
            user_config: "source", as in `find_weights`, and "version", what they are
                called; None or left out takes the fingerprint.

        Raises:
            ConfigError, CheckpointError, EngineError: as `prepare`, where there are no
                weights before.
        """
        async with self._lock:
            try:
                version = await self._load(user_config)
            except ARPOError as error:
                self._failure = str(error)
                if self._newest is None:
                    raise
                logger.exception("keep version %s of the weights", self._newest)
                return
            self._failure = None
            before, self._newest = self._newest, version
            self._loaded[version].stay()
            if before is not None:
                self._end_later(before)

    async def generate(
        self, request: GenerationRequest, *, version: str | None = None
    ) -> AsyncIterator[EngineChunk]:
        """As `TurnEngine.generate`."""
        asked = version or self._newest
        loaded = self._loaded.get(asked or "")
        if asked is None or loaded is None:
            raise version_gone(version, self._versions())
        loaded.stay()
        loaded.num_running += 1
        try:
            async with aclosing(turn(loaded.engine, request, asked)) as chunks:
                async for chunk in chunks:
                    yield chunk
            self._num_lost = 0
        except EngineLostError:
            self._num_lost += 1
            raise
        finally:
            loaded.num_running -= 1
            self._end_later(asked)

    async def hold(self, connection: str) -> AsyncIterator[TurnAddress]:
        """Hold a place for the turns of one connection after the other.

        It ends when the caller cancels it, its connection has gone, or an answer would
        take too long.

        Args:
            connection: id of the caller's connection.

        Yields:
            Where to connect, once.
        """
        yield await self._turns.address()
        with suppress(TimeoutError):
            async with asyncio.timeout(self._max_request_s):
                await self._turns.disconnected(connection)

    async def metrics(self) -> dict[str, float]:
        """Of the newest engine, see `Engine.metrics`, and "num_versions"."""
        counts = {"num_versions": float(len(self._loaded))}
        if self._newest is not None:
            counts |= self._loaded[self._newest].engine.metrics()
        return counts

    async def check_health(self) -> None:
        """Raise if the engine has stopped for good: Serve then replaces the replica.

        Raises:
            EngineLostError: several turns in a row were lost.
        """
        if self._num_lost >= MAX_LOST_TURNS:
            raise EngineLostError(f"the last {self._num_lost} turns were lost")

    def close(self) -> None:
        """End all engines; turns in flight fail with `EngineLostError`."""
        self._newest = None
        self._turns.close()
        while self._loaded:
            self._loaded.popitem()[1].close()

    def __del__(self) -> None:
        # Serve calls it when a replica stops.
        self.close()

    def _versions(self) -> tuple[str, ...]:
        others = tuple(name for name in self._loaded if name != self._newest)
        return others if self._newest is None else (self._newest, *others)

    async def _load(self, user_config: Mapping[str, Any]) -> str:
        """The version of weights that are loaded when it returns."""
        source = user_config.get("source")
        if not isinstance(source, str):
            raise ConfigError(
                f'`user_config` ({dict(user_config)!r}) needs a text "source"'
            )
        version = user_config.get("version")
        if version in self._loaded:
            return str(version)
        try:
            if self._newest is None and _is_tidied_away(source):
                # At its start only; the version says which weights these are.
                logger.warning("%s is gone: take its run's newest checkpoint", source)
                source, version = str(Path(source).parent.parent), None
            weights = await asyncio.to_thread(find_weights, source)
            version = str(version or weights.version)
            if version in self._loaded:
                return version
            # Engines read all files when they start.
            with ExitStack() as files:
                folder = await asyncio.to_thread(_model_folder, weights, files)
                engine = await self._open_engine(self._settings, folder)
        except ARPOError:
            raise
        except Exception as error:  # boundary: all that can fail at loading
            reason = f"{type(error).__name__}: {error}"
            raise EngineError(f"cannot load {source}: {reason}") from error
        self._loaded[version] = _Loaded(engine=engine)
        logger.info("loaded version %s of the weights from %s", version, source)
        return version

    def _end_later(self, version: str) -> None:
        """Close an engine that is not the newest, after its last answer's time."""
        loaded = self._loaded.get(version)
        if loaded is None or loaded.num_running or version == self._newest:
            return
        loaded.stay()
        loop = asyncio.get_running_loop()
        loaded.ending = loop.call_later(self._max_request_s, self._end, version)

    def _end(self, version: str) -> None:
        logger.info("close version %s of the weights", version)
        self._loaded.pop(version).close()


def _is_tidied_away(source: str) -> bool:
    """Whether a run that goes on has removed this checkpoint, as newer ones came."""
    folder = Path(source)
    return folder.parent.name == CHECKPOINTS and not folder.exists()


def _model_folder(weights: Weights, files: ExitStack) -> Path:
    """A Hugging Face folder, written for the time being if need be."""
    if not weights.is_checkpoint:
        return weights.folder
    folder = files.enter_context(tempfile.TemporaryDirectory(prefix="rllib_arpo_"))
    return export_weights(weights.folder, Path(folder) / "model")
