"""The programs of easyjobs' documents as real processes: only imports and application lines changed."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path

from tests.helpers import FAST, ROOT, Command, Stack, eventually, free_port

SECRET = "abcd1234"  # in all of them
_CHANGED = (
    ("from fastapi import FastAPI\n", "from aiohttp import web\n"),
    ("from easyjobs.manager import EasyJobsManager\n", "from core4 import JobManager\n"),
    ("from easyjobs.workers.worker import EasyJobsWorker\n", "from core4 import JobWorker\n"),
    ("FastAPI()", "web.Application()"),
    ("@server.on_event('startup')", "@server.on_startup.append"),
    ("async def startup():", "async def startup(server):"),
    ("async def setup():", "async def setup(server):"),
    ("EasyJobsManager.create(", "JobManager.create("),
    ("EasyJobsWorker.create(", "JobWorker.create("),
)
# What `uvicorn module:server` is in the documents; with `--workers`, several of these on one port.
_SERVE = (
    "import sys; from aiohttp import web; from importlib import import_module; "
    "web.run_app(import_module(sys.argv[1]).server, host='127.0.0.1', port=int(sys.argv[2]), reuse_port=True)"
)


def example(name: str, *more: tuple[str, str]) -> str:
    """A program of the documents for this product; `more` says what else is replaced, and must be there."""
    text = (ROOT / "tests" / "data" / f"{name}.txt").read_text()
    for old, new in _CHANGED:
        text = text.replace(old, new)
    for old, new in more:
        assert old in text, old
        text = text.replace(old, new)
    return text


def application(folder: Path, module: str, port: int, environ: Mapping[str, str]) -> Command:
    """The application in the file of this name, on a port of this machine."""
    args = [sys.executable, "-c", _SERVE, module, str(port)]
    return Command(args, {**FAST, **environ}, cwd=folder)


class Manager(Stack):
    """An application with a manager, which `with` starts."""

    def __init__(self, folder: Path, module: str, **environ: str) -> None:
        self.port = free_port()
        environ = {"CORE4_HOME": str(folder / "home"), **environ}
        command = application(folder, module, self.port, environ)
        super().__init__(f"http://127.0.0.1:{self.port}", folder, command, auth=("admin", SECRET))

    def __enter__(self) -> Manager:
        self.command.__enter__()
        return self

    def __exit__(self, kind: type[BaseException] | None, *more: object) -> None:
        self.command.__exit__(kind, *more)

    def submit(self, name: str, namespace: str = "DEFAULT", **args: object) -> str:
        """Enqueue a task at its own address, as soon as the manager is up and the task is published."""

        def look() -> str:
            if self.command.process.poll() is not None:
                raise RuntimeError(f"the application has ended:\n{self.command.output}")
            try:
                answer = self.request("POST", f"/{namespace}/task/{name}", json=args)
            except OSError as error:
                raise AssertionError(f"{error!r}") from None
            assert answer.status_code == 200, answer.text
            return str(answer.json()["data"])

        return eventually(look, 60, what=f"{name} is taken")

    def pull(self, job_id: str, *, key: str = "job_id") -> object:
        """The result of a job, taken as soon as there is one; `key` may be ``request_id``."""

        def look() -> dict[str, object]:
            found = self.request("GET", "/job/pull/result", params={key: job_id})
            assert found.status_code == 200, found.text
            answer: dict[str, object] = found.json()["data"]
            return answer

        answer = eventually(look, 60, what=f"the result of [{job_id}]")
        assert answer["status"] == "Completed", answer
        return answer["result"]

    def printed(self, job_id: str) -> list[str]:
        """What the job has printed."""
        lines = self.data("GET", f"/job/log/{job_id}", params={"per_page": 100})
        return [line["message"] for line in lines if line["source"] == "stdout"]
