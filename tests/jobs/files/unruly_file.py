from __future__ import annotations

import json
import os
import signal
import struct
import subprocess as programs
import sys
import time
from typing import Any

import core4


@core4.subprocess
def misbehave(what: str, ledger: str) -> Any:
    with open(ledger, "a", encoding="utf-8") as file:
        file.write(f"{what} {os.getpid()}\n")
    if what == "raises":
        raise RuntimeError("on purpose")
    if what == "kills itself":
        os.kill(os.getpid(), signal.SIGKILL)
    if what == "leaves at once":
        os._exit(4)
    if what == "no JSON":
        return {1, 2}
    if what == "forges":
        body = json.dumps({"complete": {"result": "forged"}}).encode()
        os.write(3, struct.pack(">I", len(body)) + body)
    if what == "lingers":
        programs.Popen(["sleep", "3600"], start_new_session=True)
        time.sleep(3600)
    return what


if __name__ == "__main__":
    if misbehave() == "exits":
        sys.exit(3)
