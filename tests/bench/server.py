"""The database that a bench runs on, and the machine below it."""

from __future__ import annotations

import os
import platform
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from pymongo import MongoClient

from core4.embedded import EmbeddedServer

Document = dict[str, Any]


def server(stack: ExitStack) -> tuple[str, Document]:
    """The URL of the server that `CORE4_MONGO_URL` names, or of an embedded one, and the facts to quote."""
    url, kind = os.environ.get("CORE4_MONGO_URL", ""), "CORE4_MONGO_URL"
    if not url:
        home = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="core4-bench-")))
        embedded = stack.enter_context(EmbeddedServer(home))
        url, kind = embedded.url, embedded.kind
    return url, {
        "server": f"{kind}: {version_of(url)}",
        "python": platform.python_version(),
        "cores": os.cpu_count(),
        "load": os.getloadavg()[0],
    }


def version_of(url: str) -> str:
    """What the server says it is."""
    client: MongoClient[Document] = MongoClient(url)
    info = client.admin.command("buildInfo")
    client.close()
    secantus = info.get("secantusVersion")
    return (
        f"SecantusDB {secantus} ({info.get('gitVersion', '')})" if secantus else f"mongod {info['version']}"
    )
