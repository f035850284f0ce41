"""``python -m tests.bench.peers.client MODULE open|fill|latency|clear [NUMBER]``: one peer's client.

``latency`` prints the seconds from each call to the first line of the body, as JSON.
"""

from __future__ import annotations

import importlib
import json
import os
import random
import sys
import time
from pathlib import Path
from types import ModuleType

from tests.bench.peers.mark import MARKS, marks

WARM_UP = 2  # calls that connect
PATIENCE = 60.0  # seconds for one job


def latencies(peer: ModuleType, number: int) -> list[float]:
    """Of one job after the other on an idle worker, with pauses that no timer of it can follow."""
    file = Path(os.environ[MARKS])
    found = []
    for _ in range(WARM_UP + number):
        time.sleep(random.uniform(0.03, 0.15))
        before = len(marks(file))
        start = time.time()
        peer.enqueue()
        while len(marks(file)) == before:
            if time.time() - start > PATIENCE:
                raise TimeoutError("a job has not left its mark")
            time.sleep(0.0005)
        found.append(marks(file)[before] - start)
    return found[WARM_UP:]


def main() -> None:
    """Do the one thing that is asked for."""
    name, what, *number = sys.argv[1:]
    peer = importlib.import_module(f"tests.bench.peers.{name}")
    peer.open_peer()
    if what == "latency":
        print(json.dumps(latencies(peer, int(number[0]))))
    elif what == "fill":
        peer.fill(int(number[0]))
    elif what == "clear":
        peer.clear()


if __name__ == "__main__":
    main()
