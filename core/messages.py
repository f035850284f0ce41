"""What a message of a broker says: its bytes in, a checked wish for a job out, and back. Pure.

Two envelopes are read, ``{"name": ..., "args": [...], "kwargs": {...}}`` and the same under ``"job"``.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from marshmallow import ValidationError

from core4.errors import BadArguments, BadMessage, InvalidJson, TooLarge
from core4.jobs import canonical
from core4.options import OPTIONS
from core4.schemas import MessageArguments, json_problems
from core4.signatures import FURTHER

_SCHEMA = MessageArguments()


@dataclass(frozen=True, kw_only=True)
class Message:
    """A wish for a job. `namespace` is that of the queue unless the message names one."""

    name: str
    namespace: str
    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)
    request_id: str | None = None

    @property
    def qual_names(self) -> tuple[str, str]:
        """What the catalogue may have it as: a task of the namespace, or a name as it stands."""
        return f"{self.namespace}:{self.name}", self.name

    @property
    def digest(self) -> str:
        """What two messages under one id must share."""
        wish = [self.name, self.namespace, list(self.args), dict(self.kwargs), dict(self.options)]
        return hashlib.sha256(canonical(wish).encode()).hexdigest()


def read(body: bytes, queue: str, *, cap: int) -> Message:
    """The wish in the body of a message that came from `queue`; `cap` is the most bytes it may have.

    Raises: TooLarge, InvalidJson, BadMessage.
    """
    if len(body) > cap:
        raise TooLarge(f"the message has {len(body)} bytes, {cap} are accepted; pass a reference instead")
    return check(_parsed(body), queue)


def check(envelope: Any, queue: str) -> Message:
    """The wish in an envelope.

    Raises: BadMessage naming what is wrong.
    """
    if isinstance(envelope, Mapping) and set(envelope) == {"job"}:
        envelope = envelope["job"]
    if not isinstance(envelope, Mapping):
        raise BadMessage('the message is no object with "name", or such an object under "job"')
    if errors := json_problems(envelope):
        raise BadMessage("; ".join(f"{error['pointer']}: {error['message']}" for error in errors[:5]))
    try:
        said: dict[str, Any] = _SCHEMA.load(envelope)
    except ValidationError as error:
        raise BadMessage(_text(error)) from None
    return Message(
        name=said["name"],
        namespace=said.get("namespace", queue),
        args=tuple(said["args"]),
        kwargs=said["kwargs"],
        options={name: said[name] for name in OPTIONS if name in said},
        request_id=said.get("request_id"),
    )


def write(envelope: Mapping[str, Any], queue: str, *, cap: int) -> bytes:
    """The body of a message, checked as whoever takes it out of `queue` will check it.

    Raises: BadMessage, TooLarge.
    """
    check(envelope, queue)
    try:
        body = json.dumps(envelope, allow_nan=False, ensure_ascii=False, separators=(",", ":")).encode()
    except (TypeError, ValueError, RecursionError) as error:
        raise BadMessage(f"the message is not JSON: {error}") from None
    if len(body) > cap:
        raise TooLarge(f"the message has {len(body)} bytes, {cap} are accepted; pass a reference instead")
    return body


def bind(entry: Mapping[str, Any], message: Message) -> dict[str, Any]:
    """The arguments of `message` by name: positional ones stand in the order of the job's parameters.

    Raises: BadArguments for too many, or for one that is given twice.
    """
    parameters = list((entry.get("schema") or {}).get("properties", ()))
    properties = (entry.get("schema") or {}).get("properties", {})
    further = next((name for name in parameters if properties[name].get("x-kind") == FURTHER), None)
    if further is not None:
        first = parameters[: parameters.index(further)]
        split = {further: [*message.args[len(first) :]]} if len(message.args) > len(first) else {}
        plain = {**entry, "schema": {"properties": {name: properties[name] for name in first}}}
        return {**bind(plain, replace(message, args=message.args[: len(first)])), **split}
    if len(message.args) > len(parameters):
        text = f"takes {len(parameters)} positional arguments, not {len(message.args)}"
        raise BadArguments([{"pointer": "/args", "message": text}])
    bound = dict(zip(parameters, message.args, strict=False))
    if twice := sorted(set(bound) & set(message.kwargs)):
        raise BadArguments([{"pointer": f"/kwargs/{name}", "message": "is given twice"} for name in twice])
    return {**bound, **message.kwargs}


def _parsed(body: bytes) -> Any:
    try:
        return json.loads(body.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise InvalidJson(f"the body is not UTF-8: {error.reason} at byte {error.start}") from None
    except json.JSONDecodeError as error:
        raise InvalidJson(f"the body is not JSON: {error.msg} at character {error.pos}") from None
    except (ValueError, RecursionError):
        raise InvalidJson("the body has a number that is too long, or is nested too deeply") from None


def _text(error: ValidationError) -> str:
    messages = error.messages_dict
    known = {"Missing argument": "is missing", "unknown argument": "is not known"}
    texts = [
        f"[{str(name)[:100]}] {known.get(str(found[0]), found[0])}"
        for name, found in sorted(messages.items())
    ]
    return "; ".join(texts[:5])
