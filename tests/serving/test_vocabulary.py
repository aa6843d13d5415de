"""Weights of another tokenizer are told from those of the same."""

import json
import shutil
from pathlib import Path

from rllib_arpo.agent_weights import find_weights, vocabulary_of
from tests.tiny_runs import ColdStart


def test_a_checkpoint_has_the_vocabulary_of_its_model(
    cold_start: ColdStart, almanac_model: str
) -> None:
    sources = (almanac_model, cold_start.model, cold_start.checkpoint)
    assert len({vocabulary_of(find_weights(source)) for source in sources}) == 1


def test_two_words_that_change_places_make_another_vocabulary(
    almanac_model: str, tmp_path: Path
) -> None:
    folder = swapped(almanac_model, tmp_path / "swapped")
    same, other = (vocabulary_of(find_weights(str(f))) for f in (almanac_model, folder))
    assert same != other


def swapped(model: str, folder: Path) -> Path:
    """The model with the ids of two words exchanged."""
    shutil.copytree(model, folder)
    file = folder / "tokenizer.json"
    tokenizer = json.loads(file.read_text())
    vocabulary = tokenizer["model"]["vocab"]
    first, second = sorted(vocabulary, key=vocabulary.get)[-2:]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    file.write_text(json.dumps(tokenizer))
    return folder
