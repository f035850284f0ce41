"""Where the parts of one API process are kept, in the application and in each request."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from aiohttp import web

from core4.actions import ActionStore
from core4.api.hub import Hub
from core4.api.throttle import Seats, SignIns, Throttle, Turns
from core4.catalogue import Catalogue
from core4.changes import ChangeFeed
from core4.config import Settings
from core4.controls import ControlStore
from core4.database import Database
from core4.events import EventStore
from core4.logs import LogStore
from core4.queues import JobQueue
from core4.registry import WorkerRegistry
from core4.remembered import Remembered
from core4.returns import Returns
from core4.schedules import ScheduleStore
from core4.users import Token, User, UserStore

if TYPE_CHECKING:
    from core4.api.metrics import Metrics

BASE = "/core4/api/v1"

SETTINGS = web.AppKey("settings", Settings)
DATABASE = web.AppKey("database", Database)
QUEUE = web.AppKey("queue", JobQueue)
LOGS = web.AppKey("logs", LogStore)
CATALOGUE = web.AppKey("catalogue", Catalogue)
SCHEDULES = web.AppKey("schedules", ScheduleStore)
WORKERS = web.AppKey("workers", WorkerRegistry)
# Whether a living worker runs jobs of this name in this namespace, as of a moment ago.
SERVED: web.AppKey[Remembered[tuple[str, str], bool]] = web.AppKey("served")
CONTROLS = web.AppKey("controls", ControlStore)
ACTIONS = web.AppKey("actions", ActionStore)
USERS = web.AppKey("users", UserStore)
SIGN_INS = web.AppKey("sign_ins", SignIns)
REQUESTS = web.AppKey("requests", Throttle)
SEATS = web.AppKey("seats", Seats)
TURNS = web.AppKey("turns", Turns)
HUB = web.AppKey("hub", Hub)
# Lets whoever knows it in over this machine's own address, as LOCAL_USER with every right.
LOCAL_SECRET = web.AppKey("local_secret", str)
LOCAL_USER = "admin"
FEED = web.AppKey("feed", ChangeFeed)
CLOSING = web.AppKey("closing", asyncio.Event)  # set when this process stops: nobody waits any longer
# Not imported where it is needed: it describes those who need it.
OPENAPI: web.AppKey[Callable[[Sequence[Mapping[str, Any]]], dict[str, Any]]] = web.AppKey("openapi")
EVENTS = web.AppKey("events", EventStore)
RETURNS = web.AppKey("returns", Returns)
# Not imported either: its handler needs the others.
METRICS: web.AppKey[Metrics] = web.AppKey("metrics")

REQUEST_ID = web.RequestKey("request_id", str)
USER = web.RequestKey("user", User)
TOKEN = web.RequestKey("token", Token)
TOKEN_TEXT = web.RequestKey("token_text", str)
