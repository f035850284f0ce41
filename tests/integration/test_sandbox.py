"""What a shipped function is kept from, and what goes on working behind its doors.

Most of it in a process that shuts itself in as that of a function does: no worker is needed for that.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.helpers import ROOT, clean_environ, program

BEHIND = """
import json, os, sys
from core4.worker import confine
from tests.jobs import sandboxed
name, folder, ports, args, level = sys.argv[1], *map(json.loads, sys.argv[2:])
os.chdir(folder)
os.environ.update(HOME=folder, TMPDIR=folder)
if level is not None:
    confine.level = lambda: level
if ports is not None:
    confine.confine([folder], ports)
print(json.dumps(getattr(sandboxed, name)(*args)))
"""


def behind(
    folder: Path, name: str, *args: Any, ports: Sequence[int] | None = (), level: int | None = None
) -> Any:
    """What one of `tests.jobs.sandboxed` finds in a folder of its own; with no `ports` it is not shut in.

    As on an older kernel, if that is the `level` of its Landlock.
    """
    folder.mkdir(exist_ok=True)
    done = subprocess.run(
        [sys.executable, "-c", BEHIND, name, *map(json.dumps, (str(folder), ports, args, level))],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture
def port() -> Iterator[int]:
    """A port, for TCP and what is built on it, where a server greets whoever comes."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def greet() -> None:
            while True:
                try:
                    peer, _ = server.accept()
                except OSError:
                    return
                with peer:
                    peer.sendall(b"hello")

        greeter = threading.Thread(target=greet)
        greeter.start()
        yield int(server.getsockname()[1])
        server.shutdown(socket.SHUT_RDWR)
        greeter.join()


def test_unix_sockets_are_out_of_reach(tmp_path: Path) -> None:
    """Behind one is a shell of the same user: windows of workers, a container service, an agent with keys."""
    path, mark = tmp_path / "socket", tmp_path / "mark"
    tmux = ["tmux", "-S", str(tmp_path / "tmux"), "-f", os.devnull]
    command = [*tmux, "run-shell", f"touch {mark}"]
    subprocess.run([*tmux, "new-session", "-d"], check=True)
    try:
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(str(path))
            server.listen()
            free = behind(tmp_path / "free", "talks_to", str(path), command, ports=None)
            assert (free, mark.exists()) == ({"stream": "connected", "pair": "made", "program": "0"}, True)
            mark.unlink()
            shut = behind(tmp_path / "shut", "talks_to", str(path), command)
    finally:
        subprocess.run([*tmux, "kill-server"], check=True)

    assert (shut["stream"], shut["pair"]) == ("PermissionError", "PermissionError")
    assert shut["program"] != "0"
    assert not mark.exists()


def test_a_closed_port_is_reached_by_no_way(tmp_path: Path, port: int) -> None:
    """Nor is one that is open reached by any but the plain one, which is looked at."""
    free = behind(tmp_path / "free", "connects", port, ports=None)
    assert free["plain"] == "hello"
    closed = behind(tmp_path / "closed", "connects", port, ports=[80])
    opened = behind(tmp_path / "opened", "connects", port, ports=[port])

    assert set(closed.values()) <= {"EACCES", "EPERM"}, closed
    assert opened.pop("plain") == "hello"
    assert set(opened.values()) == {"EPERM"}


def test_nobody_is_listened_to(tmp_path: Path) -> None:
    shut = behind(tmp_path / "shut", "listens", ports=[80])

    assert set(shut.values()) == {"PermissionError"}


def test_what_no_function_needs_of_the_kernel_is_refused(tmp_path: Path) -> None:
    told = behind(tmp_path / "shut", "calls")

    # So that the C library takes the older call, whose flags can be seen.
    assert told.pop("clone3") == "ENOSYS"
    assert {told.pop(name) for name in ("setxattrat", "removexattrat")} == {"ENOTSUP"}
    assert {name: said for name, said in told.items() if said != "EPERM"} == {}
    assert len(told) > 50


@pytest.mark.skipif(os.uname().machine != "x86_64", reason="only this machine has two kinds of calls")
def test_the_numbers_of_another_machine_are_refused(tmp_path: Path) -> None:
    """The same number is another call there."""
    assert behind(tmp_path / "shut", "foreign") == -1


def test_other_processes_are_left_alone(tmp_path: Path) -> None:
    with subprocess.Popen(["sleep", "60"]) as other:
        free = behind(tmp_path / "free", "presses", other.pid, ports=None)
        told = behind(tmp_path / "shut", "presses", other.pid)
        other.kill()

    assert set(free.values()) == {"done"}
    assert set(told.values()) == {"EPERM"}


def test_files_of_others_keep_mode_owner_times_and_attributes(tmp_path: Path) -> None:
    """Most are taken and not set: `shutil.copy`, tar and many programs fail where that is refused."""
    folder = tmp_path / "theirs"
    folder.mkdir(0o700)
    file = folder / "settings"
    file.write_text("secret")
    file.chmod(0o600)
    with contextlib.suppress(OSError):  # not all file systems have them
        os.setxattr(file, "user.mine", b"y")
    before, attributes = (folder.stat(), file.stat()), os.listxattr(file)
    told = behind(tmp_path / "shut", "defaces", str(file))

    after = folder.stat(), file.stat()
    assert [(each.st_mode, each.st_uid, each.st_mtime_ns, each.st_ctime_ns) for each in after] == [
        (each.st_mode, each.st_uid, each.st_mtime_ns, each.st_ctime_ns) for each in before
    ]
    assert os.listxattr(file) == attributes
    assert {told[name] for name in ("setxattr", "removexattr")} == {"ENOTSUP"}
    assert {told[name] for name in ("chmod", "chmod at", "chmod of the folder", "utime", "chown")} == {"said"}
    assert {told[name] for name in ("program", "touch")} == {"0"}


@pytest.mark.parametrize("level", [2, None])
def test_files_of_others_keep_their_content(level: int | None, tmp_path: Path) -> None:
    """Landlock before Linux 6.2 does not know that a file can be cut by its name."""
    file = tmp_path / "settings"
    file.write_text("secret")
    told = behind(tmp_path / "shut", "empties", str(file), level=level)

    assert (told, file.read_text()) == ({"theirs": "PermissionError", "own": "te"}, "secret")


def test_usual_means_go_on_working(tmp_path: Path, port: int) -> None:
    told = behind(tmp_path / "shut", "works", port, ports=[port])

    assert told == {
        "copied": ["text"] * 3,
        "temporary": True,
        "gone": True,
        "packed": ["text"] * 2,
        "programs": ["ran\n", "2\n", "3\n", 0, 0],
        "threads": [0, 1, 2],
        "fork": 5,
        "asyncio": ["loop\n", "hello"],
        "tcp": "hello",
        "udp": "by udp",
        "pair": "pair",
        "name": "127.0.0.1",
        "zone": True,
        "limit": [0, 0],
        "nice": True,
        "module": True,
    }


# ---------------------------------------------------------------------- folders

# As a user whom modes bind: root is let in everywhere.
ORDINARY = """
import os, signal, sys, tempfile
from pathlib import Path
from core4.worker.folders import Folder, sweep
from tests.jobs import sandboxed
if os.getuid() == 0:
    os.setresgid(65534, 65534, 65534)
    os.setresuid(65534, 65534, 65534)
tempfile.tempdir = sys.argv[1]
"""


@pytest.fixture
def everybodys() -> Iterator[Path]:
    """A folder in which each user may have some of his own."""
    with tempfile.TemporaryDirectory(prefix="core4-everybodys-", dir="/tmp") as name:
        Path(name).chmod(0o1777)
        yield Path(name)


def ordinary(script: str, *args: Any) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", ORDINARY + script, *map(str, args)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        text=True,
    )


def test_a_folder_is_deleted_whatever_is_in_it(everybodys: Path) -> None:
    """Deeper than a path may be and than Python may recurse; shut folders; links to elsewhere."""
    script = """
folder = Folder.make()
os.chdir(folder.path)
sandboxed.digs(2500)
for path in ("around", "."):
    os.chmod(path, 0)
os.chdir("/")
folder.close()
print(folder.path.exists())
"""
    with ordinary(script, everybodys) as process:
        assert process.communicate(timeout=120)[0] == "False\n"
    assert process.returncode == 0
    assert list(everybodys.iterdir()) == []
    assert Path("/usr").is_dir()


def test_what_dead_workers_have_left_is_deleted(everybodys: Path, tmp_path: Path) -> None:
    """And nothing of those that live, of other users, or of another kind."""
    script = """
folder = Folder.make()
(folder.path / "file").touch()
print(folder.path, flush=True)
signal.pause()
"""
    other, strange = everybodys / "core4-function-call-other", everybodys / "core4-strange"
    file = everybodys / "core4-function-call-file"
    other.mkdir()
    strange.mkdir()
    file.touch()
    linked = everybodys / "core4-function-call-link"
    linked.symlink_to(tmp_path)
    (tmp_path / "kept").touch()
    if os.getuid() != 0:
        other.rmdir()  # there is nobody else
    kept = set(everybodys.iterdir())
    with ordinary(script, everybodys) as dead, ordinary(script, everybodys) as living:
        assert dead.stdout is not None
        assert living.stdout is not None
        left, used = Path(dead.stdout.readline().strip()), Path(living.stdout.readline().strip())
        dead.kill()
        dead.wait()
        assert set(everybodys.iterdir()) == kept | {left, used}
        with ordinary("print(sweep())", everybodys) as sweeper:
            assert sweeper.communicate(timeout=60)[0] == "1\n"
        assert set(everybodys.iterdir()) == kept | {used}
        assert [each.name for each in used.iterdir()] == ["file"]
        living.kill()
    assert (tmp_path / "kept").exists()


# ---------------------------------------------------------------------- without it

# A kernel that answers a call with an error, always or with this first argument; then the command.
LACKING = """
import ctypes, os, struct, sys
number, first, error, command = *map(int, sys.argv[1:4]), sys.argv[4:]
libc = ctypes.CDLL(None, use_errno=True)
refused = (0x06, 0, 0, 0x00050000 | error)
looked_at = [] if first < 0 else [(0x20, 0, 0, 16), (0x15, 1, 0, first), (0x06, 0, 0, 0x7FFF0000)]
steps = [(0x20, 0, 0, 0), (0x15, 0, len(looked_at) + 1, number), *looked_at, refused]
steps.append((0x06, 0, 0, 0x7FFF0000))
class Filter(ctypes.Structure):
    _fields_ = (("count", ctypes.c_ushort), ("code", ctypes.c_char_p))
code = Filter(len(steps), b"".join(struct.pack("=HBBI", *step) for step in steps))
assert libc.prctl(38, 1, 0, 0, 0) == 0
assert libc.prctl(22, 2, ctypes.byref(code), 0, 0) == 0
os.execv(command[0], command)
"""


@pytest.mark.parametrize(
    ("number", "first", "error", "what"),
    [
        ({"x86_64": 157, "aarch64": 167}, 22, errno.EINVAL, "functions need seccomp"),
        ({"x86_64": 444, "aarch64": 444}, -1, errno.ENOSYS, "functions need Landlock"),
        ({"x86_64": 444, "aarch64": 444}, -1, errno.EOPNOTSUPP, "functions need Landlock"),
    ],
)
def test_a_worker_that_cannot_shut_the_door_does_not_start(
    number: dict[str, int], first: int, error: int, what: str, tmp_path: Path
) -> None:
    """On a kernel without what it takes."""
    lacking = [sys.executable, "-c", LACKING, *map(str, (number[os.uname().machine], first, error))]
    environ = clean_environ(
        CORE4_MONGO_URL="mongodb://127.0.0.1:9",
        CORE4_HOME=str(tmp_path),
        CORE4_FUNCTIONS="true",
        CORE4_FUNCTION_KEYS="ann:" + "k" * 40,
    )
    done = subprocess.run(
        [*lacking, program("core4"), "worker"],
        env=environ,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )

    assert done.returncode == 1, done.stderr
    assert what in done.stderr
    assert "Traceback" not in done.stderr
