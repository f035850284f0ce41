"""Celery on RabbitMQ, with one process for the jobs."""

from __future__ import annotations

import os

from celery import Celery

from tests.bench.peers.mark import mark

app = Celery("bench", broker=os.environ["CORE4_BENCH_AMQP"])
app.conf.update(
    task_ignore_result=True,
    broker_connection_retry_on_startup=True,
    task_default_queue=os.environ["BENCH_QUEUE"],
)
noop = app.task(name="noop")(mark)


def open_peer() -> None:
    with app.connection_for_write() as connection:
        connection.ensure_connection(max_retries=1, timeout=5)


def enqueue() -> None:
    noop.delay()


def fill(number: int) -> None:
    for _ in range(number):
        noop.delay()


def clear() -> None:
    with app.connection_for_write() as connection:
        channel = connection.default_channel
        channel.queue_delete(app.conf.task_default_queue)
        channel.exchange_delete(app.conf.task_default_queue)
