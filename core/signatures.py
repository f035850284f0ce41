"""The arguments of a job as JSON Schema (draft 2020-12), made from the signature of its ``execute``.

The schema is published by the workers; whoever enqueues is checked against it. Loads nothing but the
interpreter until `check` is called.
"""

from __future__ import annotations

import collections.abc
import difflib
import hashlib
import inspect
import json
import re
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any

from core4.errors import JobInvalid

FURTHER = "var_positional"  # the `x-kind` of what takes further positional arguments
DIALECT = "https://json-schema.org/draft/2020-12/schema"
Schema = dict[str, Any]

_SIMPLE: Mapping[Any, str] = {
    int: "integer",
    float: "number",
    str: "string",
    bool: "boolean",
    type(None): "null",
}
_ARRAYS = (list, collections.abc.Sequence, collections.abc.Iterable, collections.abc.Collection)
_OBJECTS = (dict, collections.abc.Mapping, collections.abc.MutableMapping)
_MOST_ERRORS = 20
_DEPTH = 32  # levels of schemas
# All that `schema` writes below the top.
_KEYWORDS = frozenset(
    "type properties required additionalProperties items enum anyOf default description".split()
) | {"x-python", "x-kind"}


def schema(func: Callable[..., Any], *, positional: bool = False) -> Schema:
    """JSON Schema of the keyword arguments of `func`; a leading ``self`` does not count.

    With `positional`, further positional arguments (``*args``) are an array under their name, which
    ``x-kind`` marks: `call_args` gives them back as they are meant.

    An annotation that JSON Schema cannot express accepts anything and keeps its text in ``x-python``.

    Raises: JobInvalid if a parameter cannot be given by name.
    """
    hints = _hints(func)
    texts = _descriptions(func.__doc__ or "")
    properties: dict[str, Schema] = {}
    required: list[str] = []
    further: Schema | bool = False
    for index, (name, parameter) in enumerate(inspect.signature(func).parameters.items()):
        if index == 0 and name == "self":
            continue
        if parameter.kind is parameter.VAR_KEYWORD:
            further = _of(hints[name]) if hints.get(name, Any) is not Any else True
        elif parameter.kind is parameter.POSITIONAL_ONLY:
            raise JobInvalid(f"the parameter {name} is positional-only: arguments of a job are given by name")
        elif parameter.kind is parameter.VAR_POSITIONAL:
            if positional:
                items = _of(hints.get(name, Any))
                properties[name] = {"type": "array", **({"items": items} if items else {}), "x-kind": FURTHER}
        else:
            properties[name] = _property(parameter, hints.get(name, Any), texts.get(name))
            if parameter.default is parameter.empty:
                required.append(name)
    return {
        "$schema": DIALECT,
        "type": "object",
        "properties": properties,
        "required": required,
        "additionalProperties": further,
    }


def named_args(func: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a call by name, those of ``*args`` as a list under its name.

    Raises: TypeError as the call itself would.
    """
    signature = inspect.signature(func)
    found: dict[str, Any] = {}
    for name, value in signature.bind(*args, **kwargs).arguments.items():
        kind = signature.parameters[name].kind
        if kind is inspect.Parameter.VAR_KEYWORD:
            found |= value
        else:
            found[name] = list(value) if kind is inspect.Parameter.VAR_POSITIONAL else value
    return found


def call_args(func: Callable[..., Any], args: Mapping[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """What to call `func` with, given its arguments by name: the opposite of `named_args`."""
    parameters = inspect.signature(func).parameters
    further = next((name for name, each in parameters.items() if each.kind is each.VAR_POSITIONAL), None)
    if further is None or not args.get(further):
        return (), {name: value for name, value in args.items() if name != further}
    before = list(parameters)[: list(parameters).index(further)]
    given = [args[name] if name in args else parameters[name].default for name in before]
    rest = {name: value for name, value in args.items() if name not in (*before, further)}
    return (*given, *args[further]), rest


class Kept(dict[str, Any]):
    """A schema that `check` meets again and again: what checks against it is made once."""

    @cached_property
    def validator(self) -> Any:
        """What checks against this schema."""
        return _validator(self)


def _validator(schema: Mapping[str, Any]) -> Any:
    from jsonschema import Draft202012Validator
    from referencing import Registry

    # Without a registry of ours it would fetch what a schema refers to, from any address.
    return Draft202012Validator(schema, registry=Registry())


def check(schema: Mapping[str, Any], args: Any) -> list[dict[str, str]]:
    """What does not fit: JSON pointers into `args` and messages; empty if all is well."""
    from referencing.exceptions import Unresolvable

    found: dict[tuple[str, str], None] = {}
    validator = schema.validator if isinstance(schema, Kept) else _validator(schema)
    try:
        for error in validator.iter_errors(args):
            for row in _rows(error):
                found[row] = None
            if len(found) >= _MOST_ERRORS:
                break
    except Unresolvable as unknown:
        found["", f"the schema of the job refers to {unknown.ref[:200]}, which it does not contain"] = None
    return [{"pointer": pointer, "message": message} for pointer, message in found]


def complaint(given: Any) -> str | None:
    """Why a value is no schema as `schema` makes one, None if it is.

    Whoever checks arguments against it does not have to trust its author: there are no references and no
    regular expressions in it.
    """
    from jsonschema import Draft202012Validator, SchemaError

    if not isinstance(given, Mapping):
        return "a schema is an object"
    if given.get("$schema", DIALECT) != DIALECT:
        return f"a schema is one of {DIALECT}"
    top = {name: part for name, part in given.items() if name != "$schema"}
    parts: list[tuple[Any, int]] = [(top, 1)]
    while parts:
        part, depth = parts.pop()
        if not isinstance(part, Mapping) or depth > _DEPTH:
            return f"a schema consists of objects, nested less than {_DEPTH} deep"
        if unknown := sorted(set(part) - _KEYWORDS):
            return f"a schema of arguments has no {unknown[0][:100]}"
        parts += [(inner, depth + 1) for inner in _inner(part)]
    try:
        Draft202012Validator.check_schema(given)
    except SchemaError as error:
        return f"no schema: {error.message[:200]}"
    return None


def _inner(part: Mapping[str, Any]) -> list[Any]:
    """The schemas right inside of one."""
    properties, choices = part.get("properties", {}), part.get("anyOf", [])
    found = [*properties.values()] if isinstance(properties, Mapping) else [None]
    found += choices if isinstance(choices, list) else [None]
    found += [part["items"]] if "items" in part else []
    further = part.get("additionalProperties", False)
    return found if isinstance(further, bool) else [*found, further]


def digest(schema: Mapping[str, Any]) -> str:
    """A short text that is equal for equal schemas."""
    text = json.dumps(schema, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _property(parameter: inspect.Parameter, hint: Any, text: str | None) -> Schema:
    found = _of(hint)
    if parameter.default is None and found and "x-python" not in found:
        found = _any_of([found, {"type": "null"}])  # the default is accepted, whatever the annotation says
    if parameter.default is not parameter.empty and _is_json(parameter.default):
        found = {**found, "default": parameter.default}
    if text and "description" not in found:
        found = {**found, "description": text}
    return found


def _of(hint: Any) -> Schema:
    """The schema of one annotation."""
    if hint in (Any, object, inspect.Parameter.empty):
        return {}
    if isinstance(hint, collections.abc.Hashable) and hint in _SIMPLE:
        return {"type": _SIMPLE[hint]}
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Annotated:
        words = next((extra for extra in inner[1:] if isinstance(extra, str)), None)
        return {**_of(inner[0]), **({"description": words} if words else {})}
    if origin in (typing.Union, types.UnionType):
        return _any_of([_of(part) for part in inner])
    if origin is typing.Literal and all(_is_json(value) for value in inner):
        return {"enum": list(inner)}
    kind = origin or hint
    if kind in _ARRAYS:
        return {"type": "array", **({"items": _of(inner[0])} if inner and _of(inner[0]) else {})}
    if kind in _OBJECTS and (not inner or inner[0] in (str, Any)):
        values = _of(inner[1]) if inner else {}
        return {"type": "object", **({"additionalProperties": values} if values else {})}
    return {"x-python": inspect.formatannotation(hint)}


def _any_of(parts: list[Schema]) -> Schema:
    if any(not part or "x-python" in part for part in parts):
        named = [part["x-python"] for part in parts if "x-python" in part]
        return {"x-python": " | ".join(named)} if named else {}
    names: list[str] = []
    others: list[Schema] = []
    for part in parts:
        if set(part) == {"type"}:
            types_of_part = part["type"]
            names += [types_of_part] if isinstance(types_of_part, str) else types_of_part
        else:
            others += part["anyOf"] if set(part) == {"anyOf"} else [part]
    names = list(dict.fromkeys(names))
    simple: Schema = {"type": names[0] if len(names) == 1 else names}
    if not others:
        return simple
    return {"anyOf": [*others, *([simple] if names and simple not in others else [])]}


def _is_json(value: Any) -> bool:
    try:
        json.dumps(value, allow_nan=False)
    except (TypeError, ValueError, RecursionError):
        return False
    return True


def _hints(func: Callable[..., Any]) -> dict[str, Any]:
    try:
        return typing.get_type_hints(func, include_extras=True)
    except Exception:
        # One name that cannot be resolved (imported for type checkers only) must not cost the others.
        annotations = getattr(func, "__annotations__", {})
        return {name: _hint(func, name, annotation) for name, annotation in annotations.items()}


def _hint(func: Callable[..., Any], name: str, annotation: Any) -> Any:
    def probe() -> None: ...

    probe.__annotations__ = {name: annotation}
    names = getattr(func, "__globals__", {})
    try:
        return typing.get_type_hints(probe, globalns=names, include_extras=True)[name]
    except Exception:
        return _Unresolved(str(annotation))


class _Unresolved:
    """An annotation whose names are not there at run time."""

    def __init__(self, text: str) -> None:
        self.text = text

    def __repr__(self) -> str:
        return self.text


_FIELD = re.compile(r"^\s*:param\s+(?:[^:]*\s)?\*{0,2}(\w+)\s*:\s*(.+)$")
_ITEM = re.compile(r"^(\s+)\*{0,2}(\w+)(?:\s*\([^)]*\))?\s*:\s*(\S.*)$")
_HEAD = re.compile(r"^\s*(?:Args|Arguments|Parameters)\s*:\s*$")


def _descriptions(doc: str) -> dict[str, str]:
    """What a docstring says of each parameter, as ``:param x:`` or below ``Args:``; first lines only."""
    found: dict[str, str] = {}
    inside = False
    for line in inspect.cleandoc(doc).splitlines():
        item = _FIELD.match(line)
        if item:
            found[item[1]] = item[2].strip()
        elif _HEAD.match(line):
            inside = True
        elif inside and line and not line[0].isspace():
            inside = False
        elif inside and (item := _ITEM.match(line)):
            found[item[2]] = item[3].strip()
    return found


def _rows(error: Any) -> list[tuple[str, str]]:
    """One library error as (pointer, message); a missing or unknown argument is pointed to itself."""
    base = "".join(f"/{_escaped(str(part))}" for part in error.absolute_path)
    if error.validator == "required":
        missing = [name for name in error.validator_value if name not in error.instance]
        return [(f"{base}/{_escaped(name)}", "is required") for name in missing]
    if error.validator == "additionalProperties" and error.validator_value is False:
        known = list(error.schema.get("properties", ()))
        unknown = [str(name)[:200] for name in error.instance if name not in known]
        return [
            (f"{base}/{_escaped(name)}", f"is not an argument{_hint_at(name, known)}") for name in unknown
        ]
    return [(base, str(error.message)[:300])]


def _hint_at(name: str, known: list[str]) -> str:
    close = difflib.get_close_matches(name[:100], known, n=1)
    return f"; did you mean {close[0]}?" if close else ""


def _escaped(part: str) -> str:
    return part.replace("~", "~0").replace("/", "~1")
