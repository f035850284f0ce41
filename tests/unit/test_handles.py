"""What the clients of functions ask for, and what they do about an answer that does not come."""

from __future__ import annotations

from typing import Any

import pytest

from core4 import handles
from core4.client import ApiError, QueueTimeout, Unreachable
from core4.handles import Pause, Request

BUSY = ApiError(429, "too many wait", headers={"Retry-After": "2"})


def body_of(request: Request | Pause) -> dict[str, Any]:
    assert isinstance(request, Request)
    return dict(request.body or {})


@pytest.mark.row("M42")
@pytest.mark.parametrize("trouble", [Unreachable("gone"), BUSY])
def test_records_whose_answer_got_lost_are_asked_for_again(trouble: Exception) -> None:
    """With the same token, which gives the same ones; the next have another."""
    steps = handles.pulled(["one", "two"], 2, 60)
    first = body_of(next(steps))
    assert isinstance(steps.throw(trouble), Pause)
    assert body_of(steps.send({}))["token"] == first["token"]

    second = steps.send({"data": [{"job_id": "a"}]})
    assert (body_of(second)["size"], body_of(second)["token"] == first["token"]) == (1, False)
    third = steps.send({"data": [{"job_id": "b"}]})
    assert isinstance(third, Request)
    assert (third.path, body_of(third)["size"]) == ("return/pull/two", 2)
    with pytest.raises(StopIteration) as done:
        steps.send({"data": [{"job_id": "b"}, {"job_id": "a"}]})
    assert done.value.value == ["b", "a"]


@pytest.mark.parametrize("trouble", [Unreachable("gone"), BUSY, ApiError(403, "no")])
def test_who_has_no_time_left_is_told(trouble: Exception) -> None:
    steps = handles.pulled(["one"], 1, 0)
    next(steps)
    with pytest.raises(type(trouble)):
        steps.throw(trouble)

    steps = handles.pulled(["one"], 1, 0)
    next(steps)
    with pytest.raises(QueueTimeout, match="0 of 1 records"):
        steps.send({"data": []})
