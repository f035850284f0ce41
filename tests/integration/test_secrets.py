"""What a job, which runs as the same user, can read of the processes around it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from core4.users import UserStore
from tests.helpers import FAST, Command, free_port, program
from tests.integration.driver import ADMIN

# Becomes the command of its arguments, without what lets root read whatever it likes.
WITHOUT_PRIVILEGES = """
import ctypes, os, sys
CAP_SYS_PTRACE, CAP_SYS_ADMIN, CAP_PERFMON, PR_CAPBSET_DROP = 19, 21, 38, 24
for capability in (CAP_SYS_PTRACE, CAP_SYS_ADMIN, CAP_PERFMON):
    ctypes.CDLL(None).prctl(PR_CAPBSET_DROP, capability, 0, 0, 0)
os.execv(sys.argv[1], sys.argv[1:])
"""
PEEK = """
import sys
for pid in sys.argv[1:]:
    try:
        print("environment", open(f"/proc/{pid}/environ").read())
        open(f"/proc/{pid}/mem", "rb").close()
        print("memory of", open(f"/proc/{pid}/cmdline").read().replace("\\0", " "))
    except OSError as error:
        print(error)
"""


def unprivileged(*command: str) -> list[str]:
    return [sys.executable, "-c", WITHOUT_PRIVILEGES, *command]


def seen_by_a_job(command: Command) -> str:
    """Environments of the command and of all it has started, and whose memory is open, as far as seen."""
    family = [
        command.process.pid,
        *(child.pid for child in psutil.Process(command.process.pid).children(True)),
    ]
    peek = unprivileged(sys.executable, "-c", PEEK, *map(str, family))
    return subprocess.run(peek, check=True, capture_output=True, text=True).stdout


@pytest.mark.parametrize("part", ["up", "api", "worker"])
async def test_the_url_of_the_database_is_out_of_reach(
    users: UserStore, mongo_url: str, database_name: str, tmp_path: Path, part: str
) -> None:
    await users.set_password(ADMIN[0], "not-the-default")
    url = f"{mongo_url}&appName=secret-canary"
    environ = {
        **FAST,
        "CORE4_MONGO_URL": url,
        "CORE4_MONGO_DATABASE": database_name,
        "CORE4_HOME": str(tmp_path),
        "CORE4_PORT": str(free_port()),
    }
    with Command(unprivileged(program("core4"), part), environ) as command:
        command.wait_for("\nready " if part == "up" else "ready")
        seen = seen_by_a_job(command)

    assert "Permission denied" in seen
    assert "secret-canary" not in seen
    readable = [line for line in seen.splitlines() if "memory of" in line]
    assert all("core4.worker.launcher" in line for line in readable)


def test_the_embedded_database_knows_no_setting(tmp_path: Path) -> None:
    environ = {
        **FAST,
        "CORE4_HOME": str(tmp_path),
        "CORE4_PORT": str(free_port()),
        "CORE4_PASSWORD": "secret-canary",
    }
    with Command(unprivileged(program("core4"), "up"), environ) as command:
        command.wait_for("\nready ")
        seen = seen_by_a_job(command)

    assert "core4.worker.launcher" in seen
    assert "secret-canary" not in seen
