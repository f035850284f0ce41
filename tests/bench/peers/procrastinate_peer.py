"""Procrastinate on PostgreSQL, as durable as that is by default, in a schema of its own."""

from __future__ import annotations

import os

import procrastinate
import psycopg

from tests.bench.peers.mark import mark

QUEUE = os.environ["BENCH_QUEUE"]
URL = os.environ["CORE4_BENCH_POSTGRES"]

# The run's schema, which has the name of its queue.
connector = procrastinate.PsycopgConnector(conninfo=URL, kwargs={"options": f"-c search_path={QUEUE}"})
app = procrastinate.App(connector=connector)
noop = app.task(name="noop", queue=QUEUE)(mark)


def open_peer() -> None:
    with psycopg.connect(URL) as connection:
        found = connection.execute("select 1 from pg_namespace where nspname = %s", [QUEUE]).fetchone()
        if not found:
            connection.execute(f"create schema {QUEUE}")
    app.open()
    if not found:
        app.schema_manager.apply_schema()


def enqueue() -> None:
    noop.defer()


def fill(number: int) -> None:
    noop.batch_defer(*({} for _ in range(number)))


def clear() -> None:
    with psycopg.connect(URL) as connection:
        connection.execute(f"drop schema {QUEUE} cascade")
