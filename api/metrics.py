"""`/metrics`: what Prometheus reads. Counted in this process, and read from the database when asked."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Iterable, Sequence
from typing import Any

from aiohttp import hdrs, web
from aiohttp_sse import EventSourceResponse
from prometheus_client import CollectorRegistry, Counter, Histogram, ProcessCollector
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest
from prometheus_client.registry import Collector

from core4.api.keys import METRICS, QUEUE, SEATS, USER, WORKERS
from core4.database import Document
from core4.jobs import utcnow
from core4.states import State

Args = dict[str, Any]
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

# Of jobs that wait for a worker it matters since when.
AWAITED = (State.PENDING, State.BLOCKED)


class Metrics:
    """What this process has counted since its start."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._requests = Counter(
            "core4_http_requests", "Answers", ["method", "route", "status"], registry=self.registry
        )
        self._seconds = Histogram(
            "core4_http_request_seconds",
            "Time to an answer, of all but streams",
            ["method", "route"],
            registry=self.registry,
        )
        # To look a series up costs more than to count.
        self._series: dict[tuple[str, str, int, bool], tuple[Counter, Histogram | None]] = {}
        ProcessCollector(registry=self.registry)

    def count(self, request: web.Request, response: web.StreamResponse, seconds: float) -> None:
        """One more answer. What strangers can make up is no label: that would be a series for each."""
        resource = request.match_info.route.resource
        route = resource.canonical if resource is not None else "none"
        method = request.method if request.method in hdrs.METH_ALL else "other"
        timed = not isinstance(response, EventSourceResponse)
        key = method, route, response.status, timed
        if key not in self._series:
            self._series[key] = self._made(*key)
        counter, histogram = self._series[key]
        counter.inc()
        if histogram is not None:
            histogram.observe(seconds)

    def _made(self, method: str, route: str, status: int, timed: bool) -> tuple[Counter, Histogram | None]:
        histogram = self._seconds.labels(method, route) if timed else None
        return self._requests.labels(method, route, status), histogram


@web.middleware
async def counted(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Count each answer."""
    begin = time.perf_counter()
    response = await handler(request)
    request.app[METRICS].count(request, response, time.perf_counter() - begin)
    return response


async def show(request: web.Request, args: Args) -> web.Response:
    """GET /metrics: in Prometheus' text format; of jobs those that the user may read."""
    app, may = request.app, request[USER].may
    store = app[QUEUE].store
    jobs = [row for row in await store.census() if may.may_read(row["name"])]
    families = [
        *_of_jobs(jobs),
        _gauge("core4_journal_jobs", "Jobs in the journal", await store.journaled()),
        _gauge(
            "core4_unsettled_jobs",
            "Ended jobs on their way to the journal, or with an open outbox",
            await store.count({"settle": True}),
        ),
        _of_workers(await app[WORKERS].list()),
        _gauge("core4_streams", "Open streams and waiting requests of this process", app[SEATS].open),
    ]
    database = CollectorRegistry()
    database.register(_Found(families))
    text = generate_latest(app[METRICS].registry) + generate_latest(database)
    return web.Response(body=text, headers={hdrs.CONTENT_TYPE: CONTENT_TYPE_LATEST})


class _Found(Collector):
    """What has been read already, in the shape that the library writes."""

    def __init__(self, families: Sequence[Metric]) -> None:
        self._families = families

    def collect(self) -> Iterable[Metric]:
        return self._families


def _of_jobs(rows: Sequence[Document]) -> list[Metric]:
    count = GaugeMetricFamily("core4_jobs", "Jobs in the queue", labels=["namespace", "name", "state"])
    oldest = GaugeMetricFamily(
        "core4_oldest_job_seconds",
        "Age of the oldest job that has not begun",
        labels=["namespace", "name", "state"],
    )
    now = utcnow()
    for row in rows:
        labels = [row["namespace"], row["name"], row["state"]]
        count.add_metric(labels, row["n"])
        if row["state"] in AWAITED:
            oldest.add_metric(labels, max((now - row["since"]).total_seconds(), 0.0))
    return [count, oldest]


def _of_workers(rows: Sequence[Document]) -> Metric:
    family = GaugeMetricFamily("core4_workers", "Workers by state", labels=["state"])
    for state in sorted({row["state"] for row in rows}):
        family.add_metric([state], sum(row["state"] == state for row in rows))
    return family


def _gauge(name: str, text: str, value: float) -> Metric:
    return GaugeMetricFamily(name, text, value=value)
