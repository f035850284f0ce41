"""Handler of `/<namespace>/task/<name>`: an address of its own for everything that can be enqueued."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any
from urllib.parse import quote

from aiohttp import web

from core4.api.envelope import reply
from core4.api.jobs import enqueue_one, idempotency_key, unknown, unserved
from core4.api.keys import BASE, CATALOGUE
from core4.api.streams import job_headers
from core4.schemas import from_text

Args = dict[str, Any]
Entry = Mapping[str, Any]

PATH = f"{BASE}/{{namespace:[A-Za-z0-9_-]{{1,100}}}}/task/{{name}}"


async def run(request: web.Request, args: Args) -> web.Response:
    """POST <namespace>/task/<name>: enqueue a task or job; the arguments are its own.

    They stand in the query string or in the body, each by its name, as options like `priority` do.
    """
    namespace, name = request.match_info["namespace"], request.match_info["name"]
    entry = await _entry(request, namespace, name)
    given = {key: _read(entry, request, key, value) for key, value in args.items()}
    asked = {"qual_name": entry["_id"], "args": given, "namespace": namespace}
    job, replayed = await enqueue_one(request, asked, idempotency_key(request))
    flash = await unserved(request, job.name, job.namespace)
    headers = job_headers(job.id) | ({"Idempotent-Replayed": "true"} if replayed else {})
    return reply(request, str(job.id), flash=flash, headers=headers, request_id=job.document["request_id"])


async def _entry(request: web.Request, namespace: str, name: str) -> Entry:
    """What is meant: a task of the namespace, else what has this whole name. Raises: UnknownJob."""
    for full in (f"{namespace}:{name}", name):
        entry = await request.app[CATALOGUE].get(full)
        if entry is not None and full.partition(":")[0] in (namespace, full):
            return entry
    raise await unknown(request, f"{namespace}:{name}")


def _read(entry: Entry, request: web.Request, name: str, value: Any) -> Any:
    """An argument: those of the query string are text, which is read as what the signature has."""
    if name not in request.query or value != request.query[name]:
        return value
    wanted = (entry.get("schema") or {}).get("properties", {}).get(name, {})
    return value if _takes_text(wanted) else from_text(value, is_bool=wanted.get("type") == "boolean")


def _takes_text(schema: Mapping[str, Any]) -> bool:
    kinds = schema.get("type", ())
    return (
        "string" in ([kinds] if isinstance(kinds, str) else kinds)
        or any(isinstance(value, str) for value in schema.get("enum", ()))
        or any(_takes_text(part) for part in schema.get("anyOf", ()))
    )


def path_of(entry: Entry) -> tuple[str, str, str]:
    """The address of an entry of the catalogue in a URL, its namespace and its name there."""
    namespace, name = entry.get("namespace") or "DEFAULT", str(entry["_id"])
    short = name.removeprefix(f"{namespace}:")
    return f"{BASE}/{namespace}/task/{quote(short, safe=':')}", namespace, short
