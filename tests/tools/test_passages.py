from hypothesis import given
from hypothesis import strategies as st

from rllib_arpo.tools.passages import (
    GAP,
    PASSAGE_TOKENS,
    estimate_tokens,
    excerpt,
    split_passages,
)

FILLER = [f"Paragraph {i} tells of clouds and rain over the hills." for i in range(50)]


def page_with(*texts: str) -> str:
    """Those texts spread among fillers."""
    lines = list(FILLER)
    for number, text in enumerate(texts):
        lines.insert(10 * number + 5, text * 4)
    return "\n".join(lines)


def test_the_passages_of_the_question_are_kept_in_the_order_of_the_page():
    text = page_with("The bridge was built by Ada Low. ", "A bridge of steel, Ada! ")
    kept = excerpt(text, "Did Ada build a bridge?", max_tokens=120)
    first, second = kept.text.index("built by Ada"), kept.text.index("of steel")
    assert first < second
    assert kept.text.startswith(GAP)
    assert kept.text.endswith(GAP)
    assert kept.num_passages < kept.num_in_all


def test_the_best_passage_is_kept_when_there_is_room_for_one():
    text = page_with("The river is long. ", "The river Ouse is deep. ")
    kept = excerpt(text, "How deep is the river Ouse?", max_tokens=24)
    assert "Ouse is deep" in kept.text
    assert "is long" not in kept.text


def test_without_a_common_word_the_page_is_read_from_its_start():
    kept = excerpt(page_with(), "xylophone", max_tokens=60)
    assert kept.text.startswith(FILLER[0])
    assert kept.text.endswith(GAP)


def test_a_short_page_is_kept_whole():
    kept = excerpt("one line\n\nanother line", "line", max_tokens=100)
    assert kept == ("one line\nanother line", 1, 1)


def test_what_has_no_words_is_still_kept():
    assert excerpt("!!! ???", "what", max_tokens=10).text == "!!! ???"


def test_chinese_is_matched_by_its_characters():
    text = "\n".join(["天气晴朗山上有云。" * 6] * 20 + ["这座桥由李春建造。" * 6])
    kept = excerpt(text, "赵州桥是谁建造的", max_tokens=120)
    assert "李春建造" in kept.text


def test_the_same_text_gives_the_same_passages():
    text = page_with("The bridge. ")
    results = {excerpt(text, "bridge of clouds", max_tokens=90) for _ in range(3)}
    assert len(results) == 1


def test_a_counter_of_the_user_decides_what_fits():
    text = page_with()
    words = excerpt(
        text, "clouds", max_tokens=60, count_tokens=lambda text: len(text.split())
    )
    assert len(words.text.split()) <= 60 + 2  # the gaps at both ends
    assert words.num_passages > excerpt(text, "clouds", max_tokens=60).num_passages


def test_a_paragraph_without_an_end_is_cut():
    passages = split_passages("word " * 1000 + "x" * 5000, PASSAGE_TOKENS)
    assert all(estimate_tokens(passage) <= PASSAGE_TOKENS for passage in passages)
    assert "".join(passages).count("x") == 5000


def test_long_paragraphs_are_cut_at_sentences():
    text = "The sun is far away. The moon is near. " * 20
    for passage in split_passages(text, 40):
        assert passage.endswith(".")


@given(st.text(max_size=400), st.text(max_size=40), st.integers(1, 60))
def test_nothing_is_invented_and_the_cap_holds(text, question, max_tokens):
    kept = excerpt(text, question, max_tokens=max_tokens)
    pieces = [line for line in kept.text.split("\n") if line != GAP]
    assert all(piece in text for piece in pieces)
    if kept.num_passages > 1:
        ends = estimate_tokens(f"{GAP}\n\n{GAP}")
        assert estimate_tokens(kept.text) <= max_tokens + ends


@given(st.text(), st.integers(1, 50))
def test_passages_hold_every_letter_of_the_text(text, max_tokens):
    passages = split_passages(text, max_tokens)
    assert "".join("".join(passages).split()) == "".join(text.split())
    assert all(passage.strip() for passage in passages)
