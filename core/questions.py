"""What a running job asks its worker: each question has a number, and so has its answer.

Answers come in any order, so that one job can ask for several things at a time. Loads nothing but the
interpreter: job processes import it.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from functools import partial
from typing import Any

from core4.errors import CallFailed, EnqueueRefused

Message = dict[str, Any]
Send = Callable[[Message], None]


class Questions:
    """The questions of one attempt that have no answer yet; from any thread."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self._numbers = itertools.count(1)
        self._lock = threading.Lock()
        self._open: dict[int, Future[Message | None]] = {}
        self._closed = False

    def enqueue(self, name: str, args: Mapping[str, Any]) -> Future[str]:
        """The id of a new job, in time.

        Raises: what encoding the message raises.
        """
        return self._asked({"enqueue": {"name": name, "args": dict(args)}}, _enqueued)[1]

    def call(self, name: str, args: Mapping[str, Any]) -> Future[Any]:
        """The result of a new job, in time; cancelled, it ends that job.

        Raises: what encoding the message raises.
        """
        number, result = self._asked({"call": {"name": name, "args": dict(args)}}, _returned)
        result.add_done_callback(partial(self._drop, number))
        return result

    def _asked(self, message: Message, read: Callable[[Message], Any]) -> tuple[int, Future[Any]]:
        answer: Future[Message | None] = Future()
        result: Future[Any] = Future()
        answer.add_done_callback(partial(_read, read, result))
        with self._lock:
            number, closed = next(self._numbers), self._closed
            if not closed:
                self._open[number] = answer
        if closed:
            answer.set_result(None)
            return number, result
        try:
            self._send({**message, "number": number})
        except RecursionError:
            self._forget(number)
            raise EnqueueRefused("the arguments are nested too deep", reason="bad_arguments") from None
        except BaseException:
            self._forget(number)
            raise
        return number, result

    def _forget(self, number: int) -> Future[Message | None] | None:
        with self._lock:
            return self._open.pop(number, None)

    def _drop(self, number: int, result: Future[Any]) -> None:
        if result.cancelled() and self._forget(number) is not None:
            self._send({"drop": number})

    def take(self, message: Message) -> None:
        """An answer of the worker."""
        answer = self._forget(message.get("answer", 0))
        if answer is not None:
            answer.set_result(message)

    def close(self) -> None:
        """There will be no more answers."""
        with self._lock:
            self._closed = True
            left, self._open = list(self._open.values()), {}
        for answer in left:
            answer.set_result(None)


def _read(read: Callable[[Message], Any], result: Future[Any], answer: Future[Message | None]) -> None:
    """Hand an answer on as what it means, unless whoever asked has gone."""
    if not result.set_running_or_notify_cancel():
        return
    try:
        message = answer.result()
        if message is None:
            raise EnqueueRefused("only the job's own process can enqueue", reason="no_queue")
        if "refused" in message:
            raise EnqueueRefused(message["refused"]["detail"], reason=message["refused"]["reason"])
        result.set_result(read(message))
    except Exception as error:
        result.set_exception(error)


def _enqueued(message: Message) -> str:
    return str(message["enqueued"])


def _returned(message: Message) -> Any:
    if "raised" in message:
        raise CallFailed(**message["raised"])
    return message["returned"]
