"""The least an HTTP server can do: read a JSON body, answer with one. Run as a process of its own."""

from __future__ import annotations

import sys

from aiohttp import web


async def answer(request: web.Request) -> web.Response:
    """Whatever is sent, an envelope of the usual size."""
    await request.read()
    return web.json_response({"_id": "0" * 24, "code": 200, "message": "OK", "data": "0" * 24})


def main() -> None:
    """Serve on the port of the first argument until killed."""
    app = web.Application()
    app.router.add_route("*", "/{path:.*}", answer)
    web.run_app(app, host="127.0.0.1", port=int(sys.argv[1]), print=None)


if __name__ == "__main__":
    main()
