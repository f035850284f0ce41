"""From what somebody asks for and what a worker has published to an order for the queue. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from core4 import chains
from core4.errors import BadArguments, TooLarge
from core4.jobs import JobOrder, canonical
from core4.options import OPTIONS, problem
from core4.schemas import json_problems
from core4.signatures import check


def make_order(
    entry: Mapping[str, Any],
    args: Mapping[str, Any],
    *,
    args_cap: int,
    options: Mapping[str, Any] | None = None,
    namespace: str | None = None,
    **who: Any,
) -> JobOrder:
    """The order of a job that the catalogue has as `entry`.

    Args:
        args: arguments; as in core4, the name of an option that is no parameter of the job is that option.
        args_cap: bytes that the arguments may have as JSON.
        options: options beside the arguments; they win.
        who: the fields of a `JobOrder` that say who asks.

    Raises: BadArguments, TooLarge; JobInvalid for hooks that cannot be followed.
    """
    given, job_args = _split(entry, args)
    check_args(entry, job_args, args_cap)
    wanted = {**(entry.get("options") or {}), **own_slots(entry, {**given, **(options or {})})}
    if entry.get("runs") == "inline" and wanted.get("memory_limit") is not None:
        message = f"memory_limit needs a process of its own; {entry['_id']} runs inline"
        raise BadArguments([{"pointer": "/memory_limit", "message": message}])
    return JobOrder(
        name=entry["_id"],
        args=job_args,
        namespace=namespace or entry.get("namespace") or "DEFAULT",
        options=wanted,
        unique=entry.get("unique", True),
        keep_stopped=entry.get("kind", "class") == "class",
        **chained(entry),
        **who,
    )


def own_slots(
    entry: Mapping[str, Any], asked: Mapping[str, Any], code: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """The options `asked` for, with a `max_running_key` that reaches no slots of jobs of other names.

    A key is shared by names if the code says so: the job's, or the options in `code`. Any other stands
    behind the job's name: whoever may enqueue one job must not take the slots of another.
    """
    name, key = entry["_id"], asked.get("max_running_key")
    declared = [(options or {}).get("max_running_key") for options in (entry.get("options"), code)]
    if key is None or key in declared or key.startswith(f"{name}:"):
        return dict(asked)
    return {**asked, "max_running_key": f"{name}:{key}"}


def chained(entry: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a `JobOrder` that say how its job hangs together with others.

    Raises: JobInvalid for hooks that cannot be followed.
    """
    found = {"signature": entry.get("signature"), "retry_policy": entry.get("retry_policy")}
    if not chains.hooks_of(entry):
        return found
    hooks = chains.resolve(entry, entry.get("hooked") or ())
    return {
        **found,
        "run_before": entry.get("run_before") or (),
        "run_after": entry.get("run_after") or (),
        "on_failure": entry.get("on_failure"),
        "hooks": hooks,
    }


def _split(entry: Mapping[str, Any], args: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    parameters = (entry.get("schema") or {}).get("properties", {})
    options, job_args = {}, {}
    for name, value in args.items():
        if name not in OPTIONS or name in parameters:
            job_args[name] = value
        elif complaint := problem(name, value):
            raise BadArguments([{"pointer": f"/{name}", "message": complaint}])
        else:
            options[name] = value
    return options, job_args


def check_args(entry: Mapping[str, Any], args: Mapping[str, Any], cap: int) -> None:
    """Whether the job that the catalogue has as `entry` takes these arguments.

    Raises: BadArguments, TooLarge.
    """
    if errors := json_problems(args):
        raise BadArguments(errors)
    size = len(canonical(args))
    if size > cap:
        raise TooLarge(f"the arguments have {size} bytes, {cap} are accepted; pass a reference instead")
    if errors := check(entry.get("schema") or {}, args):
        raise BadArguments(errors)
