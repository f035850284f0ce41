"""Shut the running process in: what it may reach of this machine, for good, and whatever it starts.

Made of what Linux offers to everybody: Landlock for files, others' memory and signals; seccomp for what
Landlock does not look at; and no privileges.
Loads nothing but the interpreter.
"""

from __future__ import annotations

import ctypes
import os
import struct
import sys
from collections.abc import Iterable
from pathlib import Path

from core4.worker import seccomp
from core4.worker.seccomp import CannotConfine

_CREATE, _ADD, _RESTRICT = 444, 445, 446  # the same numbers on every architecture
_VERSION, _PATH_BENEATH, _PORT = 1, 1, 2
_CONNECT, _TCP = 2, 3  # connect; that and to listen
_SET_NO_NEW_PRIVILEGES, _DROP_BOUND = 38, 24
_CAPABILITY_V3 = 0x20080522

_EXECUTE, _WRITE_FILE, _READ_FILE, _READ_DIR = 1, 2, 4, 8
_READ = _EXECUTE | _READ_FILE | _READ_DIR
_FILES_1, _FILES_2, _FILES_3, _FILES_5 = (1 << 13) - 1, (1 << 14) - 1, (1 << 15) - 1, (1 << 16) - 1
_DEVICES = 1 << 6 | 1 << 11  # make them: for nobody
_ON_FILE = _EXECUTE | _WRITE_FILE | _READ_FILE | 1 << 14 | 1 << 15  # what a rule for a file may grant
_SCOPES = 3  # abstract sockets and signals stay inside

# What programs need to run, to find their libraries and to name hosts. Nothing that holds settings.
_SYSTEM = (
    *("/usr", "/lib", "/lib32", "/lib64", "/bin", "/sbin"),
    *("/etc/ld.so.cache", "/etc/ld.so.conf", "/etc/ld.so.conf.d", "/etc/alternatives"),
    *("/etc/localtime", "/etc/timezone", "/etc/locale.alias", "/etc/mime.types"),
    *("/etc/hosts", "/etc/host.conf", "/etc/resolv.conf", "/etc/nsswitch.conf", "/etc/gai.conf"),
    *("/etc/services", "/etc/protocols", "/etc/passwd", "/etc/group"),
    *("/etc/ssl/certs", "/etc/ssl/openssl.cnf", "/etc/pki/tls/certs", "/etc/ca-certificates"),
    *("/sys/devices/system/cpu",),
)
_DEVICES_USED = ("/dev/null", "/dev/zero", "/dev/full", "/dev/random", "/dev/urandom")


_libc = ctypes.CDLL(None, use_errno=True)


def level() -> int:
    """Which version of Landlock the kernel has; 0 for none."""
    found: int = _libc.syscall(_CREATE, None, 0, _VERSION)
    return max(found, 0)


def require() -> None:
    """Raises: CannotConfine if this machine cannot."""
    if level() < 1:
        raise CannotConfine(
            "functions need Landlock, which keeps them from this worker's files: Linux 5.13 or newer, with "
            "`landlock` in /sys/kernel/security/lsm"
        )
    seccomp.require()


def confine(writable: Iterable[str], ports: Iterable[int] = ()) -> None:
    """From here on only the system's programs, Python and the folders that are `writable` can be reached.

    TCP goes to `ports` only, where the kernel knows that (6.7): a database that asks for no password is out
    of reach.

    The memory, environment and files of processes outside cannot be read, and none of them can be signalled
    where the kernel knows that (6.12). Calls that would pass by all this are refused, see `seccomp`. All that
    holds for whatever this process starts.

    Raises: CannotConfine.
    """
    _require_one_thread()
    version = level()
    require()
    _drop_capabilities()
    handled = _FILES_1 if version < 2 else _FILES_2 if version < 3 else _FILES_3 if version < 5 else _FILES_5
    scopes = _SCOPES if version >= 6 else 0
    network = _TCP if version >= 4 else 0
    attributes = struct.pack("=QQQ", handled, network, scopes)
    size = 24 if version >= 6 else 16 if version >= 4 else 8
    rules = _checked(_libc.syscall(_CREATE, attributes, size, 0), "landlock_create_ruleset")
    try:
        for path in (*_SYSTEM, *_python()):
            _allow(rules, path, _READ & handled)
        for path in _DEVICES_USED:
            _allow(rules, path, (_READ_FILE | _WRITE_FILE) & handled)
        for path in writable:
            _allow(rules, path, handled & ~_DEVICES)
        for port in ports if network else ():
            rule = struct.pack("=QQ", _CONNECT, port)
            _checked(_libc.syscall(_ADD, rules, _PORT, rule, 0), f"landlock_add_rule({port})")
        _checked(_libc.prctl(_SET_NO_NEW_PRIVILEGES, 1, 0, 0, 0), "prctl")
        _checked(_libc.syscall(_RESTRICT, rules, 0), "landlock_restrict_self")
    finally:
        os.close(rules)
    # Last: nothing of the above is to be refused by it. Before 6.2 rules for files do not look at truncate.
    seccomp.restrict(["truncate"] if version < 3 else [])


def _require_one_thread() -> None:
    # A rule is for the thread that makes it and for what that starts.
    if len(os.listdir("/proc/self/task")) > 1:
        raise CannotConfine("this process has threads, which would stay outside")


def _python() -> list[str]:
    """Where this interpreter has its libraries."""
    found = {sys.prefix, sys.base_prefix, sys.exec_prefix, sys.base_exec_prefix}
    packages = {Path(file).parent for name in ("core4",) if (file := sys.modules[name].__file__)}
    return sorted(found | {str(package.resolve()) for package in packages})


def _allow(rules: int, path: str, access: int) -> None:
    try:
        opened = os.open(path, os.O_PATH | os.O_CLOEXEC)
    except OSError:
        return  # not on this machine
    try:
        if not os.path.isdir(path):
            access &= _ON_FILE
        rule = struct.pack("=Qi", access, opened)
        _checked(_libc.syscall(_ADD, rules, _PATH_BENEATH, rule, 0), f"landlock_add_rule({path})")
    finally:
        os.close(opened)


def _drop_capabilities() -> None:
    """A worker that runs as root runs functions without what makes root special."""
    for number in range(64):
        if _libc.prctl(_DROP_BOUND, number, 0, 0, 0) != 0:
            break  # no more of them, or none of ours
    header = struct.pack("=Ii", _CAPABILITY_V3, 0)
    _checked(_libc.capset(header, struct.pack("=6I", *[0] * 6)), "capset")


def _checked(result: int, what: str) -> int:
    if result < 0:
        code = ctypes.get_errno()
        raise CannotConfine(f"{what}: {os.strerror(code)}")
    return result
