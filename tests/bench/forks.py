"""The least a process can cost: forked by a small parent, or a fresh interpreter. A line in, one out.

``fork`` and ``python`` are answered with the seconds until the body began and until the child was reaped.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time

BODY = "import os, time; os.write(1, repr(time.time()).encode())"


def fork() -> tuple[float, float]:
    """`os.fork` and `os.waitpid`."""
    read, write = os.pipe()
    start = time.time()
    pid = os.fork()
    if pid == 0:
        os.write(write, repr(time.time()).encode())
        os._exit(0)
    began = float(os.read(read, 64))
    os.waitpid(pid, 0)
    end = time.time()
    os.close(read)
    os.close(write)
    return began - start, end - start


def python() -> tuple[float, float]:
    """`python -c`."""
    start = time.time()
    with subprocess.Popen([sys.executable, "-c", BODY], stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        began = float(child.stdout.read())
        child.wait()
    return began - start, time.time() - start


def main() -> None:
    """Answer until the input ends."""
    for line in sys.stdin:
        print(*(fork() if line.strip() == "fork" else python()), flush=True)


if __name__ == "__main__":
    main()
