"""What a worker over HTTP may publish: entries that nothing chokes on, of its own namespaces alone."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from marshmallow import ValidationError, fields, validate

from core4 import signatures, timetable
from core4.api import arguments
from core4.catalogue import Catalogue
from core4.database import Document
from core4.errors import BadRequest, JobInvalid, NotFound
from core4.jobs import NAMESPACE
from core4.options import OPTIONS, problem
from core4.permissions import NAME_LIMIT
from core4.schedules import ScheduleStore, declared
from core4.schemas import Arguments, Bool, Dict, List, Text, json_problems

_HOOKS = ("run_before", "run_after")


def _name(value: str) -> None:
    if not 0 < len(value) <= NAME_LIMIT or not value.isprintable():
        raise ValidationError(f"parameter [_id] expected 1 to {NAME_LIMIT} printable characters")


def _texts(values: Sequence[Any] | None) -> None:
    if json_problems(values) or not all(isinstance(value, str) for value in values or ()):
        raise ValidationError("a list of texts is expected")


def _schedule(value: Any) -> None:
    try:
        if value is not None:
            timetable.declaration(value)
    except (JobInvalid, TypeError, ValueError) as error:
        raise ValidationError(f"parameter [schedule]: {error}") from None


def _schema(value: Mapping[str, Any]) -> None:
    if complaint := signatures.complaint(value):
        raise ValidationError(f"parameter [schema]: {complaint}")
    _json({name: part for name, part in value.items() if name != "$schema"})


def _options(values: Mapping[str, Any]) -> None:
    for name, value in values.items():
        complaint = problem(name, value) if name in OPTIONS else f"[{name[:100]}] is no option"
        if complaint:
            raise ValidationError(f"parameter [options]: {complaint}")


def _json(value: Any) -> None:
    for row in json_problems(value):
        raise ValidationError(f"{row['pointer']}: {row['message']}")


def _text(most: int = 1000) -> Text:
    return Text(allow_none=True, validate=validate.Length(max=most))


class Entry(Arguments):
    """An entry as `core4.discovery` and `core4.decorated` describe jobs; there are no other fields."""

    _id = Text(required=True, validate=_name)
    namespace = Text(validate=validate.Regexp(NAMESPACE.pattern + r"\Z", error="[namespace] is none"))
    kind = Text(validate=validate.OneOf(["class", "task"]))
    runs = Text(validate=validate.OneOf(["process", "inline", "script"]))
    author = _text()
    doc = _text(20_000)
    tag = List(allow_none=True, validate=_texts)
    schedule = fields.Raw(allow_none=True, validate=_schedule)
    schema = Dict(validate=_schema)
    signature = _text()
    options = Dict(validate=_options)
    unique = Bool()
    hidden = Bool()
    fresh = Bool()
    module = _text()
    qualname = _text()
    file = _text(5000)
    target = _text(5000)
    script = _text(5000)
    retry_policy = _text()
    default_args = Dict(allow_none=True, validate=_json)
    run_before = List(validate=_texts)
    run_after = List(validate=_texts)
    on_failure = _text()


async def accepted(
    given: Sequence[Any], namespaces: Collection[str], catalogue: Catalogue, schedules: ScheduleStore
) -> list[Document]:
    """The entries, if a worker of these namespaces may publish all of them.

    What is in no namespace by its own word is in DEFAULT, where its jobs go.

    Raises: BadRequest with the reason.
    """
    homes = {row["_id"]: home(row) for row in await catalogue.all()}
    entries = [_checked(entry) for entry in given]
    for entry in entries:
        complaint = _foreign(entry, namespaces, homes)
        for schedule in () if complaint else declared(entry):
            complaint = await _foreign_schedule(schedule, namespaces, homes, schedules)
        if complaint:
            raise BadRequest(f"[{entry['_id']}] {complaint}")
    return entries


def home(entry: Mapping[str, Any]) -> str:
    """The namespace that the jobs of an entry go to."""
    return entry.get("namespace") or "DEFAULT"


def _checked(given: Any) -> Document:
    if not isinstance(given, dict):
        raise BadRequest("an entry is an object with the name of a job")
    try:
        entry = arguments.checked(Entry, given)
    except BadRequest as error:
        raise BadRequest(f"entry {given.get('_id')!r:.200}: {error.detail}") from None
    return {**entry, "namespace": home(entry)}


def _foreign(entry: Document, namespaces: Collection[str], homes: Mapping[str, str]) -> str | None:
    """Why an entry is not this worker's to publish."""
    name, namespace = entry["_id"], entry["namespace"]
    if namespace not in namespaces:
        return f"is in namespace {namespace}, which this worker does not serve"
    if homes.get(name, namespace) not in namespaces:
        return f"is a job of namespace {homes[name]}, which this worker does not serve"
    if ":" in name and name.partition(":")[0] != namespace:
        return f"has the name of a task of another namespace than {namespace}"
    hooks = [hook for key in _HOOKS for hook in entry.get(key) or ()]
    hooks += [entry["on_failure"]] if entry.get("on_failure") else []
    if any(not hook.startswith(f"{namespace}:") for hook in hooks):
        return f"has a hook that is no task of namespace {namespace}"
    return None


async def _foreign_schedule(
    schedule: Mapping[str, Any],
    namespaces: Collection[str],
    homes: Mapping[str, str],
    schedules: ScheduleStore,
) -> str | None:
    """Why the schedule of an entry is not this worker's to publish."""
    if schedule.get("namespace") is not None and schedule["namespace"] not in namespaces:
        return f"has a schedule in namespace {schedule['namespace']}, which this worker does not serve"
    try:
        stored = await schedules.get(schedule["name"])
    except NotFound:
        return None
    if homes.get(stored.qual_name) in (None, *namespaces):
        return None
    return f"has a schedule of the name of one of [{stored.qual_name}]: give it another name"
