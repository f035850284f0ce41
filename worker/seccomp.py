"""Shut calls of the kernel to the running process, for good, and to whatever it starts.

`worker.confine` keeps a process from files and ports. This is for what Landlock does not look at: a filter
that the kernel asks at each call. It sees the numbers in a call's arguments and nothing that they point to:
a call whose harm depends on a path is refused whole. Loads nothing but the interpreter.
"""

from __future__ import annotations

import ctypes
import errno
import os
import struct
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from core4.errors import Core4Error

_SET_SECCOMP, _FILTER = 22, 2  # of prctl

# The machines that are known: what the kernel calls them, and where their numbers stand in the table below.
_MACHINES = {"x86_64": (0xC000003E, 0), "aarch64": (0xC00000B7, 1)}
_SECOND_SET = 0x40000000  # numbers from here on are x32, a second set of the same calls on x86_64

# Only those that a rule below names.
_NUMBERS: dict[str, tuple[int | None, int | None]] = {
    "add_key": (248, 217),
    "bpf": (321, 280),
    "chmod": (90, None),
    "chown": (92, None),
    "clone": (56, 220),
    "clone3": (435, 435),
    "creat": (85, None),
    "fanotify_init": (300, 262),
    "fanotify_mark": (301, 263),
    "fchmod": (91, 52),
    "fchmodat": (268, 53),
    "fchmodat2": (452, 452),
    "fchown": (93, 55),
    "fchownat": (260, 54),
    "fcntl": (72, 25),
    "file_setattr": (469, 469),
    "fremovexattr": (199, 16),
    "fsconfig": (431, 431),
    "fsetxattr": (190, 7),
    "fsmount": (432, 432),
    "fsopen": (430, 430),
    "fspick": (433, 433),
    "futimesat": (261, None),
    "inotify_add_watch": (254, 27),
    "io_uring_enter": (426, 426),
    "io_uring_register": (427, 427),
    "io_uring_setup": (425, 425),
    "ioctl": (16, 29),
    "ioprio_set": (251, 30),
    "kcmp": (312, 272),
    "kexec_file_load": (320, 294),
    "kexec_load": (246, 104),
    "keyctl": (250, 219),
    "lchown": (94, None),
    "listen": (50, 201),
    "lremovexattr": (198, 15),
    "lsetxattr": (189, 6),
    "mknod": (133, None),
    "mknodat": (259, 33),
    "mount": (165, 40),
    "mount_setattr": (442, 442),
    "move_mount": (429, 429),
    "mq_open": (240, 180),
    "mq_unlink": (241, 181),
    "msgctl": (71, 187),
    "msgget": (68, 186),
    "msgrcv": (70, 188),
    "msgsnd": (69, 189),
    "open": (2, None),
    "open_tree": (428, 428),
    "open_tree_attr": (467, 467),
    "openat": (257, 56),
    "openat2": (437, 437),
    "perf_event_open": (298, 241),
    "pidfd_getfd": (438, 438),
    "pivot_root": (155, 41),
    "prlimit64": (302, 261),
    "process_madvise": (440, 440),
    "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271),
    "ptrace": (101, 117),
    "removexattr": (197, 14),
    "removexattrat": (466, 466),
    "request_key": (249, 218),
    "sched_setaffinity": (203, 122),
    "sched_setattr": (314, 274),
    "sched_setparam": (142, 118),
    "sched_setscheduler": (144, 119),
    "semctl": (66, 191),
    "semget": (64, 190),
    "semop": (65, 193),
    "semtimedop": (220, 192),
    "sendmmsg": (307, 269),
    "sendmsg": (46, 211),
    "sendto": (44, 206),
    "setns": (308, 268),
    "setpriority": (141, 140),
    "setsockopt": (54, 208),
    "setxattr": (188, 5),
    "setxattrat": (463, 463),
    "shmat": (30, 196),
    "shmctl": (31, 195),
    "shmget": (29, 194),
    "socket": (41, 198),
    "socketpair": (53, 199),
    "truncate": (76, 45),
    "umount2": (166, 39),
    "unshare": (272, 97),
    "userfaultfd": (323, 282),
    "utime": (132, None),
    "utimensat": (280, 88),
    "utimes": (235, None),
}

# ---------------------------------------------------------------------- what is refused


@dataclass(frozen=True)
class Is:
    """True of a call if the argument in this place, as far as `mask` goes, is one of `values`."""

    place: int
    values: Sequence[int]
    mask: int = 0xFFFFFFFF


@dataclass(frozen=True)
class Rule:
    """What becomes of these calls: allowed if one of `cases` is all true, answered with `answer` otherwise.

    With `refuse` the other way round.
    """

    calls: str
    cases: Sequence[Sequence[Is]] = ()
    answer: int = errno.EPERM
    refuse: bool = False


_KIND, _STREAM, _DATAGRAM, _PACKETS = 0xF, 1, 2, 5  # of sockets; above the mask are flags
_UNIX, _INTERNET = 1, (2, 10)
_TCP, _UDP = (0, 6), (0, 17)
_FAST_OPEN = 0x20000000
_NAMESPACES = 0x7E020000  # all that clone can make
_SELF = 0
_OWN = ((Is(0, (_SELF,)),),)
_OWN_OF_KIND = ((Is(0, (0,)), Is(1, (_SELF,))),)


def _creates(place: int) -> Is:
    return Is(place, (0x40, 0x400000, 0x400040), 0x400040)  # a file with a name, or one without


def _empties(place: int) -> Is:
    return Is(place, (0x200,), 0x203)  # opened for reading


def _set_id(place: int) -> Is:
    return Is(place, (0o2000, 0o4000, 0o6000), 0o6000)


_RULES = (
    # Unix sockets lead to programs of the same user that do what they are told. TCP by way of another
    # protocol, or with data in its first packet, passes by the rule for ports; so do others that few know.
    Rule(
        "socket",
        [
            [Is(0, _INTERNET), Is(1, (_STREAM,), _KIND), Is(2, _TCP)],
            [Is(0, _INTERNET), Is(1, (_DATAGRAM,), _KIND), Is(2, _UDP)],
        ],
    ),
    # A pair of streams belongs together; one of datagrams can be sent elsewhere.
    Rule("socketpair", [[Is(0, (_UNIX,)), Is(1, (_STREAM, _PACKETS), _KIND)]]),
    Rule("sendto sendmmsg", [[Is(3, (0,), _FAST_OPEN)]]),
    Rule("sendmsg", [[Is(2, (0,), _FAST_OPEN)]]),
    # TCP_FASTOPEN, TCP_FASTOPEN_CONNECT, and TCP_ULP, which makes of it what it was not.
    Rule("setsockopt", [[Is(1, (6,)), Is(2, (23, 30, 31))]], refuse=True),
    # A socket that was bound to no port gets one by this.
    Rule("listen"),
    # What does other calls, unseen.
    Rule("io_uring_setup io_uring_enter io_uring_register"),
    # A privileged user in a world of his own has more of the kernel to try. The flags of clone3 are in
    # memory, and the C library takes clone where it is not there.
    Rule("unshare setns"),
    Rule("clone", [[Is(0, (0,), _NAMESPACES)]]),
    Rule("clone3", answer=errno.ENOSYS),
    Rule("mount umount2 pivot_root fsopen fsconfig fsmount fspick move_mount mount_setattr"),
    Rule("open_tree open_tree_attr"),
    # Other processes of the user, the worker first.
    Rule("prlimit64 sched_setaffinity sched_setattr sched_setparam sched_setscheduler", _OWN),
    Rule("setpriority", _OWN_OF_KIND),
    Rule("ioprio_set", [[Is(0, (1,)), Is(1, (_SELF,))]]),
    Rule("ptrace process_vm_readv process_vm_writev process_madvise pidfd_getfd kcmp"),
    # What outlives the job, and is seen by others.
    Rule("shmget shmat shmctl msgget msgsnd msgrcv msgctl semget semop semtimedop semctl mq_open mq_unlink"),
    Rule("add_key request_key keyctl"),
    # Of all that the user owns, wherever it is. The usual ways to copy and unpack files end with these, and
    # fail if they are told that this failed: they are told that it is done.
    Rule("chmod fchmod fchmodat fchmodat2 utime utimes utimensat futimesat", answer=0),
    Rule("chown fchown lchown fchownat", answer=0),
    # As of a file system that has no attributes.
    Rule("setxattr lsetxattr fsetxattr setxattrat", answer=errno.EOPNOTSUPP),
    Rule("removexattr lremovexattr fremovexattr removexattrat", answer=errno.EOPNOTSUPP),
    # The same by FS_IOC_SETFLAGS, FS_IOC_FSSETXATTR, FS_IOC_ENABLE_VERITY; and a lease, which holds up
    # others.
    Rule("file_setattr"),
    Rule("ioctl", [[Is(1, (0x40086602, 0x401C5820, 0x40806685))]], refuse=True),
    Rule("fcntl", [[Is(1, (1024,))]], refuse=True),
    # A file that whoever runs it runs as this user; and one emptied by who may only read it. As with clone3.
    Rule("open", [[_creates(1), _set_id(2)], [_empties(1)]], refuse=True),
    Rule("openat", [[_creates(2), _set_id(3)], [_empties(2)]], refuse=True),
    Rule("openat2", answer=errno.ENOSYS),
    Rule("creat mknod", [[_set_id(1)]], refuse=True),
    Rule("mknodat", [[_set_id(2)]], refuse=True),
    # What goes on in folders that it may not list.
    Rule("inotify_add_watch fanotify_init fanotify_mark"),
    # Large, seldom needed, and often the way into the kernel.
    Rule("bpf perf_event_open userfaultfd kexec_load kexec_file_load"),
)

# ---------------------------------------------------------------------- as the kernel wants it

# Instructions: load, keep some bits, compare, go on, answer.
_LOAD, _AND, _EQUAL, _AT_LEAST, _GO, _ANSWER = 0x20, 0x54, 0x15, 0x35, 0x05, 0x06
_ALLOW, _REFUSE = 0x7FFF0000, 0x00050000
# Where they are in what the filter is shown; of an argument the half that the kernel takes of all of these.
_NUMBER, _MACHINE, _FIRST_ARGUMENT = 0, 4, 16

_Code = list[tuple[int, int, int, int]]


def _refused(answer: int) -> _Code:
    return [(_ANSWER, 0, 0, _REFUSE | answer)]


_ALLOWED: _Code = [(_ANSWER, 0, 0, _ALLOW)]


def _unless(test: int, value: int, then: _Code) -> _Code:
    """`then` if what is loaded passes the test, else what comes behind."""
    return [(test, 0, len(then), value), *then]


def _case(conditions: Sequence[Is], answer: _Code) -> _Code:
    """`answer` if all are true, else what comes behind."""
    code = answer
    for one in reversed(conditions):
        # Each value that it is goes on to `code`; behind the last one, past it.
        compared = [(_EQUAL, len(one.values) - nr, 0, value) for nr, value in enumerate(one.values)]
        load: _Code = [(_LOAD, 0, 0, _FIRST_ARGUMENT + 8 * one.place), (_AND, 0, 0, one.mask)]
        code = [*load, *compared, (_GO, 0, 0, len(code)), *code]
    return code


def _body(rule: Rule) -> _Code:
    met, otherwise = _ALLOWED, _refused(rule.answer)
    if rule.refuse:
        met, otherwise = otherwise, met
    return [*(step for case in rule.cases for step in _case(case, met)), *otherwise]


def _program(machine: str, more: Sequence[str] = ()) -> _Code:
    """The filter for one kind of machine, which refuses `more` calls, too."""
    name, column = _MACHINES[machine]
    code: _Code = [
        (_LOAD, 0, 0, _MACHINE),
        (_EQUAL, 1, 0, name),
        *_refused(errno.EPERM),
        (_LOAD, 0, 0, _NUMBER),
    ]
    code += _unless(_AT_LEAST, _SECOND_SET, _refused(errno.EPERM))
    for rule in (*_RULES, *map(Rule, more)):
        for call in rule.calls.split():
            number = _NUMBERS[call][column]
            if number is not None:
                code += _unless(_EQUAL, number, _body(rule))
    return [*code, *_ALLOWED]


class _Filter(ctypes.Structure):
    _fields_ = (("count", ctypes.c_ushort), ("code", ctypes.c_char_p))


class CannotConfine(Core4Error):
    """This machine cannot keep a shipped function from what is not its own."""

    code = "cannot_confine"


_libc = ctypes.CDLL(None, use_errno=True)


def require() -> None:
    """Raises: CannotConfine if this machine cannot."""
    machine = os.uname().machine
    if machine not in _MACHINES or sys.maxsize < 1 << 32:
        raise CannotConfine(
            "functions need a filter of the kernel's calls, which is made for 64 bits of "
            f"{' and '.join(_MACHINES)}; this is {machine}"
        )
    # A kernel that can looks for the filter first, and finds that there is none.
    ctypes.set_errno(0)
    if _libc.prctl(_SET_SECCOMP, _FILTER, None, 0, 0) == 0 or ctypes.get_errno() != errno.EFAULT:
        raise CannotConfine(
            "functions need seccomp, which keeps them from calls of the kernel that they do not need: a "
            "kernel with CONFIG_SECCOMP_FILTER, and nothing that forbids its use"
        )


def restrict(more: Sequence[str] = ()) -> None:
    """From here on the calls of `_RULES` are refused, and `more`. No new privileges: that must be set before.

    Raises: CannotConfine.
    """
    require()
    code = _program(os.uname().machine, more)
    packed = b"".join(struct.pack("=HBBI", *step) for step in code)
    given = _Filter(len(code), packed)
    if _libc.prctl(_SET_SECCOMP, _FILTER, ctypes.byref(given), 0, 0) != 0:
        raise CannotConfine(f"seccomp: {os.strerror(ctypes.get_errno())}")
