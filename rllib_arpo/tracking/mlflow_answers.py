"""Served answers as MLflow traces, in the form of those of training.

    answer            AGENT   messages -> the answer
    ├── turn          LLM     tokens, entropy, latency: all measured
    ├── search        TOOL
    └── turn          LLM

An answer never waits for MLflow: it is put into a queue, and a thread does the rest.
Where the queue is full, because the server is away or slower than the answers come,
answers are dropped and counted. One that a server which answers does not take, such as
one too large for a proxy in front of it, is given up, so that it holds up no others.
"""

import logging
import queue
import random
import threading
import uuid
from collections.abc import Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from rllib_arpo.serving.answer_log import AnswerLog
from rllib_arpo.serving.events import TurnReport
from rllib_arpo.tracking.mlflow_store import (
    EXPERIMENT,
    answers,
    experiment_id,
    open_client,
    without_passwords,
)
from rllib_arpo.tracking.mlflow_traces import NS, TraceSpan, send_trace, token_usage

if TYPE_CHECKING:
    from mlflow import MlflowClient

logger = logging.getLogger(__name__)

# Each may hold a request's whole body.
MAX_WAITING = 128
MAX_TEXT_CHARS = 20_000
RETRY_S = (1.0, 2.0, 5.0, 10.0, 30.0)
# Of one trace, before the server is asked whether it answers at all.
MAX_FAILURES = 3
# Of MLflow's errors, those that a second try would meet again.
REFUSALS = ("INVALID_PARAMETER_VALUE", "BAD_REQUEST", "RESOURCE_ALREADY_EXISTS")
HUNG_UP = "nobody waited for the answer any more"
SENT, DROPPED, REFUSED = "sent", "dropped", "refused"


class AnswerTraces:
    """The queue of one process, with the thread that sends it.

    MLflow is imported at once, which takes seconds, so that no answer is held up later.

    Args:
        uri: of the store.
        share: of the answers, from 0 to 1, drawn by chance.
        experiment: name.
        max_waiting: answers that the queue holds.
    """

    def __init__(
        self,
        uri: str,
        *,
        share: float = 1.0,
        experiment: str = EXPERIMENT,
        max_waiting: int = MAX_WAITING,
    ) -> None:
        import mlflow.entities
        import mlflow.tracing.client  # noqa: F401

        self._uri = uri
        self._share = share
        self._experiment = experiment
        self._queue: queue.Queue[AnswerLog | None] = queue.Queue(max_waiting)
        self._client: tuple[MlflowClient, str] | None = None
        self._counts = {SENT: 0, DROPPED: 0, REFUSED: 0}
        self._place = without_passwords(uri)
        self._closing = threading.Event()
        self._idle = threading.Condition()
        self._thread = threading.Thread(
            target=self._run, name="rllib_arpo-traces", daemon=True
        )
        self._thread.start()

    def wants(self) -> bool:
        """Whether the next answer is to be traced."""
        return random.random() < self._share

    def put(self, log: AnswerLog) -> None:
        """Take an answer, or drop it at once."""
        try:
            self._queue.put_nowait(log)
        except queue.Full:
            self._counts[DROPPED] += 1

    def counts(self) -> Mapping[str, int]:
        """Answers that are "sent", "dropped" or "refused"."""
        return dict(self._counts)

    def flush(self, timeout_s: float) -> bool:
        """Wait until MLflow has everything, or for so long; whether it has."""
        with self._idle:
            return self._idle.wait_for(
                lambda: not self._queue.unfinished_tasks, timeout_s
            )

    def close(self, timeout_s: float = 5.0) -> None:
        """`flush`, then stop."""
        if self._closing.is_set():
            return
        self.flush(timeout_s)
        self._closing.set()
        try:
            self._queue.put_nowait(None)
        except queue.Full:
            logger.debug("MLflow at %s lacks the last answers", self._place)

    def _run(self) -> None:
        while (log := self._queue.get()) is not None and not self._closing.is_set():
            self._send(log)
            self._queue.task_done()
            with self._idle:
                self._idle.notify_all()

    def _send(self, log: AnswerLog) -> None:
        from mlflow.exceptions import MlflowException

        trace: dict[str, Any] | None = None
        failures, is_last_try = 0, False
        while not self._closing.is_set():
            try:
                client, experiment = self._opened()
                # Once: the spans of a second try are the same.
                trace = trace or answer_trace(log)
                send_trace(client, trace, experiment)
                self._counts[SENT] += 1
                return
            except Exception as error:  # boundary: tracing never fails an answer
                away = isinstance(error, MlflowException | OSError)
                refused = getattr(error, "error_code", "") in REFUSALS
                if refused or is_last_try or not away:
                    self._give_up(error)
                    return
                self._client = None
                failures += 1
                is_last_try = failures >= MAX_FAILURES and answers(self._uri)
                warns = failures == MAX_FAILURES and not is_last_try
                log_it = logger.warning if warns else logger.debug
                reason = without_passwords(error)
                log_it("MLflow at %s does not answer: %s", self._place, reason)
                self._closing.wait(RETRY_S[min(failures, len(RETRY_S)) - 1])

    def _give_up(self, error: Exception) -> None:
        self._counts[REFUSED] += 1
        log = logger.warning if self._counts[REFUSED] == 1 else logger.debug
        log(
            "MLflow at %s takes no trace of a served answer: %s. Such answers are "
            "counted as `%s` and not warned of again.",
            *(self._place, without_passwords(repr(error)), REFUSED),
        )

    def _opened(self) -> "tuple[MlflowClient, str]":
        if self._client is None:
            client = open_client(self._uri)
            self._client = client, experiment_id(client, self._experiment)
        return self._client


def answer_trace(log: AnswerLog) -> dict[str, Any]:
    """A trace of an answer, as `send_trace` takes it."""
    root = TraceSpan(parent_id=None, name="answer", span_type="AGENT")
    root.end = int(log.seconds * NS)
    root.inputs = {
        "messages": [
            _all_clipped(one.model_dump(exclude_none=True)) for one in log.messages
        ]
    }
    root.attributes = {"model": log.model, "request_id": log.request_id}
    if log.finished is None:
        root.failed = True
        root.outputs = {"error": log.error or HUNG_UP}
    else:
        root.outputs = {
            "answer": _clipped(log.finished.answer),
            "end": log.finished.end,
            "finish_reason": log.finished.reason,
        }
        root.attributes |= {
            "weights": log.finished.version,
            "prompt_tokens": log.finished.usage.prompt_tokens,
            "completion_tokens": log.finished.usage.completion_tokens,
        }
    spans = [root]
    read: Any = None  # the messages, which the root has
    for report, end_s in log.turns:
        spans += _turn_spans(report, int(end_s * NS), root.span_id, read)
        read = {"tool_result": _clipped(report.tool_result)}
    return {
        "trace_id": uuid.uuid5(
            uuid.NAMESPACE_OID, f"{log.request_id}/{log.choice}/{log.begun_ns}"
        ).hex,
        "start_ms": log.begun_ns // 1_000_000,
        "duration_ms": root.end // 1_000_000,
        "spans": [vars(span) for span in spans],
        "assessments": [],
        "tags": {"source": "serving", "model": log.model},
    }


def _turn_spans(
    report: TurnReport, end: int, parent_id: str, read: Any
) -> list[TraceSpan]:
    call = report.tool_call
    tool_start = end if call is None else max(end - int(call.latency_s * NS), 0)
    turn = TraceSpan(parent_id=parent_id, name="turn", span_type="LLM")
    turn.start = max(tool_start - int(report.latency_s * NS), 0)
    turn.end = tool_start
    turn.inputs = read
    turn.outputs = {"text": _clipped(report.text)}
    turn.attributes = {
        "turn": report.turn,
        "entropy_mean_nats": report.entropy,
        **token_usage(report.prompt_tokens, report.completion_tokens),
    }
    if call is None:
        return [turn]
    tool = TraceSpan(parent_id=parent_id, name=call.name, span_type="TOOL")
    tool.start, tool.end = tool_start, end
    tool.inputs = {"arguments": _clipped(call.arguments)}
    tool.outputs = {"result": _clipped(report.tool_result)}
    tool.failed = call.status != "ok"
    tool.attributes = asdict(call) | {"arguments": _clipped(call.arguments)}
    return [turn, tool]


def _all_clipped(value: Any) -> Any:
    """The same with every text in it clipped, however deep."""
    if isinstance(value, str):
        return _clipped(value)
    if isinstance(value, list):
        return [_all_clipped(one) for one in value]
    if isinstance(value, dict):
        return {name: _all_clipped(one) for name, one in value.items()}
    return value


def _clipped(text: str | None) -> str | None:
    if text is None or len(text) <= MAX_TEXT_CHARS:
        return text
    return f"{text[:MAX_TEXT_CHARS]}... ({len(text)} characters)"
