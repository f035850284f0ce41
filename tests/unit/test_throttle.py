"""How often somebody may guess."""

from __future__ import annotations

import pytest

from core4.api.throttle import PER_USER, Seats, SignIns, Throttle
from core4.errors import TooManyRequests, Unavailable


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


def test_an_owner_is_not_locked_out_from_elsewhere() -> None:
    """Who has signed in from an address has guesses of his own there, and only there."""
    sign_ins = SignIns()
    sign_ins.take("ann", "home")
    sign_ins.give_back("ann", "home")
    for _ in range(PER_USER):
        sign_ins.take("ann", "elsewhere")
    for address in ("elsewhere", "anywhere"):
        with pytest.raises(TooManyRequests):
            sign_ins.take("ann", address)

    for _ in range(PER_USER):
        sign_ins.take("ann", "home")
    with pytest.raises(TooManyRequests):
        sign_ins.take("ann", "home")


def test_seats() -> None:
    """So many of one, so many of all, and free again whatever ended it."""
    seats = Seats(3, 2)
    with seats.taken("ann"), seats.taken("ann"):
        with pytest.raises(TooManyRequests) as refused, seats.taken("ann", job_id="7"):
            pass
        assert (refused.value.facts["job_id"], refused.value.facts["retry_after"]) == ("7", 5.0)
        with seats.taken("bob"), pytest.raises(Unavailable):
            seats.check("eve")
        seats.check("eve")
    seats.check("ann")
