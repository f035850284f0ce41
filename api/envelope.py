"""The one form of every answer: core4's envelope."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from http import HTTPStatus
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from aiohttp import web

from core4.api.encoding import dumps
from core4.api.keys import REQUEST_ID
from core4.database import Page

JSON = "application/json"


def _version() -> str:
    try:
        return version("core4-jobs")
    except PackageNotFoundError:  # run from a folder that was never installed
        return "0"


VERSION = _version()
PRODUCT = f"core4-jobs/{VERSION}"
_PHRASES = {status.value: status.phrase for status in HTTPStatus}


def envelope(request_id: str, status: int) -> dict[str, Any]:
    """The members that every answer has."""
    return {
        "_id": request_id,
        "version": PRODUCT,
        "timestamp": datetime.now(UTC),
        "message": _PHRASES[status],
        "code": status,
    }


def reply(
    request: web.Request,
    data: Any,
    *,
    status: int = 200,
    flash: Sequence[str] = (),
    headers: Mapping[str, str] | None = None,
    **beside: Any,
) -> web.Response:
    """A successful answer: `data`, members `beside` it and warnings in `flash`."""
    body = {**envelope(request[REQUEST_ID], status), "data": data, **beside}
    if flash:
        body["flash"] = [{"level": "WARNING", "message": message} for message in flash]
    return web.Response(status=status, text=dumps(body), content_type=JSON, headers=headers)


def page_reply(
    request: web.Request, page: Page, rows: Sequence[Any], *, flash: Sequence[str] = (), **beside: Any
) -> web.Response:
    """One page of a listing; core4's pager counts in a float."""
    return reply(
        request,
        list(rows),
        flash=flash,
        page=page.page,
        per_page=page.per_page,
        page_count=-(-page.total // page.per_page) if page.counted else None,
        total_count=float(page.total) if page.counted else None,
        count=len(rows),
        **beside,
    )
