import numpy as np
import pytest

from rllib_arpo.engines.weights import (
    PROBE_LENGTH,
    TOLERANCE,
    WeightProbe,
    check_arrays,
    check_probe,
    probe_token_ids,
)
from rllib_arpo.errors import WeightSyncError

PROBE = WeightProbe(
    token_ids=np.arange(5, dtype=np.int32),
    logprobs=np.array([-1.0, -2.0, -3.0, -4.0], np.float32),
)
SHAPES = {"embed": (4, 2), "head": (4, 2), "norm": (2,)}
REQUIRED = [{"embed", "head"}, {"norm"}]


def arrays(**shapes: tuple[int, ...]) -> dict[str, np.ndarray]:
    return {name: np.zeros(shape, np.float32) for name, shape in shapes.items()}


def check(given: dict[str, np.ndarray]) -> None:
    check_arrays(given, shapes=SHAPES, required=REQUIRED, model="tiny")


def test_the_probe_is_the_same_for_every_caller_and_in_the_vocabulary() -> None:
    ids = probe_token_ids(50)
    assert ids.dtype == np.int32
    assert ids.shape == (PROBE_LENGTH,)
    assert 0 <= ids.min() <= ids.max() < 50
    assert ids.tolist() == probe_token_ids(50).tolist()


@pytest.mark.parametrize("dtype", sorted(TOLERANCE))
def test_scores_within_the_tolerance_pass_and_beyond_it_stop(dtype: str) -> None:
    limit = TOLERANCE[dtype]
    # One of four is off, so the mean is a quarter of it.
    within, beyond = PROBE.logprobs.copy(), PROBE.logprobs.copy()
    within[1] += 3.9 * limit
    beyond[1] -= 4.1 * limit
    assert check_probe(PROBE, within, dtype=dtype) == pytest.approx(
        0.975 * limit, rel=0.01
    )
    with pytest.raises(WeightSyncError, match=rf"at most {limit:g} in {dtype}"):
        check_probe(PROBE, beyond, dtype=dtype)


def test_scores_that_are_not_numbers_stop() -> None:
    with pytest.raises(WeightSyncError, match="nan"):
        check_probe(PROBE, PROBE.logprobs * np.nan, dtype="float32")


def test_tied_weights_fit_under_either_name() -> None:
    check(arrays(embed=(4, 2), norm=(2,)))
    check(arrays(head=(4, 2), norm=(2,)))


def test_weights_that_do_not_fit_are_named() -> None:
    with pytest.raises(WeightSyncError, match="do not fit tiny") as error:
        check(arrays(head=(4, 3), extra=(1,)))
    assert "unknown extra" in str(error.value)
    assert "missing norm" in str(error.value)
    assert "head has shape (4, 3), expected (4, 2)" in str(error.value)
    assert "embed" not in str(error.value)


def test_a_long_list_of_problems_is_cut() -> None:
    wrong = {f"extra{i}": (1,) for i in range(12)}
    with pytest.raises(WeightSyncError, match="and 4 more") as error:
        check(arrays(embed=(4, 2), norm=(2,), **wrong))
    assert "extra7" in str(error.value)
    assert "extra8" not in str(error.value)
