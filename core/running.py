"""The `core4 up` that runs on a data folder, for those who look for it: loads no driver of a database."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import psutil

STATE_FILE = "stack.json"


def running_stack(home: Path) -> dict[str, Any] | None:
    """What the stack that runs on `home` says about itself (`url`, `default_user`); None if none runs."""
    try:
        state: dict[str, Any] = json.loads((home / STATE_FILE).read_text())
        alive = abs(psutil.Process(state["pid"]).create_time() - state["create_time"]) < 1.0
    except (OSError, ValueError, TypeError, KeyError, psutil.Error):
        return None
    return state if alive else None
