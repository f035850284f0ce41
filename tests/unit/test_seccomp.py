"""The filter of calls as the kernel would read it, for each machine; on this one the kernel itself is asked
in tests/integration/test_sandbox.py."""

from __future__ import annotations

import errno
import struct
from collections.abc import Sequence

import pytest

from core4.worker import seccomp

ALLOW, REFUSE = 0x7FFF0000, 0x00050000
EPERM, ENOSYS, DONE = (REFUSE | each for each in (errno.EPERM, errno.ENOSYS, 0))
MACHINES = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}


def verdict(code: seccomp._Code, machine: int, number: int, args: Sequence[int] = ()) -> int:
    """What the program answers to a call. Fails if it leaves its end, or what it is shown."""
    shown = struct.pack("<iIQ6Q", number, machine, 0, *[*args, 0, 0, 0, 0, 0, 0][:6])
    at = value = 0
    while True:
        what, yes, no, given = code[at]
        at += 1
        match what:
            case 0x20:
                (value,) = struct.unpack_from("<I", shown, given)
            case 0x54:
                value &= given
            case 0x15:
                at += yes if value == given else no
            case 0x35:
                at += yes if value >= given else no
            case 0x05:
                at += given
            case 0x06:
                return given


HIGH = 1 << 32  # the kernel does not look at it either


@pytest.mark.parametrize(
    ("call", "args", "answer"),
    [
        ("socket", (2, 1, 0), ALLOW),
        ("socket", (2, 1 | 0x80000 | 0x800, 6), ALLOW),
        ("socket", (10, 1, 6), ALLOW),
        ("socket", (10, 2, 17), ALLOW),
        ("socket", (2, 2 | 0x80000, 0), ALLOW),
        ("socket", (1, 1, 0), EPERM),
        ("socket", (1 + HIGH, 1, 0), EPERM),
        ("socket", (2, 1, 262), EPERM),
        ("socket", (2, 2, 6), EPERM),
        ("socket", (2, 1, 17), EPERM),
        ("socket", (2, 3, 6), EPERM),
        ("socket", (16, 3, 0), EPERM),
        ("socketpair", (1, 1 | 0x80000, 0), ALLOW),
        ("socketpair", (1, 5, 0), ALLOW),
        ("socketpair", (1, 2, 0), EPERM),
        ("sendto", (3, 0, 0, 0x4000), ALLOW),
        ("sendto", (3, 0, 0, 0x20004000), EPERM),
        ("sendmmsg", (3, 0, 0, 0x20000000), EPERM),
        ("sendmsg", (3, 0, 0x20000000), EPERM),
        ("sendmsg", (3, 0, 0, 0x20000000), ALLOW),
        ("setsockopt", (3, 6, 1), ALLOW),
        ("setsockopt", (3, 1, 30), ALLOW),
        ("setsockopt", (3, 6, 30), EPERM),
        ("clone", (0x3D0F00,), ALLOW),
        ("clone", (0x10000011,), EPERM),
        ("clone", (0x00020011,), EPERM),
        ("clone3", (), ENOSYS),
        ("prlimit64", (0, 7), ALLOW),
        ("prlimit64", (0x100000000, 7), ALLOW),
        ("prlimit64", (1, 7), EPERM),
        ("setpriority", (0, 0, 5), ALLOW),
        ("setpriority", (0, 1, 5), EPERM),
        ("setpriority", (1, 0, 5), EPERM),
        ("ioprio_set", (1, 0), ALLOW),
        ("ioprio_set", (2, 0), EPERM),
        ("fchmodat", (3, 0, 0), DONE),
        ("openat", (3, 0, 0x241, 0o644), ALLOW),
        ("openat", (3, 0, 0x241, 0o4755), EPERM),
        ("openat", (3, 0, 0x410002, 0o2700), EPERM),
        ("openat", (3, 0, 0x80000, 0o7777), ALLOW),
        ("openat", (3, 0, 0x200), EPERM),
        ("openat", (3, 0, 0x202), ALLOW),
        ("openat2", (), ENOSYS),
        ("mknodat", (3, 0, 0o10644), ALLOW),
        ("mknodat", (3, 0, 0o104644), EPERM),
        ("ioctl", (3, 0x5401), ALLOW),
        ("ioctl", (3, 0x40086602), EPERM),
        ("fcntl", (3, 1024), EPERM),
        ("fcntl", (3, 2), ALLOW),
        ("io_uring_setup", (), EPERM),
    ],
)
@pytest.mark.parametrize("machine", MACHINES)
def test_the_answer_to_a_call(machine: str, call: str, args: Sequence[int], answer: int) -> None:
    number = seccomp._NUMBERS[call][seccomp._MACHINES[machine][1]]
    assert number is not None
    assert verdict(seccomp._program(machine), MACHINES[machine], number, args) == answer


@pytest.mark.parametrize("machine", MACHINES)
def test_all_other_calls_are_allowed(machine: str) -> None:
    known = {numbers[seccomp._MACHINES[machine][1]] for numbers in seccomp._NUMBERS.values()}
    code = seccomp._program(machine, ["truncate"])
    answers = {number: verdict(code, MACHINES[machine], number) for number in range(600)}

    assert {answers[number] for number in answers.keys() - known} == {ALLOW}
    assert len(code) < 4096
    assert max(max(yes, no) for _, yes, no, _ in code) < 256


@pytest.mark.parametrize("machine", MACHINES)
def test_calls_of_other_kinds_are_refused(machine: str) -> None:
    code = seccomp._program(machine)
    (other,) = MACHINES.keys() - {machine}

    assert verdict(code, 0x40000003, 20) == EPERM
    assert verdict(code, MACHINES[other], 0) == EPERM
    assert verdict(code, MACHINES[machine], 0x40000000) == EPERM
    assert verdict(code, MACHINES[machine], -1) == EPERM
    assert verdict(code, MACHINES[machine], 0) == ALLOW


def test_every_number_is_for_a_rule() -> None:
    named = [call for rule in seccomp._RULES for call in rule.calls.split()]

    assert len(set(named)) == len(named)
    assert seccomp._NUMBERS.keys() - set(named) == {"truncate"}
    for column in (0, 1):
        numbers = [each[column] for each in seccomp._NUMBERS.values() if each[column] is not None]
        assert len(set(numbers)) == len(numbers)
