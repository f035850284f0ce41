"""The API's description in OpenAPI 3.1: the table of routes, the schemas that check, and the catalogue.

Nothing is described by hand but answers (`core4.api.answers`). What can be enqueued changes while the API
runs, so it is added for each request.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from functools import cache
from http import HTTPStatus
from typing import Any
from urllib.parse import quote

from apispec import APISpec
from apispec.ext.marshmallow import MarshmallowPlugin
from marshmallow import fields

from core4 import schemas, timetable
from core4.api import tasks
from core4.api.answers import ANSWERS, COMPONENTS, Answer
from core4.api.envelope import JSON, VERSION
from core4.api.errors import PROBLEM
from core4.api.keys import BASE
from core4.api.routes import ROUTES, Route
from core4.api.tasks import path_of
from core4.options import OPTIONS

Document = dict[str, Any]

ALWAYS = (400, 429, 503)  # what any request can meet
_TYPES: Mapping[type[fields.Field[Any]], str] = {
    schemas.Int: "integer",
    schemas.Number: "number",
    schemas.Bool: "boolean",
    schemas.AnyText: "string",
    schemas.Text: "string",
    schemas.Date: "string",
    schemas.Dict: "object",
    schemas.List: "array",
}
_SECTIONS = {
    "job/view": "Manager: results",
    "job/pull": "Manager: results",
    "job": "Manager: jobs",
    "schedule": "Manager: schedules",
    "worker": "Manager: workers",
    "control": "Manager: workers",
    "event": "Manager: workers",
    "queue": "Manager: workers",
    "doctor": "Manager: workers",
}
_SIMPLE = {"integer", "number", "string", "boolean", "null"}
_KEY: Document = {
    "name": "Idempotency-Key",
    "in": "header",
    "description": "the same key again makes no second job",
    "schema": {"type": "string", "minLength": 1, "maxLength": 255, "pattern": "^[ -~]+$"},
}


def describe(entries: Sequence[Mapping[str, Any]] = ()) -> Document:
    """The whole description, with an operation for each of these entries of the catalogue."""
    fixed = _fixed()
    paths, sections = {**fixed["paths"]}, dict[str, None]()
    for entry in entries:
        path, namespace, _ = path_of(entry)
        paths[path] = {"post": _task(entry)}
        sections[namespace] = None
    tags = [{"name": name, "description": f"Namespace {name}"} for name in sorted(sections)]
    return {**fixed, "paths": paths, "tags": [*tags, *fixed["tags"]]}


@cache
def _fixed() -> Document:
    """What does not change while the API runs."""
    plugin = MarshmallowPlugin()
    spec = APISpec(
        title="core4-jobs",
        version=VERSION,
        openapi_version="3.1.0",
        plugins=[plugin],
        info={"description": "Enqueue jobs, watch them, kill them, restart them, get their results."},
    )
    for name, schema in COMPONENTS.items():
        spec.components.schema(name, schema)
    spec.components.security_scheme("basic", {"type": "http", "scheme": "basic"})
    spec.components.security_scheme("bearer", {"type": "http", "scheme": "bearer"})
    converter = plugin.converter
    assert converter is not None
    for field, kind in _TYPES.items():
        converter.field_mapping[field] = (kind, None)
    for field in (schemas.OptionValue, schemas.ScheduleValue):
        converter.field_mapping[field] = (None, None)
    converter.add_attribute_function(_described)  # type: ignore[no-untyped-call]
    sections = dict.fromkeys(map(_section, ROUTES))
    for route in ROUTES:
        if route.method != "*" and route.handler is not tasks.run:
            path = route.path.replace(":.+", "")
            spec.path(path, operations={route.method.lower(): _operation(route, converter)})
    for section in sections:
        spec.tag({"name": section})
    return spec.to_dict()


def _described(self: Any, field: fields.Field[Any], **_: Any) -> Document:
    """What is accepted for an option of jobs or a field of schedules, in the words of its table."""
    table: Mapping[str, Any] = timetable.FIELDS if isinstance(field, schemas.ScheduleValue) else OPTIONS
    option = table.get(field.name or "")
    is_option = isinstance(field, schemas.OptionValue | schemas.ScheduleValue)
    return {"description": option.accepts} if is_option and option else {}


def _section(route: Route) -> str:
    place = route.path.removeprefix(BASE).strip("/")
    found = [name for name in _SECTIONS if f"{place}/".startswith(f"{name}/")]
    return _SECTIONS[max(found, key=len)] if found else "Manager: session and process"


def _operation(route: Route, converter: Any) -> Document:
    answer = ANSWERS[route.handler]
    summary, text = _words(route.handler)
    found: Document = {
        "operationId": _id(route.method, route.path),
        "tags": [_section(route)],
        "summary": summary,
        "parameters": [*_path_parameters(route.path), *([_KEY] if answer.idempotent else [])],
        "responses": _responses(route, answer),
        "security": [] if route.access == "open" else [{"basic": []}, {"bearer": []}],
    }
    if text:
        found["description"] = text
    properties = _properties(route, converter)
    if route.method == "GET":
        found["parameters"] += [_query(name, schema, must) for name, (schema, must) in properties.items()]
    elif properties:
        found["requestBody"] = _body(properties, route.takes.__doc__ or "")
    return found


def _id(method: str, path: str) -> str:
    words = [word.strip("{}").split(":")[0] for word in path.removeprefix(BASE).split("/") if word]
    return "_".join([method.lower(), *(word.replace("-", "_").replace(".", "_") for word in words)])


def _words(handler: Any) -> tuple[str, str]:
    """The first line of a docstring behind its address, and the rest."""
    first, _, rest = (inspect.getdoc(handler) or "").partition("\n\n")
    _, colon, summary = first.replace("\n", " ").partition(": ")
    return (summary if colon else first), "" if rest.startswith("Raises") else rest


def _path_parameters(path: str) -> list[Document]:
    names = [part[1:-1].split(":")[0] for part in path.split("/") if part.startswith("{")]
    return [
        {"name": name, "in": "path", "required": True, "schema": {"type": "string", "minLength": 1}}
        for name in names
    ]


def _properties(route: Route, converter: Any) -> dict[str, tuple[Document, bool]]:
    """The arguments of a route: their schemas, and whether they are required."""
    one = route.takes()
    found = converter.schema2jsonschema(one)
    required = found.get("required", ())
    return {name: (schema, name in required) for name, schema in found.get("properties", {}).items()}


def _query(name: str, schema: Document, required: bool) -> Document:
    if schema.get("type") in ("object", "array"):
        schema = {"type": "string", "description": f"JSON text of an {schema['type']}"}
    return {"name": name, "in": "query", "required": required, "schema": schema}


def _body(properties: Mapping[str, tuple[Document, bool]], text: str, *, further: Any = False) -> Document:
    required = [name for name, (_, must) in properties.items() if must]
    schema: Document = {
        "type": "object",
        "properties": {name: schema for name, (schema, _) in properties.items()},
        "additionalProperties": further,
    }
    if required:
        schema["required"] = required
    return {"description": text, "required": bool(required), "content": {JSON: {"schema": schema}}}


def _responses(route: Route, answer: Answer) -> Document:
    found = {str(status): _success(answer, status) for status in answer.succeeds}
    return {**found, **_failures(route, answer)}


def _failures(route: Route, answer: Answer) -> Document:
    statuses = {*ALWAYS, *answer.fails}
    statuses |= set() if route.access == "open" else {401, 403}
    statuses |= {403, 408, 413, 415} if route.method != "GET" else set()
    content = {PROBLEM: {"schema": {"$ref": "#/components/schemas/Problem"}}}
    return {str(n): {"description": HTTPStatus(n).phrase, "content": content} for n in sorted(statuses)}


def _success(answer: Answer, status: int) -> Document:
    found: Document = {"description": HTTPStatus(status).phrase}
    if status in (204, 304):
        return found
    content: Document = {}
    if answer.plain:
        content[answer.plain] = {"schema": {"type": "string"}}
    elif not answer.silent:
        content[JSON] = {"schema": answer.data if answer.bare else _enveloped(answer)}
    if answer.stream:
        content["text/event-stream"] = {"schema": {"$ref": "#/components/schemas/Event"}}
    return {**found, "content": content}


def _enveloped(answer: Answer) -> Document:
    data = {"type": "array", "items": answer.data} if answer.page else answer.data
    always = {"data": data, **answer.beside}
    parts: list[Document] = [{"$ref": "#/components/schemas/Envelope"}]
    parts += [{"$ref": "#/components/schemas/Pager"}] if answer.page else []
    members = {**always, **answer.perhaps}
    return {"allOf": [*parts, {"type": "object", "properties": members, "required": list(always)}]}


# ---------------------------------------------------------------------- what can be enqueued

_ROUTE = next(route for route in ROUTES if route.handler is tasks.run)


def _task(entry: Mapping[str, Any]) -> Document:
    """The operation of one entry of the catalogue: simple parameters in the query, others in the body."""
    _, namespace, short = path_of(entry)
    schema = entry.get("schema") or {}
    summary, _, text = (entry.get("doc") or "").strip().partition("\n")
    required = schema.get("required", ())
    properties = {name: (each, name in required) for name, each in schema.get("properties", {}).items()}
    simple = {name: each for name, each in properties.items() if _is_simple(each[0])}
    others = {name: each for name, each in properties.items() if name not in simple}
    found: Document = {
        "operationId": f"task_{quote(str(entry['_id']), safe='')}",
        "tags": [namespace],
        "summary": summary or short,
        "parameters": [*(_query(name, each, must) for name, (each, must) in simple.items()), _KEY],
        "responses": _responses(_ROUTE, ANSWERS[tasks.run]),
        "security": [{"basic": []}, {"bearer": []}],
    }
    if text.strip():
        found["description"] = inspect.cleandoc(text)
    further = schema.get("additionalProperties", False)
    if others or further is not False:
        found["requestBody"] = _body(others, "The other arguments, each by its name", further=further)
    return found


def _is_simple(schema: Mapping[str, Any]) -> bool:
    kinds = schema.get("type")
    if kinds is None:
        return all(isinstance(value, str) for value in schema.get("enum", [None]))
    return set([kinds] if isinstance(kinds, str) else kinds) <= _SIMPLE
