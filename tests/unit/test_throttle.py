"""How often somebody may guess."""

from __future__ import annotations

from core4.api.throttle import Throttle


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def test_ten_tries_then_a_wait() -> None:
    """The eleventh try is told how long to wait, and after that there is one."""
    clock = Clock()
    throttle = Throttle(10, 300.0, clock=clock)

    assert [throttle.take("ann") for _ in range(10)] == [0.0] * 10
    assert throttle.take("ann") == 30.0
    clock.now += 30.0
    assert throttle.take("ann") == 0.0
    assert throttle.take("ann") > 0


def test_others_are_not_harmed() -> None:
    """Each key has its own tries."""
    throttle = Throttle(1, 300.0, clock=Clock())
    throttle.take("ann")

    assert throttle.take("bob") == 0.0


def test_what_was_right_does_not_count() -> None:
    """A try that is given back can be used again, but there are never more than ten."""
    throttle = Throttle(10, 300.0, clock=Clock())
    for _ in range(50):
        assert throttle.take("ann") == 0.0
        throttle.give_back("ann")
    throttle.give_back("ann")

    assert [throttle.take("ann") for _ in range(10)] == [0.0] * 10
    assert throttle.take("ann") > 0
