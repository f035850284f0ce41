"""What browsers need to be told, and what pages of other origins may not do."""

from __future__ import annotations

from urllib.parse import urlsplit

from aiohttp import web

from core4.api.errors import REQUEST_HEADER, Handler
from core4.api.keys import REQUEST_ID, SETTINGS
from core4.errors import Forbidden

_UNSAFE = ("POST", "PUT", "PATCH", "DELETE")
_PAGE_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
_DATA_POLICY = "default-src 'none'; frame-ancestors 'none'"
_ALWAYS = {
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Server": "core4",
}


@web.middleware
async def origins(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Refuse what a page of another origin must not do; answer preflights."""
    if request.method == "OPTIONS":
        return web.Response(headers={"Allow": "GET, HEAD, POST, PUT, DELETE, OPTIONS"})
    if request.method in _UNSAFE:
        require_own_page(request)
    return await handler(request)


def require_own_page(request: web.Request) -> None:
    """Raises: Forbidden if a browser sends this for a page of an origin that may not change anything."""
    origin = request.headers.get("Origin")
    if not _may_write(request, origin):
        page = origin or "another origin"
        raise Forbidden(f"pages of [{page[:200]}] may not do this; see the setting allow_origin")


def _may_write(request: web.Request, origin: str | None) -> bool:
    if origin is None:  # no browser; one that holds the origin back still tells this
        return request.headers.get("Sec-Fetch-Site", "none") in ("same-origin", "none")
    if _same(request, origin) or origin in request.app[SETTINGS].allow_origin:
        return True
    # A browser adds the Basic credentials that it remembers to whatever form any page makes it send.
    basic = request.headers.get("Authorization", "").lstrip()[:5].lower() == "basic"
    return _allowed(request) and not basic


async def add_headers(request: web.Request, response: web.StreamResponse) -> None:
    """Headers of every answer, streams included."""
    headers = response.headers
    page = response.content_type == "text/html"
    headers.setdefault("Cache-Control", "no-store")
    headers.setdefault("Content-Security-Policy", _PAGE_POLICY if page else _DATA_POLICY)
    headers.update(_ALWAYS)
    if REQUEST_ID in request:
        headers[REQUEST_HEADER] = request[REQUEST_ID]
    if not request.app[SETTINGS].allow_origin:
        return
    headers.add("Vary", "Origin")
    if _allowed(request):
        # No credentials: other origins send a bearer token in a header, never what the browser holds.
        headers["Access-Control-Allow-Origin"] = request.headers["Origin"]
        headers["Access-Control-Allow-Methods"] = "GET, POST, PUT, DELETE, OPTIONS"
        headers["Access-Control-Allow-Headers"] = "Authorization, Content-Type, Last-Event-ID, X-Request-ID"
        headers["Access-Control-Expose-Headers"] = "X-Job-Id, X-Request-ID, Location, Retry-After, token"
        headers["Access-Control-Max-Age"] = "600"


def _allowed(request: web.Request) -> bool:
    origin = request.headers.get("Origin")
    allowed = request.app[SETTINGS].allow_origin
    return origin is not None and (origin in allowed or "*" in allowed)


def _same(request: web.Request, origin: str) -> bool:
    try:
        return urlsplit(origin).netloc.lower() == request.host.lower()
    except ValueError:
        return False
