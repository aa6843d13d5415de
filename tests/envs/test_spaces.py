import pickle

import numpy as np
import pytest

from rllib_arpo.envs.spaces import TokenSequence


def test_a_sample_is_contained():
    space = TokenSequence(7, seed=1)
    samples = [space.sample() for _ in range(50)]
    assert all(space.contains(sample) for sample in samples)
    assert len({len(sample) for sample in samples}) > 1


@pytest.mark.parametrize(
    "outside",
    [
        np.array([0, 7], np.int32),  # ids run to 6
        np.array([-1], np.int32),
        np.array([[1]], np.int32),
        np.array([1], np.int64),
        np.array([1.0], np.float32),
        [1],
        (1, 2),
    ],
)
def test_other_things_are_not_contained(outside):
    assert not TokenSequence(7).contains(outside)


def test_an_empty_sequence_is_contained():
    assert np.zeros(0, np.int32) in TokenSequence(7)


def test_spaces_are_equal_by_vocabulary_and_survive_pickle_and_json():
    space = TokenSequence(7)
    assert pickle.loads(pickle.dumps(space)) == space
    assert space != TokenSequence(8)
    assert not space.is_np_flattenable
    ids = [np.array([1, 2], np.int32), np.zeros(0, np.int32)]
    restored = space.from_jsonable(space.to_jsonable(ids))
    assert [x.tolist() for x in restored] == [[1, 2], []]
    assert all(x in space for x in restored)


def test_same_seed_same_samples():
    first, second = TokenSequence(99, seed=3), TokenSequence(99, seed=3)
    for _ in range(5):
        np.testing.assert_array_equal(first.sample(), second.sample())


def test_a_vocabulary_needs_a_token():
    with pytest.raises(ValueError, match="vocab_size"):
        TokenSequence(0)
