"""`grow_tree`: one prompt in, one tree of rollouts out.

Every path is a coroutine: it asks the engine for a turn, gives the turn's tokens to
its environment, and goes on with the tool result. Nothing waits for the others: a
path in a slow tool holds nobody, and the engine batches whatever is in flight.

1. N paths start at the prompt.
2. When the first k tokens after a tool result are out, the rule decides whether the
   path branches there; a branch is a fork of the environment and a new coroutine.
   Where the model cannot write a token nothing is measured and nothing decided.
3. When all paths have ended and leaves are left over, they start at the prompt, all
   at once.

Tokens are never decoded and encoded again, and all randomness comes from the tree's
seed, the path's place in the tree and the turn.

What breaks a rollout: an `EngineError` (the tree is lost, the runner restarts) and a
`RewardError`. A tool that fails breaks nothing: the environment shows the model why.
"""

import asyncio
import copy
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import numpy as np

from rllib_arpo.engines.engine import (
    Engine,
    GenerationRequest,
    SamplingParams,
    join,
)
from rllib_arpo.rollouts.branching import (
    BranchPoint,
    LeafBudget,
    TreeSettings,
    branch_probability,
    derive_seed,
    derive_uniform,
    mean_entropy,
)
from rllib_arpo.tree import (
    BranchDecision,
    FinishReason,
    Leaf,
    LeafOrigin,
    RolloutTree,
    Segment,
    Task,
    Trajectory,
    Turn,
)

PathKey = tuple[int, ...]
SegmentKey = tuple[PathKey, int, int]
PROMPT: SegmentKey = ((), 0, 0)


class TokenEnv(Protocol):
    """What `grow_tree` needs of an environment: a `gymnasium.Env` over tokens.

    `ToolUseEnv` is one. `step_async` is used instead of `step` where there is one,
    `fork` instead of `copy.deepcopy`.

    Attributes:
        stop: strings that end a turn.
        remaining_tokens: how many more tokens the path may hold.
    """

    stop: tuple[str, ...]
    remaining_tokens: int

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]: ...

    def step(
        self, action: np.ndarray
    ) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]: ...


@dataclass(slots=True, kw_only=True)
class _Path:
    """A path that is growing.

    `key` is its place in the tree: (root,) for a root, (*parent's key, turn, number)
    for a branch, so keys sort parents first.
    """

    key: PathKey
    env: TokenEnv
    token_ids: np.ndarray
    parent: SegmentKey
    origin: LeafOrigin
    turn: int = 0
    num_tool_calls: int = 0
    after_tool: bool = False
    initial_entropy: float = 0.0
    reward: float = 0.0


@dataclass(slots=True)
class _Sampled:
    """What the engine has streamed of one turn."""

    token_ids: np.ndarray
    logprobs: np.ndarray
    entropies: np.ndarray
    policy_versions: np.ndarray
    finish_reason: FinishReason | None = None
    branch: BranchDecision | None = None


@dataclass(slots=True)
class _Grown:
    """A segment or leaf before its indices are known."""

    segment: Segment
    parent: SegmentKey | None


@dataclass(slots=True)
class _Grower:
    task: Task
    env: TokenEnv
    engine: Engine
    settings: TreeSettings
    sampling: SamplingParams
    vocab_size: int
    seed: int
    budget: LeafBudget
    segments: dict[SegmentKey, _Grown] = field(default_factory=dict)
    leaves: dict[PathKey, tuple[SegmentKey, Leaf]] = field(default_factory=dict)
    group: asyncio.TaskGroup = field(default_factory=asyncio.TaskGroup)

    async def grow(self) -> RolloutTree:
        prompt_ids, _ = self.env.reset(seed=self.seed, options={"task": self.task})
        self.segments[PROMPT] = _Grown(
            Segment(parent=None, role="prompt", token_ids=prompt_ids), None
        )
        await self._wave("initial", 0, self.budget.take(self.budget.num_initial))
        await self._wave(
            "refill", self.budget.num_initial, self.budget.take(self.budget.free)
        )
        assert len(self.leaves) == self.settings.group_size
        return self._tree()

    async def _wave(self, origin: LeafOrigin, first: int, count: int) -> None:
        """Run `count` paths from the prompt, and their branches, to their ends."""
        prompt_ids = self.segments[PROMPT].segment.token_ids
        try:
            async with asyncio.TaskGroup() as self.group:
                for number in range(first, first + count):
                    self._start(
                        _Path(
                            key=(number,),
                            env=_fork(self.env),
                            token_ids=prompt_ids,
                            parent=PROMPT,
                            origin=origin,
                        )
                    )
        except ExceptionGroup as failed:
            raise failed.exceptions[0] from failed

    def _start(self, path: _Path) -> None:
        self.group.create_task(self._run(path))

    async def _run(self, path: _Path) -> None:
        ended = False
        while not ended:
            sampled = await self._generate(path)
            ended = await self._step(path, sampled)

    async def _generate(self, path: _Path) -> _Sampled:
        """Sample one turn; decide about a branch as soon as k tokens are out."""
        k = self.settings.entropy_probe_tokens
        request = GenerationRequest(
            request_id=f"{self.task.task_id}/{self.seed}/"
            + ".".join(f"{part:06d}" for part in (*path.key, path.turn)),
            prompt_token_ids=path.token_ids,
            max_tokens=max(path.env.remaining_tokens, 1),
            seed=derive_seed(self.seed, path.key, path.turn),
            sampling=self.sampling,
            stream_interval=k,
        )
        chunks = []
        decision = None
        measured = False
        async for chunk in self.engine.generate(request):
            chunks.append(chunk)
            if not measured and len(chunk.entropies):
                # The first chunk holds k tokens, or the whole turn if it is shorter.
                measured = True
                entropy = mean_entropy(
                    chunk.entropies, num_tokens=k, vocab_size=self.vocab_size
                )
                if path.turn == 0:
                    path.initial_entropy = entropy
                elif path.after_tool:
                    decision = self._decide(path, entropy)
        whole = join(chunks)
        return _Sampled(
            token_ids=whole.token_ids,
            logprobs=whole.logprobs,
            entropies=whole.entropies,
            policy_versions=whole.policy_versions,
            finish_reason=whole.finish_reason,
            branch=decision,
        )

    def _decide(self, path: _Path, entropy: float) -> BranchDecision:
        """Apply the rule at the end of the last tool result; start what it grants.

        The environment has not seen the turn that is being generated, so a fork of
        it stands right after the tool result.
        """
        settings = self.settings
        change = entropy - path.initial_entropy
        probability = branch_probability(
            change, base=settings.branch_base, weight=settings.branch_entropy_weight
        )
        drawn = derive_uniform(self.seed, path.key, path.turn, "branch")
        wants = settings.branch_rule(
            BranchPoint(
                entropy=entropy,
                initial_entropy=path.initial_entropy,
                entropy_change=change,
                probability=probability,
                base=settings.branch_base,
                threshold=settings.branch_threshold,
                drawn=drawn,
                num_tool_calls=path.num_tool_calls,
            )
        )
        wanted = settings.branch_factor - 1 if wants else 0
        taken = self.budget.take(wanted)
        for number in range(taken):
            self._start(
                replace(
                    path,
                    key=(*path.key, path.turn, number),
                    env=_fork(path.env),
                    origin="branch",
                    # Measured once: the branch stands at the same place.
                    after_tool=False,
                )
            )
        return BranchDecision(
            entropy=entropy,
            entropy_change=change,
            probability=probability,
            drawn=drawn,
            wanted=wanted,
            taken=taken,
        )

    async def _step(self, path: _Path, sampled: _Sampled) -> bool:
        """Give the turn to the environment, record both segments, say if it ended."""
        with self.engine.hold():
            observation, reward, terminated, truncated, info = await _step_env(
                path.env, sampled.token_ids
            )
        turn: Turn = info.get("turn") or Turn(text="")
        key: SegmentKey = (path.key, path.turn, 0)
        self.segments[key] = _Grown(
            Segment(
                parent=None,
                role="model",
                token_ids=sampled.token_ids,
                logprobs=sampled.logprobs,
                entropies=sampled.entropies,
                policy_versions=sampled.policy_versions,
                finish_reason=sampled.finish_reason,
                branch=sampled.branch,
                text=turn.text,
            ),
            path.parent,
        )
        path.reward += reward
        tool_key: SegmentKey = (path.key, path.turn, 1)
        # A call whose result did not fit is a segment without tokens: it was made.
        if len(observation) or turn.tool_call is not None:
            self.segments[tool_key] = _Grown(
                Segment(
                    parent=None,
                    role="tool",
                    token_ids=observation,
                    tool_call=turn.tool_call,
                    text=turn.tool_result or "",
                ),
                key,
            )
            key = tool_key
        if terminated or truncated:
            self.leaves[path.key] = (key, _leaf(path, info, terminated=terminated))
            return True
        path.parent = key
        path.token_ids = np.concatenate(
            [path.token_ids, sampled.token_ids, observation]
        )
        call = turn.tool_call
        path.after_tool = call is not None and call.status != "refused"
        path.num_tool_calls += path.after_tool
        path.turn += 1
        return False

    def _tree(self) -> RolloutTree:
        """Number segments and leaves by place, not by time of arrival."""
        order = sorted(self.segments)
        index = {key: number for number, key in enumerate(order)}
        grown = [self.segments[key] for key in order]
        return RolloutTree(
            task=self.task,
            segments=tuple(
                replace(item.segment, parent=index[item.parent])
                if item.parent is not None
                else item.segment
                for item in grown
            ),
            leaves=tuple(
                replace(leaf, segment=index[key])
                for _, (key, leaf) in sorted(self.leaves.items())
            ),
            seed=self.seed,
        )


async def grow_tree(
    task: Task,
    *,
    env: TokenEnv,
    engine: Engine,
    settings: TreeSettings,
    sampling: SamplingParams,
    vocab_size: int,
    seed: int,
) -> RolloutTree:
    """Grow the tree of rollouts of one task (ARPO, arXiv:2507.19849, section 3.1).

    Args:
        task: the question.
        env: a pattern that is reset once and forked for every path.
        engine: generates; shared by all trees in flight.
        settings: shape of the tree and the branching rule.
        sampling: how to sample; the environment's stop strings are added.
        vocab_size: V, in whose logarithm entropies are measured.
        seed: same seed and same order of arrival of tool results, same tree. Under
            an engine in deterministic mode the order is always the same.

    Returns:
        A tree with exactly `settings.group_size` leaves, its segments and leaves
        ordered by their place in the tree.

    Raises:
        EngineError: the engine failed; the tree is lost.
        RewardError: the reward function failed.
    """
    grower = _Grower(
        task=task,
        env=_fork(env),
        engine=engine,
        settings=settings,
        sampling=replace(sampling, stop=(*sampling.stop, *env.stop)),
        vocab_size=vocab_size,
        seed=seed,
        budget=LeafBudget(settings),
    )
    return await grower.grow()


def _leaf(path: _Path, info: Mapping[str, Any], *, terminated: bool) -> Leaf:
    trajectory: Trajectory | None = info.get("trajectory")
    if trajectory is not None:
        end, answer = trajectory.end, trajectory.answer
    else:
        end, answer = ("answer" if terminated else "length"), None
    return Leaf(
        segment=-1,
        reward=path.reward,
        reward_parts=info.get("reward_parts", {"reward": path.reward}),
        origin=path.origin,
        end=end,
        answer=answer,
    )


def _fork(env: TokenEnv) -> TokenEnv:
    fork = getattr(env, "fork", None)
    return fork() if fork is not None else copy.deepcopy(env)


async def _step_env(
    env: TokenEnv, action: np.ndarray
) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
    step_async = getattr(env, "step_async", None)
    if step_async is not None:
        return await step_async(action)
    return await asyncio.to_thread(env.step, action)
