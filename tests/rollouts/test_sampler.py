import asyncio
import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rllib_arpo.engines.engine import SamplingParams
from rllib_arpo.engines.scripted_engine import ScriptedEngine, ScriptedReply
from rllib_arpo.errors import EngineError
from rllib_arpo.metrics import tree_metrics
from rllib_arpo.rollouts.branching import BRANCH_RULES, TreeSettings
from rllib_arpo.rollouts.sampler import grow_tree
from rllib_arpo.tree import (
    Message,
    RolloutTree,
    Task,
    ToolCall,
    Turn,
    path,
    path_token_ids,
)
from tests.rollouts.toy import (
    ANSWER,
    CALL,
    PROMPT,
    VOCAB_SIZE,
    Ledger,
    StepOnlyEnv,
    ToyEnv,
    random_script,
)
from tests.virtual_time import run_virtual

TASK = Task(task_id="t", messages=(Message(role="user", content="?"),), answers=("1",))


def grow(engine, env, tree_settings, seed=0) -> RolloutTree:
    return run_virtual(
        grow_tree(
            TASK,
            env=env,
            engine=engine,
            settings=tree_settings,
            sampling=SamplingParams(),
            vocab_size=VOCAB_SIZE,
            seed=seed,
        )
    )


def same(a: RolloutTree, b: RolloutTree) -> bool:
    return len(a.segments) == len(b.segments) and all(
        x.parent == y.parent
        and x.role == y.role
        and x.branch == y.branch
        and np.array_equal(x.token_ids, y.token_ids)
        and np.array_equal(x.logprobs, y.logprobs)
        for x, y in zip(a.segments, b.segments, strict=True)
    )


tree_shapes = st.builds(
    lambda initial, extra, factor, rule, k: TreeSettings(
        group_size=initial + extra,
        num_initial_rollouts=initial,
        branch_factor=factor,
        branch_rule=BRANCH_RULES[rule],
        entropy_probe_tokens=k,
    ),
    st.integers(1, 5),
    st.integers(0, 7),
    st.integers(2, 4),
    st.sampled_from(sorted(BRANCH_RULES)),
    st.integers(1, 8),
)


@settings(max_examples=60, deadline=None)
@given(tree_shapes, st.integers(0, 2**32), st.floats(0.0, 0.9))
def test_trees_have_exactly_their_leaves_and_repeat_for_a_seed(shape, seed, call_rate):
    script = random_script(call_rate)
    tree = grow(ScriptedEngine(script), ToyEnv(), shape, seed)
    assert len(tree.leaves) == shape.group_size
    assert same(tree, grow(ScriptedEngine(script), ToyEnv(), shape, seed))
    origins = [leaf.origin for leaf in tree.leaves]
    taken = sum(s.branch.taken for s in tree.segments if s.branch is not None)
    assert origins.count("branch") == taken
    assert taken <= shape.group_size - shape.num_initial_rollouts
    for number, segment in enumerate(tree.segments):
        assert (segment.parent is None) == (number == 0)
        assert segment.parent is None or segment.parent < number


@settings(max_examples=40, deadline=None)
@given(tree_shapes, st.integers(0, 2**32), st.floats(0.3, 0.9))
def test_every_path_holds_the_tokens_that_the_engine_saw(shape, seed, call_rate):
    engine = ScriptedEngine(random_script(call_rate))
    tree = grow(engine, ToyEnv(), shape, seed)
    seen = {tuple(r.prompt_token_ids.tolist()) for r in engine.requests}
    assert len(engine.requests) == len(tree)  # one request per turn, none twice
    for leaf in tree.leaves:
        tokens: list[int] = []
        for index in path(tree, leaf):
            segment = tree.segments[index]
            if segment.role == "model":
                assert tuple(tokens) in seen
                for column in (segment.logprobs, segment.entropies):
                    assert len(column) == len(segment.token_ids)
            tokens += segment.token_ids.tolist()
        assert tokens == path_token_ids(tree, leaf).tolist()


@settings(max_examples=40, deadline=None)
@given(tree_shapes, st.integers(0, 2**32))
def test_a_tool_call_is_executed_once_however_many_paths_share_it(shape, seed):
    ledger = Ledger()
    tree = grow(ScriptedEngine(random_script(0.7)), ToyEnv(ledger), shape, seed)
    calls = [s for s in tree.segments if s.role == "tool"]
    assert len(ledger.calls) == len(calls)


@settings(max_examples=40, deadline=None)
@given(tree_shapes, st.integers(0, 2**32))
def test_a_branch_starts_right_after_the_tool_result_that_was_measured(shape, seed):
    tree = grow(ScriptedEngine(random_script(0.8)), ToyEnv(), shape, seed)
    k = shape.entropy_probe_tokens
    children: dict[int, int] = {}
    for segment in tree.segments[1:]:
        children[segment.parent] = children.get(segment.parent, 0) + 1
    for segment in tree.segments:
        decision = segment.branch
        if decision is None:
            continue
        assert tree.segments[segment.parent].role == "tool"
        assert children[segment.parent] == 1 + decision.taken
        mean = segment.entropies[:k].mean() / math.log(VOCAB_SIZE)
        assert decision.entropy == pytest.approx(mean, abs=1e-6)
        root = next(
            tree.segments[i]
            for i in path_of(tree, segment)
            if tree.segments[i].role == "model"
        )
        initial = root.entropies[:k].mean() / math.log(VOCAB_SIZE)
        assert decision.entropy_change == pytest.approx(mean - initial, abs=1e-6)


def path_of(tree, segment):
    index = next(i for i, s in enumerate(tree.segments) if s is segment)
    return path(tree, replace(tree.leaves[0], segment=index))


def turn(*ids, entropy=0.0, delay_s=0.0):
    return ScriptedReply(token_ids=ids, entropies=entropy, delay_s=delay_s)


def test_threshold_branches_where_entropy_rose_and_nowhere_else():
    # One root: a turn of entropy 1, a tool, a turn of entropy 2: ΔH > 0, so P > 0.5.
    replies = [
        turn(20, CALL, entropy=1.0),
        turn(21, CALL, entropy=2.0),
        turn(30, ANSWER, entropy=0.5),  # the branch; asked for before the next turn
        turn(22, ANSWER, entropy=0.5),  # ΔH < 0: no branch
    ]
    shape = TreeSettings(group_size=3, num_initial_rollouts=1, entropy_probe_tokens=8)
    engine = ScriptedEngine([*replies, turn(40, ANSWER)])
    tree = grow(engine, ToyEnv(), shape)
    first, second = [s.branch for s in tree.segments if s.branch is not None]
    assert (first.wanted, first.taken) == (1, 1)
    assert (second.wanted, second.taken) == (0, 0)
    # ΔH = (2 - 1)/ln 100 = 0.21715, P = 0.5 + 0.2·0.21715 = 0.54343
    assert first.entropy_change == pytest.approx(0.21715, abs=1e-5)
    assert first.probability == pytest.approx(0.54343, abs=1e-5)
    assert [leaf.origin for leaf in tree.leaves] == ["initial", "branch", "refill"]


def test_no_branch_before_any_entropy_after_a_tool_exists():
    # The released code branches by a fair coin at the first tool call (defect 3).
    engine = ScriptedEngine([turn(20, ANSWER, entropy=4.0), turn(20, ANSWER)])
    shape = TreeSettings(
        group_size=2, num_initial_rollouts=1, branch_rule=BRANCH_RULES["always"]
    )
    tree = grow(engine, ToyEnv(), shape)
    assert all(segment.branch is None for segment in tree.segments)
    assert [leaf.origin for leaf in tree.leaves] == ["initial", "refill"]


def test_refills_start_all_at_once():
    def script(request):
        return turn(20, ANSWER, delay_s=1.0)

    ledger = Ledger()

    async def work():
        await grow_tree(
            TASK,
            env=ToyEnv(ledger),
            engine=ScriptedEngine(script),
            settings=TreeSettings(group_size=8, num_initial_rollouts=2),
            sampling=SamplingParams(),
            vocab_size=VOCAB_SIZE,
            seed=0,
        )
        return asyncio.get_running_loop().time()

    # 2 roots end at 1 s; the 6 that are left start together and end at 2 s.
    assert run_virtual(work()) == pytest.approx(2.0, abs=1e-6)


def test_a_slow_tool_delays_only_its_own_path():
    slow: list[tuple[int, ...]] = []

    def latency(history):
        if not slow:
            slow.append(history)
        return 3600.0 if history == slow[0] else 0.0

    def script(request):
        if len(request.prompt_token_ids) == len(PROMPT):
            first = 20 + request.seed % 70
            return turn(first, CALL, delay_s=0.1)
        return turn(21, ANSWER, delay_s=0.1)

    ledger = Ledger()
    tree = grow(
        ScriptedEngine(script),
        ToyEnv(ledger, latency=latency),
        TreeSettings(
            group_size=8, num_initial_rollouts=8, branch_rule=BRANCH_RULES["never"]
        ),
    )
    assert len(tree.leaves) == 8
    times = sorted(ledger.finish_times.values())
    assert times[-1] > 3600.0
    assert times[-2] < 1.0


def test_arrival_order_of_tools_does_not_number_the_tree():
    def run(latency):
        shape = TreeSettings(
            group_size=6, num_initial_rollouts=6, branch_rule=BRANCH_RULES["never"]
        )
        env = ToyEnv(latency=latency)
        return grow(ScriptedEngine(random_script(0.6)), env, shape, seed=5)

    assert same(run(lambda h: 0.0), run(lambda h: float(hash(h) % 17)))


def test_an_environment_with_step_alone_works():
    shape = TreeSettings(group_size=4, num_initial_rollouts=2)

    async def work():
        return await grow_tree(
            TASK,
            env=StepOnlyEnv(),
            engine=ScriptedEngine(random_script(0.5)),
            settings=shape,
            sampling=SamplingParams(),
            vocab_size=VOCAB_SIZE,
            seed=3,
        )

    assert len(asyncio.run(work()).leaves) == 4


def test_an_engine_that_fails_ends_the_tree_with_its_own_error():
    with pytest.raises(EngineError, match="no reply left"):
        grow(ScriptedEngine([]), ToyEnv(), TreeSettings())


def test_a_rule_of_the_user_sees_the_point_and_decides():
    seen = []

    def second_call_only(point):
        seen.append(point)
        return point.num_tool_calls == 2

    shape = TreeSettings(
        group_size=6, num_initial_rollouts=2, branch_rule=second_call_only
    )
    tree = grow(ScriptedEngine(random_script(0.9)), ToyEnv(), shape, seed=1)
    assert {p.num_tool_calls for p in seen} >= {1, 2}
    wanted = [s.branch.wanted for s in tree.segments if s.branch is not None]
    assert sum(wanted) == sum(p.num_tool_calls == 2 for p in seen)


def always(initial: int, size: int) -> TreeSettings:
    return TreeSettings(
        group_size=size,
        num_initial_rollouts=initial,
        branch_rule=BRANCH_RULES["always"],
    )


def test_a_refused_call_is_no_tool_result_to_branch_after():
    class Refusing(ToyEnv):
        """Refuses every call but the second of a path."""

        def fork(self):
            other = Refusing(self.ledger, max_tokens=self.max_tokens)
            other.history = self.history
            return other

        async def step_async(self, action):
            before = self.history.count(CALL)
            result, *middle, info = await super().step_async(action)
            call = info["turn"].tool_call
            if call is not None and before != 1:
                refused = replace(call, status="refused", num_attempts=0)
                info = {"turn": replace(info["turn"], tool_call=refused)}
            return result, *middle, info

    seen = []

    def rule(point):
        seen.append(point.num_tool_calls)
        return True

    calls = [turn(20, CALL, entropy=1.0) for _ in range(3)]
    engine = ScriptedEngine([*calls, *[turn(30, ANSWER)] * 3])
    shape = replace(always(initial=1, size=2), branch_rule=rule)
    tree = grow(engine, Refusing(), shape)
    refused = [s.tool_call.status == "refused" for s in tree.segments if s.tool_call]
    assert sorted(refused) == [False, True, True]
    assert seen == [1]  # the second call alone was made
    (decided,) = [s for s in tree.segments if s.branch is not None]
    assert tree.segments[decided.parent].tool_call.status == "ok"


def test_a_turn_without_a_token_is_not_measured_and_does_not_branch():
    # The engine has no room left after the result: its turn is empty.
    replies = [turn(20, CALL, entropy=1.0), turn(), turn(30, ANSWER)]
    tree = grow(ScriptedEngine(replies), ToyEnv(), always(initial=1, size=2))
    assert all(segment.branch is None for segment in tree.segments)
    assert [leaf.origin for leaf in tree.leaves] == ["initial", "refill"]
    assert [leaf.end for leaf in tree.leaves] == ["length", "answer"]


def test_a_call_whose_result_did_not_fit_still_stands_in_the_tree():
    class NoRoom(ToyEnv):
        """The result would leave the model no token, so the episode ends without."""

        def fork(self):
            return NoRoom(self.ledger, max_tokens=self.max_tokens)

        async def step_async(self, action):
            call = ToolCall(name="tool", arguments="", status="unavailable")
            turn = Turn(text="turn", tool_call=call, tool_result="too long")
            return np.zeros(0, np.int32), 0.0, False, True, {"turn": turn}

    shape = TreeSettings(group_size=1, num_initial_rollouts=1)
    tree = grow(ScriptedEngine([turn(20, CALL)]), NoRoom(), shape)
    assert [segment.role for segment in tree.segments] == ["prompt", "model", "tool"]
    assert tree.segments[2].tool_call.status == "unavailable"
    assert path_token_ids(tree, tree.leaves[0]).tolist() == [*PROMPT, 20, CALL]
    metrics = tree_metrics([tree], entropy_probe_tokens=8)
    assert (metrics["num_tool_calls"], metrics["tool_failure_share"]) == (1.0, 1.0)
