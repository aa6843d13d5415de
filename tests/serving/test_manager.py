from rllib_arpo.serving.manager import MAX_DELAY_S, Tries


def test_weights_that_cannot_be_loaded_are_tried_ever_more_rarely():
    tries = Tries(first_s=10.0)
    assert tries.may_try("3", 0.0)
    tries.failed("3", 0.0)
    assert not tries.may_try("3", 9.0)
    assert tries.may_try("3", 10.0)
    tries.failed("3", 10.0)
    assert not tries.may_try("3", 29.0)
    assert tries.may_try("3", 30.0)
    for _ in range(20):
        tries.failed("3", 30.0)
    assert not tries.may_try("3", 30.0 + MAX_DELAY_S - 1)
    assert tries.may_try("3", 30.0 + MAX_DELAY_S)


def test_another_version_is_tried_at_once():
    tries = Tries(first_s=10.0)
    tries.failed("3", 0.0)
    tries.failed("3", 10.0)
    assert tries.may_try("4", 11.0)
    tries.failed("4", 11.0)
    assert not tries.may_try("4", 20.0)
    assert tries.may_try("4", 21.0)
