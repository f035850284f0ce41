from __future__ import annotations

import logging
import os
import sys
import time
from pathlib import Path

from core4 import subprocess

seen = sorted(sys.modules)


@subprocess
def work(a, b, c):  # type: ignore[no-untyped-def]
    """
    insert blocking / non-blocking work here
    """
    time.sleep(0.01)  # Blocking
    print(f"printed {a}")
    logging.getLogger(__name__).debug("logged %s", b)
    return {
        "result": f"blocking with {a} {b} {c}",
        "pid": os.getpid(),
        "modules": seen,
        "command": Path("/proc/self/cmdline").read_text(),
        "environ": Path("/proc/self/environ").read_text(),
        "argv": sys.argv,
    }


if __name__ == "__main__":
    work()
