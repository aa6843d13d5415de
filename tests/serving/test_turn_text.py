from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rllib_arpo.envs.chat_dialogue import ChatTemplateDialogue
from rllib_arpo.envs.tag_dialogue import TagDialogue
from rllib_arpo.serving.turn_text import (
    BROKEN,
    ThoughtReader,
    TurnReader,
    overlap,
    starts_thinking,
)
from rllib_arpo.tools.tool import tool_spec
from tests.envs.fake_tools import FakeTool
from tests.tokenizers import llama_like, qwen3_with_tools, qwen_like

TOKENIZERS = {"qwen": qwen_like(), "llama": llama_like()}


def pieces_of(values: list[Any], cuts: list[int]) -> list[list[Any]]:
    places = [0, *sorted({cut % (len(values) + 1) for cut in cuts}), len(values)]
    return [values[a:b] for a, b in pairwise(places)]


def read(reader: TurnReader, pieces: list[list[int]]) -> list[str]:
    return [*(reader.feed(piece) for piece in pieces), reader.finish()]


@settings(max_examples=200, deadline=None)
@given(
    name=st.sampled_from(sorted(TOKENIZERS)),
    ids=st.lists(st.integers(0, 380), max_size=40),
    cuts=st.lists(st.integers(0, 100), max_size=40),
)
def test_pieces_of_any_tokens_join_to_the_text_of_all(
    name: str, ids: list[int], cuts: list[int]
):
    dialogue = TagDialogue(TOKENIZERS[name])
    pieces = read(TurnReader(dialogue), pieces_of(ids, cuts))
    assert "".join(pieces) == dialogue.decode(np.array(ids, np.int32))[0]


@settings(max_examples=100, deadline=None)
@given(text=st.text(max_size=20))
def test_no_piece_holds_half_a_character(text: str):
    dialogue = TagDialogue(TOKENIZERS["qwen"])
    ids = dialogue.model_ids(text).tolist()
    pieces = read(TurnReader(dialogue), [[one] for one in ids])
    assert "".join(pieces) == text
    assert BROKEN in text or not any(BROKEN in piece for piece in pieces)


@settings(max_examples=200, deadline=None)
@given(
    text=st.text("ab<STOP>", max_size=25),
    stop=st.sampled_from([("STOP",), ("<S", "TO"), ("aa", "ab")]),
    cuts=st.lists(st.integers(0, 40), max_size=25),
)
def test_nothing_of_a_stop_text_is_ever_shown(
    text: str, stop: tuple[str, ...], cuts: list[int]
):
    dialogue = TagDialogue(TOKENIZERS["qwen"])
    ids = dialogue.model_ids(text).tolist()
    reader = TurnReader(dialogue, stop)
    shown = "".join(read(reader, pieces_of(ids, cuts)))
    places = [text.find(one) for one in stop if one in text]
    assert shown == reader.text == text[: min(places, default=len(text))]
    assert reader.cut == min(places, default=None)


def test_the_end_of_text_token_is_not_shown():
    dialogue = TagDialogue(TOKENIZERS["qwen"])
    ids = dialogue.model_ids("ab<|im_end|>").tolist()
    reader = TurnReader(dialogue)
    assert "".join(read(reader, [[one] for one in ids])) == "ab"
    assert reader.ended_by_token


@settings(max_examples=200, deadline=None)
@given(
    thoughts=st.lists(st.text("a b\n", max_size=8), max_size=3),
    cuts=st.lists(st.integers(0, 80), max_size=30),
)
def test_thoughts_are_what_stands_between_the_tags(
    thoughts: list[str], cuts: list[int]
):
    text = "x" + "y".join(f"<think>{thought}</think>" for thought in thoughts)
    reader = ThoughtReader()
    pieces = ["".join(piece) for piece in pieces_of(list(text), cuts)]
    read_back = "".join(map(reader.feed, pieces)) + reader.finish()
    expected = [thought.strip() for thought in thoughts if thought.strip()]
    assert read_back == "\n\n".join(expected)


def test_thoughts_that_are_cut_or_open_from_the_start_are_read():
    cut = ThoughtReader(follows=True)
    assert cut.feed("<think>why </thi") + cut.finish() == "\n\nwhy </thi"
    opened = ThoughtReader(inside=True)
    assert opened.feed("\nwhy\n</think>a") + opened.finish() == "why"


def test_a_template_that_opens_the_thoughts_is_recognised():
    tokenizer = qwen3_with_tools()
    spec = tool_spec(FakeTool("a"))
    assert not starts_thinking(ChatTemplateDialogue(tokenizer, [spec]))
    assert not starts_thinking(TagDialogue(tokenizer))
    opening = "<|im_start|>assistant\n{% if enable_thinking"
    assert opening in tokenizer.chat_template
    tokenizer.chat_template = str(tokenizer.chat_template).replace(
        opening, "<|im_start|>assistant\n<think>\n{% if enable_thinking"
    )
    assert starts_thinking(ChatTemplateDialogue(tokenizer, [spec]))


@pytest.mark.parametrize(
    ("text", "tag", "length"),
    [
        ("ab<th", "<think>", 3),
        ("<think>", "<think>", 0),
        ("aa", "aab", 2),
        ("", "a", 0),
    ],
)
def test_overlap_is_the_part_of_a_tag_at_the_end(text: str, tag: str, length: int):
    assert overlap(text, tag) == length
