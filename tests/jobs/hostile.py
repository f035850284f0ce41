"""A function that looks for secrets wherever it can; it reports what it finds of the word `canary`."""

from __future__ import annotations

from typing import Any


def snoops(pids: list[int], paths: list[str], ports: list[int], signal: int = 9) -> dict[str, Any]:
    """What it has found, and how many tries were refused. Told where to look, and what signal to send."""
    import ctypes
    import gc
    import os
    import socket
    import subprocess
    import sys

    needle = "can" + "ary"  # so that its own source does not have the word
    found: list[str] = []
    tries = {"made": 0, "refused": 0}

    def attempt(where: str, action: Any, *args: Any) -> None:
        tries["made"] += 1
        try:
            seen = action(*args)
        except Exception:
            tries["refused"] += 1
            return
        text = seen.decode("utf-8", "replace") if isinstance(seen, bytes) else str(seen)
        at = text.find(needle)
        if at >= 0:
            found.append(f"{where}: {text[max(at - 40, 0) : at + 40]}")
            print(found[-1])

    def content(path: str) -> bytes:
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
        try:
            return os.read(fd, 1 << 20)
        finally:
            os.close(fd)

    def memory(pid: int) -> bytes:
        seen = b""
        with open(f"/proc/{pid}/maps") as maps, open(f"/proc/{pid}/mem", "rb", 0) as mem:
            for line in maps:
                if "heap" in line or "stack" in line:
                    start, end = (int(part, 16) for part in line.split()[0].split("-"))
                    mem.seek(start)
                    seen += mem.read(min(end - start, 1 << 22))
        return seen

    def seize(pid: int) -> str:
        if ctypes.CDLL(None).ptrace(0x4206, pid, 0, 0) != 0:
            raise PermissionError
        return needle + " is traced"

    def linked(path: str, link: Any, name: str) -> bytes:
        link(path, name)
        return content(name)

    def received(fd: int) -> bytes:
        with socket.socket(fileno=os.dup(fd)) as one:
            return one.recv(1 << 16, socket.MSG_PEEK | socket.MSG_DONTWAIT)

    def by_shell(path: str) -> bytes:
        return subprocess.run(["cat", path], check=True, capture_output=True).stdout

    def changed(path: str) -> str:
        with open(path, "a"):
            return needle + " can be written"

    def connected(port: int) -> str:
        with socket.create_connection(("127.0.0.1", port), timeout=5):
            return needle + " is connected"

    def frames() -> str:
        frame: Any = sys._getframe(3)  # behind its own
        seen = []
        while frame is not None:
            seen += [repr(frame.f_locals), repr(frame.f_globals)]
            frame = frame.f_back
        return " ".join(seen)

    def settings() -> str:
        names = ("CORE4_MONGO_URL", "mongo_url", "function_keys")
        kept = [each for each in gc.get_objects() if type(each) is dict]
        return " ".join(str(each[name]) for each in kept for name in names if name in each)

    attempt("environment", lambda: dict(os.environ))
    attempt("frames", frames)
    attempt("objects", settings)
    for pid in [*pids, os.getpid(), os.getppid()]:
        for name in ("environ", "cmdline", "auxv", "status", "cwd/core4.toml", "root/etc/core4.toml"):
            attempt(f"{pid} {name}", content, f"/proc/{pid}/{name}")
        attempt(f"{pid} memory", memory, pid)
        attempt(f"{pid} ptrace", seize, pid)
        attempt(f"{pid} shell", by_shell, f"/proc/{pid}/environ")
        for fd in range(3, 40):
            attempt(f"{pid} fd {fd}", content, f"/proc/{pid}/fd/{fd}")
    for fd in range(3, 60):
        attempt(f"fd {fd}", os.pread, fd, 1 << 16, 0)
        attempt(f"socket {fd}", received, fd)
    for number, path in enumerate(paths):
        attempt(path, content, path)
        attempt(path, content, "/proc/self/root" + path)
        attempt(path, linked, path, os.symlink, f"soft{number}")
        attempt(path, linked, path, os.link, f"hard{number}")
        attempt(path, by_shell, path)
        attempt(path, changed, path)
    for port in ports:
        attempt(f"port {port}", connected, port)
    for pid in pids:
        attempt(f"signal {pid}", os.kill, pid, signal)
    return {"found": found, **tries}
