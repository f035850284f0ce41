"""Handlers of `/doctor`: what is stuck or inconsistent, and its repair. For administrators."""

from __future__ import annotations

from typing import Any

from aiohttp import web

from core4.api.envelope import reply
from core4.api.keys import DATABASE, SETTINGS, USER
from core4.doctor import Doctor
from core4.errors import Forbidden

Args = dict[str, Any]


async def examine(request: web.Request, args: Args) -> web.Response:
    """GET doctor: what stands wrong, since when and why, and what only waits."""
    _require_cop(request)
    return reply(request, (await _doctor(request, args).examine()).view())


async def repair(request: web.Request, args: Args) -> web.Response:
    """POST doctor: repair what is safe to repair; what was, and what remains."""
    user = _require_cop(request)
    return reply(request, (await _doctor(request, args).repair(by=user)).view())


def _doctor(request: web.Request, args: Args) -> Doctor:
    return Doctor(request.app[DATABASE], request.app[SETTINGS], **args)


def _require_cop(request: web.Request) -> str:
    user = request[USER]
    if not user.may.cop:
        raise Forbidden(f"user [{user.name}] has no right to examine the database")
    return user.name
