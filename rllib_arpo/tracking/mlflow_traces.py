"""Rollout trees as MLflow traces.

    tree                                question -> answers with rewards
    ├── path 1 of 2                     where a prompt or a tool result has several
    │   ├── turn          LLM           continuations, each is a path of its own
    │   ├── search        TOOL
    │   ├── path 1 of 2
    │   │   └── turn      LLM           entropy, branch decision
    │   └── path 2 of 2 ...
    └── path 2 of 2 ...

A leaf's reward is an assessment of the span of its last turn and has its parts as its
rationale; the mean of each part over the leaves is one of the trace. An assessment
costs as much as three spans, so there is not one for every part of every leaf.

A tool's latency was measured. A tree does not keep when its tokens were sampled, and
many trees are sampled at once: a turn takes its tokens' share of the iteration's time.
"""

import base64
import json
import time
import uuid
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from statistics import fmean
from typing import TYPE_CHECKING, Any

from rllib_arpo.tree import RolloutTree, Segment

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Assessment, Span

NS = 1_000_000_000
MAX_PREVIEW_CHARS = 1000
SOURCE_RUN = "mlflow.sourceRun"
# Assessments of a trace, in the order of the leaves.
MAX_ASSESSMENTS = 200


@dataclass(kw_only=True)
class TraceSpan:
    """A span as it lies in the buffer; times in ns since the trace's start."""

    parent_id: str | None
    name: str
    span_type: str
    span_id: str = field(default_factory=lambda: uuid.uuid4().hex[:16])
    start: int = 0
    end: int = 0
    failed: bool = False
    inputs: Any = None
    outputs: Any = None
    attributes: dict[str, Any] = field(default_factory=dict)


def tree_trace(
    tree: RolloutTree,
    *,
    seconds_per_token: float = 0.0,
    tags: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """A trace of a tree, as JSON for a buffer's line.

    Args:
        tree: whole.
        seconds_per_token: a sampled token's share of the iteration's time.
        tags: of the trace.
    """
    spans = _Spans(tree, seconds_per_token)
    root = spans.build()
    duration_ms = root.end // 1_000_000
    return {
        "trace_id": uuid.uuid4().hex,
        "start_ms": time.time_ns() // 1_000_000 - duration_ms,
        "duration_ms": duration_ms,
        "spans": [vars(span) for span in spans.made],
        "assessments": _assessed(tree, spans.of_segment)[:MAX_ASSESSMENTS],
        "tags": dict(tags or {}),
    }


def _assessed(tree: RolloutTree, span_of: Mapping[int, str]) -> list[dict[str, Any]]:
    if not tree.leaves:
        return []
    parts = sorted({name for leaf in tree.leaves for name in leaf.reward_parts})
    # A part that a leaf lacks gave it nothing. One called "reward" is not the total.
    values = {
        name: [leaf.reward_parts.get(name, 0.0) for leaf in tree.leaves]
        for name in parts
    } | {"reward": [leaf.reward for leaf in tree.leaves]}
    means = [
        {"name": f"{name}_mean", "value": fmean(of_leaves), "span_id": None}
        for name, of_leaves in values.items()
    ]
    rewards = [
        {
            "name": "reward",
            "value": leaf.reward,
            "span_id": span_of[leaf.segment],
            "rationale": ", ".join(
                f"{name} {value:.4g}" for name, value in leaf.reward_parts.items()
            ),
        }
        for leaf in tree.leaves
        if leaf.segment in span_of
    ]
    return means + rewards


class _Spans:
    """Makes the spans of a tree, parents before children."""

    def __init__(self, tree: RolloutTree, seconds_per_token: float) -> None:
        self._tree = tree
        self._seconds_per_token = seconds_per_token
        self._children: dict[int, list[int]] = defaultdict(list)
        # Tokens before each segment on its path.
        self._context: list[int] = []
        for index, segment in enumerate(tree.segments):
            if segment.parent is None:
                self._context.append(0)
                continue
            parent = segment.parent
            self._children[parent].append(index)
            before = len(tree.segments[parent].token_ids)
            self._context.append(self._context[parent] + before)
        self.made: list[TraceSpan] = []
        self.of_segment: dict[int, str] = {}

    def build(self) -> TraceSpan:
        tree = self._tree
        root = self._add(None, "tree", "AGENT")
        root.inputs = {"messages": [asdict(message) for message in tree.task.messages]}
        root.outputs = {
            "answers": [
                {"answer": leaf.answer, "reward": leaf.reward, "end": leaf.end}
                for leaf in tree.leaves
            ]
        }
        root.attributes = {
            "task_id": tree.task.task_id,
            "accepted_answers": list(tree.task.answers),
            "num_leaves": len(tree.leaves),
            "num_tokens": tree.num_tokens,
            "prompt_tokens": len(tree.segments[0].token_ids),
            "turn_latency_is": "the tokens' share of the iteration's time",
        }
        root.end = self._below(0, root, 0)
        return root

    def _below(self, index: int, parent: TraceSpan, clock: int) -> int:
        """Spans of all that follows a segment; when the last of it ends."""
        while len(after := self._children[index]) == 1:
            (index,) = after
            clock = self._segment(index, parent, clock)
        ends = [clock]
        for number, child in enumerate(after, start=1):
            path = self._add(parent, f"path {number} of {len(after)}", "CHAIN")
            path.start = clock
            path.end = self._below(child, path, self._segment(child, path, clock))
            ends.append(path.end)
        return max(ends)

    def _segment(self, index: int, parent: TraceSpan, clock: int) -> int:
        segment = self._tree.segments[index]
        call = segment.tool_call
        if call is not None:
            span = self._add(parent, call.name, "TOOL")
            span.inputs = {"arguments": call.arguments}
            span.outputs = {"result": segment.text}
            span.failed = call.status != "ok"
            span.attributes = {
                "status": call.status,
                "latency_s": call.latency_s,
                "num_attempts": call.num_attempts,
                "truncated": call.truncated,
                "num_tokens": len(segment.token_ids),
            }
            seconds = call.latency_s
        else:
            span = self._add(parent, "turn", "LLM")
            span.inputs = (
                {"after": self._tree.segments[segment.parent].text}
                if segment.parent
                else self.made[0].inputs
            )
            span.outputs = {"text": segment.text}
            span.attributes = _turn_attributes(segment, self._context[index])
            seconds = len(segment.token_ids) * self._seconds_per_token
        self.of_segment[index] = span.span_id
        span.start, span.end = clock, clock + int(seconds * NS)
        return span.end

    def _add(self, parent: TraceSpan | None, name: str, span_type: str) -> TraceSpan:
        span = TraceSpan(
            parent_id=None if parent is None else parent.span_id,
            name=name,
            span_type=span_type,
        )
        self.made.append(span)
        return span


def _turn_attributes(segment: Segment, prompt_tokens: int) -> dict[str, Any]:
    attributes: dict[str, Any] = {
        "finish_reason": segment.finish_reason,
        **token_usage(prompt_tokens, len(segment.token_ids)),
    }
    if len(segment.entropies):
        attributes["entropy_mean_nats"] = float(segment.entropies.mean())
        attributes["entropy_max_nats"] = float(segment.entropies.max())
    if len(segment.policy_versions):
        attributes["policy_version"] = int(segment.policy_versions[-1])
    if segment.branch is not None:
        attributes["branch_decision"] = asdict(segment.branch)
    return attributes


def token_usage(prompt_tokens: int, completion_tokens: int) -> dict[str, Any]:
    """The attribute of a turn's span that MLflow's page adds up."""
    return {
        "mlflow.chat.tokenUsage": {
            "input_tokens": prompt_tokens,
            "output_tokens": completion_tokens,
            "total_tokens": prompt_tokens + completion_tokens,
        },
    }


def send_trace(
    client: "MlflowClient",
    trace: Mapping[str, Any],
    experiment: str,
    run_id: str | None = None,
) -> None:
    """Send a trace that `tree_trace` made; sending it again changes nothing.

    Args:
        client: of the store.
        trace: as in the buffer.
        experiment: id.
        run_id: that it belongs to; None: to none.

    Raises:
        MlflowException: the server is away, or refuses it.
    """
    from mlflow.entities import TraceInfo, TraceLocation, TraceState
    from mlflow.tracing.client import TracingClient

    tracing = TracingClient(client.tracking_uri)
    trace_id = f"tr-{trace['trace_id']}"
    spans = [_span(span, trace, trace_id) for span in trace["spans"]]
    root = trace["spans"][0]
    tracing.start_trace(
        TraceInfo(
            trace_id=trace_id,
            trace_location=TraceLocation.from_experiment_id(experiment),
            request_time=trace["start_ms"],
            state=TraceState.ERROR if root["failed"] else TraceState.OK,
            request_preview=_preview(root["inputs"]["messages"][-1].get("content")),
            response_preview=_preview(root["outputs"]),
            execution_duration=trace["duration_ms"],
            trace_metadata={
                "mlflow.trace_schema.version": "3",
                **({} if run_id is None else {SOURCE_RUN: run_id}),
            },
            tags={
                "mlflow.traceName": root["name"],
                "mlflow.trace.spansLocation": "TRACKING_STORE",
                **trace["tags"],
            },
            assessments=_assessments(trace, trace_id),
        )
    )
    tracing.log_spans(experiment, spans)


def _span(span: Mapping[str, Any], trace: Mapping[str, Any], trace_id: str) -> "Span":
    from mlflow.entities import Span

    start_ns = trace["start_ms"] * 1_000_000
    attributes = {
        **span["attributes"],
        "mlflow.traceRequestId": trace_id,
        "mlflow.spanType": span["span_type"],
    }
    for name in ("Inputs", "Outputs"):
        if (content := span[name.lower()]) is not None:
            attributes[f"mlflow.span{name}"] = content
    parent = span["parent_id"]
    code = "STATUS_CODE_ERROR" if span["failed"] else "STATUS_CODE_OK"
    return Span.from_dict(
        {
            "trace_id": _base64(trace["trace_id"]),
            "span_id": _base64(span["span_id"]),
            "parent_span_id": None if parent is None else _base64(parent),
            "name": span["name"],
            "start_time_unix_nano": start_ns + span["start"],
            "end_time_unix_nano": start_ns + span["end"],
            "events": [],
            "status": {"code": code, "message": ""},
            "attributes": {name: json.dumps(v) for name, v in attributes.items()},
        }
    )


def _assessments(trace: Mapping[str, Any], trace_id: str) -> list["Assessment"]:
    from mlflow.entities import Assessment, AssessmentSource, Feedback

    made: list[Assessment] = []
    for number, given in enumerate(trace["assessments"]):
        feedback = Feedback(
            name=given["name"],
            value=given["value"],
            rationale=given.get("rationale"),
            source=AssessmentSource(source_type="CODE", source_id="rllib_arpo.reward"),
            trace_id=trace_id,
            span_id=given["span_id"],
            create_time_ms=trace["start_ms"],
            last_update_time_ms=trace["start_ms"],
        )
        # One of its own, so that sending again replaces it.
        feedback.assessment_id = f"a-{trace['trace_id']}-{number}"
        made.append(feedback)
    return made


def _preview(content: Any) -> str:
    if isinstance(content, str):
        return content[:MAX_PREVIEW_CHARS]
    return json.dumps(content, ensure_ascii=False)[:MAX_PREVIEW_CHARS]


def _base64(digits: str) -> str:
    return base64.b64encode(bytes.fromhex(digits)).decode()
