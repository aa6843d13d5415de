import asyncio

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer, Qwen2ForCausalLM

from rllib_arpo.envs.almanac import (
    DEFAULT_WORLD_ID,
    SPLITS,
    AlmanacEnv,
    AlmanacSearch,
    AlmanacWorld,
    search_result,
    shared_world,
)
from rllib_arpo.envs.almanac_expert import AlmanacExpert
from rllib_arpo.envs.almanac_model import BOX, TAGS, build_model, build_tokenizer
from rllib_arpo.errors import ConfigError
from rllib_arpo.tools.tool import Tool
from rllib_arpo.tree import Message, RolloutTree, Task


@pytest.fixture(scope="module")
def world() -> AlmanacWorld:
    return shared_world(0)


@pytest.fixture(scope="module")
def env(world: AlmanacWorld, tmp_path_factory: pytest.TempPathFactory) -> AlmanacEnv:
    folder = tmp_path_factory.mktemp("tokenizer")
    build_tokenizer(world, folder)
    return AlmanacEnv({"tokenizer": str(folder)})


def question(metadata: dict[str, object]) -> Task:
    asked = (Message(role="user", content="What is depth of a place?"),)
    return Task(task_id="typed", messages=asked, answers=(), metadata=metadata)


def replay(env: AlmanacEnv, tree: RolloutTree) -> float:
    """Step `env` with the tree's model turns; check every tool token, give reward."""

    async def run() -> float:
        prompt, _ = env.reset(options={"task": tree.task})
        np.testing.assert_array_equal(prompt, tree.segments[0].token_ids)
        reward, terminated = 0.0, False
        for segment, after in zip(
            tree.segments[1:], (*tree.segments[2:], None), strict=True
        ):
            if segment.role == "tool":
                continue
            assert not terminated
            observed, reward, terminated, _, _ = await env.step_async(segment.token_ids)
            expected = after.token_ids if after is not None else []
            np.testing.assert_array_equal(observed, expected)
        assert terminated
        return reward

    return asyncio.run(run())


def test_splits_share_neither_facts_nor_world_ids(world: AlmanacWorld) -> None:
    facts = [set(world.fact_pairs(split)) for split in SPLITS]
    ids = [{t.metadata["world_id"] for t in world.tasks(s, 300)} for s in SPLITS]
    for groups in (facts, ids):
        assert not groups[0] & groups[1] | groups[0] & groups[2] | groups[1] & groups[2]
    # 64 names x 6 attributes = 384 facts, a sixth = 64 for each held-out split
    assert [len(group) for group in facts] == [256, 64, 64]


def test_questions_ask_only_about_the_facts_of_their_split(world: AlmanacWorld) -> None:
    for split in SPLITS:
        asked = {
            lookup
            for task in world.tasks(split, 200)
            for lookup in task.metadata["question"].lookups
            if lookup[1] != "neighbor"
        }
        assert asked <= set(world.fact_pairs(split))


def test_all_kinds_are_asked_about_as_often_as_promised(world: AlmanacWorld) -> None:
    sources = [task.source for task in world.tasks("train", 1000)]
    # 40/30/30 %; three standard deviations of a share of 1000 draws are 4.6 points
    for kind, share in (("one_hop", 400), ("two_lookups", 300), ("bridge", 300)):
        assert abs(sources.count(f"almanac_{kind}") - share) < 46


def test_values_are_drawn_anew_for_every_world_id(world: AlmanacWorld) -> None:
    name, field = world.fact_pairs("train")[0]
    values = {int(world.value(i, name, field)) for i in range(1000)}
    # 1,000 draws of 90 numbers miss a given one with chance (89/90)^1000 = 1e-5
    assert values == set(range(10, 100))


def test_an_unknown_split_is_refused(world: AlmanacWorld) -> None:
    with pytest.raises(ConfigError, match="'dev'"):
        world.tasks("dev", 1)  # type: ignore[arg-type]


def test_search_is_a_function_of_edition_and_query(world: AlmanacWorld) -> None:
    query = "depth " + world.names[0]
    again = AlmanacWorld(0)
    assert world.search(5, query) == again.search(5, f" {query} ")
    answers = {tuple(world.search(i, query)) for i in range(20)}
    assert len(answers) == 20
    assert world.search(5, "12 ?") == []


def test_the_right_line_stands_first_lower_or_is_missing(world: AlmanacWorld) -> None:
    places = {"first": 0, "lower": 0, "missing": 0}
    for world_id in range(400):
        name = world.names[world_id % len(world.names)]
        hits = world.search(world_id, f"depth {name}")
        assert len(hits) == 3
        line = f"depth {name} = {world.value(world_id, name, 'depth')}"
        if line not in hits:
            places["missing"] += 1
        else:
            places["lower" if hits.index(line) else "first"] += 1
    assert places["first"] > places["lower"] > places["missing"] > 20


def test_hits_of_a_full_query_confuse_names_and_never_fields(
    world: AlmanacWorld,
) -> None:
    hits = [
        hit
        for i in range(100)
        for hit in world.search(i, f"area {world.names[i % 64]}")
    ]
    assert {hit.split()[0] for hit in hits} == {"area"}
    assert len({hit.split()[1] for hit in hits}) > 32


@pytest.mark.parametrize(
    ("metadata", "edition"),
    [({}, DEFAULT_WORLD_ID), ({"world_id": 3}, 3), ({"world_id": "3"}, 3)],
)
def test_a_question_is_answered_from_the_edition_it_names_or_the_first(
    world: AlmanacWorld, env: AlmanacEnv, metadata: dict[str, object], edition: int
) -> None:
    search = env.make_tools(question(metadata))[0]
    found = asyncio.run(search.call(f"depth {world.names[0]}"))
    assert found == search_result(world.search(edition, f"depth {world.names[0]}"))
    assert found != search_result(world.search(edition + 1, f"depth {world.names[0]}"))


@pytest.mark.parametrize("named", ["three", "-1", -1, 1.5, "²", ""])
def test_an_edition_that_is_no_number_is_refused(
    env: AlmanacEnv, named: object
) -> None:
    with pytest.raises(ConfigError, match="world_id"):
        env.make_tools(question({"world_id": named}))


def test_the_search_tool_follows_the_protocol_of_tools(world: AlmanacWorld) -> None:
    tool = AlmanacSearch(world, 3)
    assert isinstance(tool, Tool)
    query = "area " + world.names[9]
    shown = asyncio.run(tool.fork().call(query))
    assert shown.split("\n") == [f" {line}" for line in world.search(3, query)]
    assert asyncio.run(tool.call("???")) == " no hits"


def test_clean_traces_earn_the_full_reward_and_replay_token_for_token(
    world: AlmanacWorld, env: AlmanacEnv
) -> None:
    trees = AlmanacExpert(world).traces(
        60, dialogue=env.dialogue, clean_fraction=1.0, split="test"
    )
    # accuracy 1 and 0.1 for using both tools
    assert [replay(env, tree) for tree in trees] == pytest.approx([1.1] * 60)


def test_imperfect_traces_replay_token_for_token_and_fail_in_every_way(
    world: AlmanacWorld, env: AlmanacEnv
) -> None:
    trees = AlmanacExpert(world).traces(100, dialogue=env.dialogue, clean_fraction=0.0)
    # broken format, wrong, right
    assert {round(replay(env, tree), 1) for tree in trees} >= {-1.0, 0.0, 1.1}


def test_decoding_gives_back_every_trace(world: AlmanacWorld, env: AlmanacEnv) -> None:
    for tree in AlmanacExpert(world).traces(50, dialogue=env.dialogue, seed=4):
        for segment in tree.segments:
            text = env.tokenizer.decode(segment.token_ids)
            wrapped = f"<result>{segment.text}</result>"
            assert text == (wrapped if segment.role == "tool" else segment.text)


def test_numbers_names_and_tags_are_single_tokens(
    world: AlmanacWorld, env: AlmanacEnv
) -> None:
    names = [f" {name}" for name in world.names]
    pieces = [*names, *(f" {n}" for n in range(100)), " depth", " =", BOX, *TAGS]
    assert {len(env.tokenizer.encode(piece)) for piece in pieces} == {1}
    text = "any text: ünï, 12345 {} \n\t<result>"
    assert env.tokenizer.decode(env.tokenizer.encode(text)) == text


def test_the_model_is_an_ordinary_folder_and_a_function_of_its_seed(
    env: AlmanacEnv, tmp_path
) -> None:
    env.tokenizer.save_pretrained(tmp_path)
    first = build_model(env.tokenizer, tmp_path, seed=3)
    second = Qwen2ForCausalLM.from_pretrained(tmp_path)
    other = build_model(env.tokenizer, tmp_path / "other", seed=4)
    weight = first.model.layers[0].mlp.up_proj.weight
    assert weight.equal(second.model.layers[0].mlp.up_proj.weight)
    assert not weight.equal(other.model.layers[0].mlp.up_proj.weight)
    assert 100_000 < first.num_parameters() < 200_000
    # What a user's own code would load from the exported folder.
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert len(loaded) == first.config.vocab_size
    text = f" depth {shared_world(0).names[0]} = 44<search>-101 9801"
    assert loaded.encode(text) == env.tokenizer.encode(text)


def test_a_fresh_model_finds_the_value_behind_a_name_but_knows_no_answer(
    world: AlmanacWorld, env: AlmanacEnv, tmp_path
) -> None:
    """What the module says of the three heads, and no more than that."""
    model = build_model(env.tokenizer, tmp_path, seed=0)
    rng = np.random.default_rng(0)
    copied = 0
    for _ in range(60):
        names = rng.choice(world.names, 3, replace=False)
        values = rng.choice(np.arange(10, 100), 3, replace=False)
        lines = "\n".join(
            f" depth {n} = {v}" for n, v in zip(names, values, strict=True)
        )
        text = f"<result>{lines}</result><python> {names[1]} ="
        with torch.no_grad():
            ids = torch.tensor([env.tokenizer.encode(text)])
            logits = model(input_ids=ids).logits[0, -1]
        candidates = [env.tokenizer.encode(f" {v}")[0] for v in values]
        copied += int(logits[candidates].argmax() == 1)
    # chance is 20 of 60; five standard deviations above it is 38
    assert copied > 38
    tasks = world.tasks("test", 20)
    prompts = [env.dialogue.prompt_ids(task.messages) for task in tasks]
    with torch.no_grad():
        firsts = {
            int(model(input_ids=torch.tensor(ids)[None].long()).logits[0, -1].argmax())
            for ids in prompts
        }
    assert env.tokenizer.encode("<search>")[0] not in firsts
