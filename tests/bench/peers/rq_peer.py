"""RQ on Redis, with a fork for each job."""

from __future__ import annotations

import os

from redis import Redis
from rq import Queue

QUEUE = os.environ["BENCH_QUEUE"]
BODY = "tests.bench.peers.mark.mark"

redis = Redis.from_url(os.environ["CORE4_BENCH_REDIS"])
queue = Queue(QUEUE, connection=redis)


def open_peer() -> None:
    redis.ping()


def enqueue() -> None:
    queue.enqueue(BODY, result_ttl=0)


def fill(number: int) -> None:
    queue.enqueue_many([Queue.prepare_data(BODY, result_ttl=0) for _ in range(number)])


def clear() -> None:
    queue.delete(delete_jobs=True)
