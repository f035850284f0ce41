"""Manager and worker in a user's own aiohttp application.

A manager is the API, its documentation and a worker for the tasks of the application, on the application's
own port; with a database of its own if none is named. A worker serves one namespace of a manager that is
elsewhere, without a database.
"""

from __future__ import annotations

import asyncio
import logging
import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from contextlib import AsyncExitStack
from dataclasses import replace
from typing import Any, TypeVar

from aiohttp import web
from aiohttp.web_urldispatcher import AbstractRuleMatching, MatchedSubAppResource
from bson import ObjectId

from core4 import decorated
from core4.api.app import SHUTDOWN, create_app
from core4.api.keys import BASE, CATALOGUE, CONTROLS, HUB, LOCAL_SECRET, QUEUE, SETTINGS, USERS
from core4.brokers import require
from core4.config import Settings
from core4.database import Database
from core4.embedded import EmbeddedServer
from core4.errors import ConfigError, Core4Error, NotFound, Unavailable, UnknownJob, UsageError
from core4.jobs import Job
from core4.orders import make_order
from core4.results import result_of
from core4.timers import Timers
from core4.users import UserStore
from core4.waits import heard
from core4.worker.backend import Backend
from core4.worker.daemon import Worker
from core4.worker.direct import Direct
from core4.worker.handle import Launcher
from core4.worker.local import Local
from core4.worker.remote import Remote

F = TypeVar("F", bound=Callable[..., Any])

SLOTS = 3  # easyjobs' own default for a worker
LOOK = 1.0  # seconds between two looks at a job that somebody waits for, should no change be told
PUBLISHING = 0.05  # seconds between two looks whether a task of one's own is published
REACH = 1.0  # seconds between two tries to reach a manager
_OURS = ("/docs", "/livez", "/readyz", "/version", "/metrics")
_BROKERS = {None: None, "easyjobs": None, "core4": None}  # the built-in inbox, which is always there


class Inside:
    """A worker inside an application: its tasks, its pause and its end."""

    def __init__(self, local: Local, log: logging.Logger) -> None:
        self.log = log
        self.scheduler = Timers()
        self._local = local
        self._worker: Worker
        self._stack = AsyncExitStack()
        self._loop = asyncio.get_running_loop()

    def task(self, **options: Any) -> Callable[[Callable[..., Any]], decorated.Task[..., Any]]:
        """Register a function as a task, see `core4.task`; it may be a function within a function.

        Raises: UnknownOption, BadOption, JobInvalid.
        """
        declare = decorated.task(**options)

        def register(function: Callable[..., Any]) -> decorated.Task[..., Any]:
            found = declare(function)
            self._local.add(found)
            return found

        return register

    def toggle_workers(self, pause: bool = True) -> None:
        """Start no more jobs in this process, or go on; those that run are not touched. From any thread."""
        self._loop.call_soon_threadsafe(self._worker.pause, pause)

    async def close(self) -> None:
        """Give running jobs their time, then end everything. Called by the application's clean-up."""
        await self._stack.aclose()

    async def _start_worker(self, backend: Backend, settings: Settings, launcher: Launcher) -> None:
        self._local.open()
        self._stack.callback(self._local.close)
        self._stack.push_async_callback(self.scheduler.close)
        self._worker = Worker(backend, settings, launcher, self._local)
        stop = asyncio.Event()
        running = asyncio.create_task(self._worker.run(stop), name="core4 worker")
        running.add_done_callback(self._on_worker_end)

        async def end() -> None:
            stop.set()
            await asyncio.wait({running})

        self._stack.push_async_callback(end)
        up = asyncio.create_task(self._worker.up.wait())
        await asyncio.wait({running, up}, return_when=asyncio.FIRST_COMPLETED)
        up.cancel()
        if running.done():
            running.result()
            raise Core4Error("the worker ended before it began")

    def _on_worker_end(self, running: asyncio.Task[None]) -> None:
        if not running.cancelled() and (error := running.exception()) is not None:
            self.log.critical("worker.ended_by_error", exc_info=error)


class JobManager(Inside):
    """API, documentation and a local worker in an application; made by `create`."""

    def __init__(self, local: Local, log: logging.Logger) -> None:
        super().__init__(local, log)
        self._api: web.Application
        self._pid = os.getpid()

    @classmethod
    async def create(
        cls,
        app: web.Application,
        server_secret: str,
        *,
        broker_type: str | None = None,
        broker_path: str | None = None,
        users: Mapping[str, str] | None = None,
        slots: int = SLOTS,
        logger: logging.Logger | None = None,
        **settings: Any,
    ) -> JobManager:
        """A running manager, which ends with the application; call it on startup, or before the application
        runs, in its loop.

        Args:
            server_secret: what workers over HTTP share with it, 8 characters at least. Without `users` it is
                the password of `admin`, too, on this machine's own address only.
            broker_type: ``rabbitmq`` with the URL in `broker_path`; or none: the built-in inbox.
            users: names and passwords of those who may do everything; needed beyond this machine. Rights
                that are narrower are given with `core4 user`.
            slots: jobs of its own tasks that run at the same time.
            logger: where it logs; without one ``core4.manager``.
            settings: any setting by its name, like ``mongo_url``, ``mongo_database`` or ``home``.

        Raises: ConfigError.
        """
        made = Settings.load(worker_secret=server_secret, slots=slots, **settings)
        made = replace(made, broker_url=_broker_url(broker_type, broker_path) or made.broker_url)
        if made.broker_url:
            require(made.broker_url)
        manager = cls(Local(), logger or logging.getLogger(__name__))
        try:
            await manager._begin(app, made, server_secret, users)
        except BaseException:
            await manager.close()
            raise
        return manager

    async def _begin(
        self, app: web.Application, settings: Settings, secret: str, users: Mapping[str, str] | None
    ) -> None:
        launcher = Launcher.spawn(settings)  # before there are connections
        self._stack.callback(launcher.close)
        if settings.mongo_url is None:
            server = EmbeddedServer(settings.home)
            url = server.start()  # on this thread: the database ends with the one that started it
            self._stack.push_async_callback(asyncio.to_thread, server.stop)
            settings = replace(settings, mongo_url=url)
        assert settings.mongo_url is not None
        database = await Database.connect(
            settings.mongo_url, settings.mongo_database, app_name="core4-manager"
        )
        self._stack.push_async_callback(database.close)
        self._api = create_app(settings, database)
        if users is None:
            self._api[LOCAL_SECRET] = secret
        runner = web.AppRunner(self._api, access_log=None, shutdown_timeout=SHUTDOWN)
        await runner.setup()
        self._stack.push_async_callback(runner.cleanup)
        await _set_users(self._api[USERS], users or {})
        await self._start_worker(Direct(database, settings), settings, launcher)
        _mount(app, self._api)
        app.on_shutdown.append(self._cut)
        app.on_cleanup.append(self._end)

    async def _cut(self, app: web.Application) -> None:
        # Streams and workers that wait would keep the application from its end.
        await self._api.shutdown()

    async def _end(self, app: web.Application) -> None:
        await self.close()

    # ------------------------------------------------------------------ core4.decorated.Home

    @property
    def is_here(self) -> bool:
        return os.getpid() == self._pid

    def begin(self, name: str, args: Mapping[str, Any]) -> Future[str]:
        return asyncio.run_coroutine_threadsafe(self._enqueue(name, args), self._loop)

    def call(self, name: str, args: Mapping[str, Any]) -> Future[Any]:
        async def result() -> Any:
            return await self.get_job_result(await self._enqueue(name, args), timeout=math.inf)

        return asyncio.run_coroutine_threadsafe(result(), self._loop)

    async def _enqueue(self, name: str, args: Mapping[str, Any]) -> str:
        cap = self._api[SETTINGS].args_cap
        order = make_order(await self._entry(name), args, args_cap=cap, username="manager")
        return str((await self._api[QUEUE].enqueue(order)).id)

    async def _entry(self, name: str) -> Mapping[str, Any]:
        while (entry := await self._api[CATALOGUE].get(name)) is None:
            if name not in self._local.entries:
                raise UnknownJob(name)
            await asyncio.sleep(PUBLISHING)  # it was declared a moment ago
        return entry

    # ------------------------------------------------------------------ what users of easyjobs know

    def task(self, **options: Any) -> Callable[[Callable[..., Any]], decorated.Task[..., Any]]:
        """As `core4.task`; in this application, ``await`` of such a task is a job, too, and gives its result.

        Raises: UnknownOption, BadOption, JobInvalid.
        """
        register = super().task(**options)

        def adopt(function: Callable[..., Any]) -> decorated.Task[..., Any]:
            found = register(function)
            found.home = self
            self._stack.callback(setattr, found, "home", None)
            return found

        return adopt

    def toggle_workers(self, pause: bool = True, *, scope: str = "own") -> None:
        """Pause, or go on: this process (``own``), or with ``scope="all"`` every worker of the system."""
        if scope == "own":
            super().toggle_workers(pause)
        elif scope == "all":
            asyncio.run_coroutine_threadsafe(self._toggle_all(pause), self._loop)
        else:
            raise UsageError(f"scope is {scope!r:.50}, expected own or all")

    async def _toggle_all(self, pause: bool) -> None:
        controls, claims = self._api[CONTROLS], self._api[QUEUE].claims
        if pause:
            await controls.pause("everything", by="manager")
        elif await controls.resume("everything"):
            await claims.unpark(await controls.read())

    async def run_job(
        self, namespace: str, name: str, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> str:
        """Enqueue a task; the id of the job.

        Raises: UnknownJob; BadArguments.
        """
        from core4.messages import Message, bind

        entry = await self._entry(f"{namespace}:{name}")
        message = Message(name=name, namespace=namespace, args=tuple(args), kwargs=dict(kwargs or {}))
        return await self._enqueue(entry["_id"], bind(entry, message))

    async def get_job_result(self, job_id: str, *, timeout: float = 60.0) -> Any:
        """Wait until a job has ended, and take its result: nobody else gets it.

        Raises: JobNotFound; TimeoutError; Core4Error if the job did not complete.
        """
        job = await self._ended(ObjectId(job_id), timeout)
        taken = await self._api[QUEUE].consume(job.id, by="manager")
        found = result_of(taken.document)
        if found["error"] is not None:
            raise Core4Error(f"task {job.name} failed: {found['error']['message']}", error=found["error"])
        return found["result"]

    async def get_job_result_by_request_id(self, request_id: str, *, timeout: float = 60.0) -> Any:
        """The same by the id of the request that made the job."""
        found = await self._api[QUEUE].store.of_request(request_id)
        if not found:
            raise NotFound(f"no job was made by the request [{request_id}]")
        return await self.get_job_result(str(found[0]), timeout=timeout)

    async def _ended(self, job_id: ObjectId, timeout: float) -> Job:
        deadline = time.monotonic() + timeout
        with self._api[HUB].hints(job_id) as changed:
            while not (job := await self._api[QUEUE].store.get(job_id)).has_ended:
                left = deadline - time.monotonic()
                if left <= 0:
                    raise TimeoutError(f"job [{job_id}] has not ended within {timeout:g} s")
                changed.clear()
                await heard(changed, min(left, LOOK))
        return job


class JobWorker(Inside):
    """A worker for one namespace of a manager elsewhere, without a database; made by `create`."""

    def __init__(self, local: Local, log: logging.Logger, namespace: str) -> None:
        super().__init__(local, log)
        self._namespace = namespace

    @classmethod
    async def create(
        cls,
        app: web.Application,
        server_secret: str = "",
        *,
        manager_host: str,
        manager_port: int | str,
        manager_secret: str,
        jobs_queue: str = "DEFAULT",
        max_tasks_per_worker: int = SLOTS,
        logger: logging.Logger | None = None,
        **settings: Any,
    ) -> JobWorker:
        """A running worker, which ends with the application; waits until the manager answers.

        Args:
            server_secret: accepted and not used: a worker opens no address of its own.
            manager_host: name or address; or a URL with ``https://``.
            manager_secret: the manager's `server_secret`; it is never sent.
            jobs_queue: the namespace of all its tasks, the only one that it serves.
            max_tasks_per_worker: jobs that run at the same time.

        Raises: ConfigError; Unauthenticated if the secret is not the manager's.
        """
        host = manager_host if "://" in manager_host else f"http://{manager_host}"
        made = Settings.load(
            manager=f"{host}:{manager_port}",
            worker_secret=manager_secret,
            namespaces=(jobs_queue,),
            slots=max_tasks_per_worker,
            **settings,
        )
        worker = cls(Local(), logger or logging.getLogger(__name__), jobs_queue)
        try:
            await worker._begin(app, made)
        except BaseException:
            await worker.close()
            raise
        return worker

    async def _begin(self, app: web.Application, settings: Settings) -> None:
        launcher = Launcher.spawn(settings)
        self._stack.callback(launcher.close)
        remote = await self._stack.enter_async_context(Remote(settings))
        while True:
            try:
                settings = await remote.terms(settings)
                break
            except Unavailable as error:
                self.log.warning("manager.unreachable", extra={"error": error.detail})
                await asyncio.sleep(REACH)
        await self._start_worker(remote, settings, launcher)
        app.on_cleanup.append(self._end)

    async def _end(self, app: web.Application) -> None:
        await self.close()

    def task(self, **options: Any) -> Callable[[Callable[..., Any]], decorated.Task[..., Any]]:
        if options.get("namespace", self._namespace) != self._namespace:
            raise ConfigError(f"all tasks of this worker are in {self._namespace}: leave namespace out")
        return super().task(**{**options, "namespace": self._namespace})


class _Ours(AbstractRuleMatching):
    """What is the manager's among the addresses of an application."""

    async def match(self, request: web.Request) -> bool:
        path = request.rel_url.path
        return path.startswith((f"{BASE}/", "/static/")) or path in _OURS

    def get_info(self) -> Any:
        return {"path": BASE}

    @property
    def canonical(self) -> str:
        return BASE


@web.middleware
async def _pass(request: web.Request, handler: Any) -> web.StreamResponse:
    response: web.StreamResponse = await handler(request)
    return response


def _mount(app: web.Application, api: web.Application) -> None:
    # Not `add_subapp`: on startup it is too late for that, and the addresses have their base already.
    app.router.register_resource(MatchedSubAppResource(_Ours(), api))
    app.middlewares.append(_pass)  # without any of its own an application asks for no other's middlewares


def _broker_url(kind: str | None, path: str | None) -> str | None:
    if kind in _BROKERS:
        return None
    if path is None:
        raise ConfigError(f"broker_type {kind!r} needs broker_path, its URL")
    return path


async def _set_users(store: UserStore, users: Mapping[str, str]) -> None:
    for name, password in users.items():
        if await store.get(name) is None:
            await store.add(name, password, allow=["cop"])
        elif await store.verify(name, password) is None:
            await store.set_password(name, password)
