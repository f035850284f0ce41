"""What the clients of functions ask for, and what they do about an answer that does not come."""

from __future__ import annotations

from typing import Any

import pytest

from core4 import handles
from core4.client import ApiError, QueueTimeout, Unreachable
from core4.errors import BadArguments, BadOption
from core4.handles import JobFailed, Key, Pause, Record, Request, WaitTimeout
from tests.jobs import shipped

BUSY = ApiError(429, "too many wait", headers={"Retry-After": "2"})
OPTIONS: dict[str, Any] = {
    "name": None,
    "category": "",
    "timeout": 0,
    "dependencies": None,
    "die": True,
    "args_replace": None,
    "return_queues": None,
    "return_queues_reset": None,
    "kwargs": {},
}


def asked(function: Any = shipped.addition, **options: Any) -> list[Request]:
    """What scheduling a function asks of the API."""
    steps = handles.schedule(
        function, Key("ann", "secret"), **{**OPTIONS, "kwargs": {"a": 1, "b": 2}, **options}
    )
    found, request = [], next(steps)
    try:
        while True:
            assert isinstance(request, Request)
            found.append(request)
            request = steps.send({"data": {}})
    except StopIteration:
        return found


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


@pytest.mark.row("M42")
def test_one_return_queue_may_be_given_as_its_name() -> None:
    for given in ("q9", ["q9"], ("q9",), {"q9"}):
        reset, call = asked(return_queues=given, return_queues_reset=given)
        assert (reset.path, body_of(call)["return_queues"]) == ("return/reset/q9", ["q9"])
        pull = next(handles.pulled(given, 1, 0))
        assert isinstance(pull, Request)
        assert pull.path == "return/pull/q9"
    assert [body_of(each)["return_queues"] for each in asked()] == [[]]


@pytest.mark.parametrize("wrong", [True, 5, "", "a b", ["q", 5], [["q"]], [None], b"q"])
@pytest.mark.parametrize("option", ["return_queues", "return_queues_reset"])
def test_what_is_no_name_of_a_queue_is_refused(option: str, wrong: Any) -> None:
    """Before anything is asked."""
    with pytest.raises(BadOption, match=rf"{option} is .*, expected the name of a return queue or a list"):
        asked(**{option: wrong})


def job(number: int, state: str = "OK", **fields: Any) -> Record:
    """What is known of a job of `addition`."""
    job_id = f"{number:024x}"
    failed = {"message": "it broke", "traceback": ""} if state == "ERROR" else {}
    return Record(
        {
            "id": job_id,
            "name": f"j{job_id}",
            "qual_name": "core4.function.addition",
            "state": state,
            "error": failed,
            "error_cat": "ERROR" if failed else "NA",
            "die": True,
            **fields,
        }
    )


def test_a_failure_is_raised_with_all_that_were_waited_for() -> None:
    """Who took them out of a return queue knows of no other way to the others' results."""
    jobs = [job(1), job(2, "ERROR"), job(3)]
    with pytest.raises(JobFailed) as raised:
        handles.judge(jobs, timeout=None, die=None)
    assert (raised.value.job, raised.value.jobs) == (jobs[1], jobs)
    assert handles.judge(jobs, timeout=None, die=False) is True


@pytest.mark.row("M5", "M7")
def test_jobs_are_told_with_their_function() -> None:
    plain, named = job(1), job(2, "ERROR", name="nightly")
    assert repr(plain) == f"<job addition OK {plain.id}>"
    assert repr(named) == f"<job addition [nightly] ERROR {named.id}>"
    assert str(JobFailed(named)) == f"job addition [nightly] ({named.id}) failed: it broke"
    late = WaitTimeout(2, [job(3, "NEW", debug=True), plain])
    assert str(late).startswith("1 of 2 jobs have not ended within 2 s: addition [j")


def test_a_wait_for_a_debug_job_says_who_runs_it() -> None:
    """It is not the others' fault that it waits."""
    hint = "`core4 worker --debug`"
    assert hint in str(WaitTimeout(2, [job(1, "NEW", debug=True), job(2, "NEW")]))
    for jobs in ([job(1, "RUNNING", debug=True)], [job(1, debug=True), job(2, "NEW")]):
        assert hint not in str(WaitTimeout(2, jobs))


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"args_replace": "Bern"}, "args_replace is 'Bern', expected a mapping"),
        ({"name": 1}, r"name is 1, expected a text; arguments of the function are passed by name"),
        ({"category": 2}, r"category is 2, expected a text; arguments of the function are passed by name"),
    ],
)
def test_options_of_a_wrong_type_are_told(options: dict[str, Any], why: str) -> None:
    with pytest.raises(BadOption, match=why):
        asked(**options)


@pytest.mark.parametrize(
    ("kwargs", "why"),
    [
        ({"a": 1, "b": 2, "timout": 5}, r"has no parameter .timout.; did you mean the option `timeout`\?"),
        ({"a": 1, "b": 2, "returnqueues": []}, r"did you mean the option `return_queues`\?"),
        ({"a": 1, "b": 2, "x": 5}, r"has no parameter .x.$"),
        ({"a": 1}, r"needs .b.; arguments of the function are passed by name"),
        ({}, r"needs .a.; arguments of the function are passed by name"),
    ],
)
def test_arguments_that_do_not_fit_are_told_with_what_was_meant(kwargs: dict[str, Any], why: str) -> None:
    with pytest.raises(BadArguments, match=why):
        asked(kwargs=kwargs)


def test_a_parameter_that_was_meant_is_named() -> None:
    with pytest.raises(BadArguments, match=r"no parameter .nummber.; did you mean .number.\?"):
        asked(shipped.numbered, kwargs={"nummber": 1})


@pytest.mark.row("M26")
def test_values_that_no_text_names_are_refused() -> None:
    """But for those of who passes all that he has."""
    sent = asked(shipped.template, kwargs={}, args_replace={"name": "you", "more": object(), "sums": 1})
    assert "hello you" in body_of(sent[0])["code"]
    for values, why in (
        ({"city": "Bern"}, r"would fill nothing: no text of template has \{city\} in it"),
        ({"nam": "you"}, r"has .nam., no text of template names it; did you mean .name.\?"),
        ({"name": "you", "cuont": 3}, r"has .cuont., .*; did you mean .count.\?"),
    ):
        with pytest.raises(BadOption, match=why):
            asked(shipped.template, kwargs={}, args_replace=values)
    with pytest.raises(BadOption, match="would fill nothing"):
        asked(args_replace={"a": 1})


def test_one_job_may_be_given_as_it_is() -> None:
    one = job(1)
    for given in (one, one.id, [one], (one.id,), iter([one])):
        assert handles.wanted(handles.listed(given)) == [one.id]
    assert body_of(asked(dependencies=one)[0])["dependencies"] == [one.id]


@pytest.mark.parametrize("wrong", [[1, 2], "a", 5])
def test_arguments_that_are_no_mapping_are_refused(wrong: Any) -> None:
    with pytest.raises(BadOption, match=r"kwargs is .*, expected a mapping"):
        handles.together(wrong, {})


@pytest.mark.parametrize("wrong", ["5", True, [5]])
def test_a_wait_is_told_its_seconds_as_a_number(wrong: Any) -> None:
    with pytest.raises(BadOption, match=r"timeout is .*, expected a number of seconds, or None"):
        handles.limit(wrong)
    with pytest.raises(BadOption, match="timeout is"):
        next(handles.pulled("one", 1, wrong))
    assert handles.limit(None) == float("inf")
