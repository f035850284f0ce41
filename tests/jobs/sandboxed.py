"""Functions that try what a shipped function must not do, and what it may; run behind its doors by tests."""

from __future__ import annotations

from typing import Any


def talks_to(path: str, command: list[str]) -> dict[str, str]:
    """Connect to a Unix socket, and have a program do so."""
    import socket
    import subprocess

    told = {}
    try:
        with socket.socket(socket.AF_UNIX) as one:
            one.connect(path)
            told["stream"] = "connected"
    except OSError as error:
        told["stream"] = type(error).__name__
    try:
        # One of a pair of these can be turned to any other.
        one, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
        one.close()
        other.close()
        told["pair"] = "made"
    except OSError as error:
        told["pair"] = type(error).__name__
    told["program"] = str(subprocess.run(command, capture_output=True, check=False).returncode)
    return told


def connects(port: int) -> dict[str, str]:
    """Reach a TCP port by each way there is."""
    import errno
    import socket

    def told(way: Any) -> str:
        try:
            with way() as one:
                one.settimeout(5)
                return str(one.recv(5), "ascii")
        except OSError as error:
            return errno.errorcode.get(error.errno or 0, repr(error))

    def plain() -> socket.socket:
        return socket.create_connection(("127.0.0.1", port), 5)

    def multipath() -> socket.socket:
        one = socket.socket(socket.AF_INET, socket.SOCK_STREAM, 262)
        one.connect(("127.0.0.1", port))
        return one

    def multipath_6() -> socket.socket:
        one = socket.socket(socket.AF_INET6, socket.SOCK_STREAM | socket.SOCK_CLOEXEC, 262)
        one.connect((f"::ffff:{'127.0.0.1'}", port))
        return one

    def early() -> socket.socket:
        one = socket.socket()
        one.sendto(b"x", socket.MSG_FASTOPEN, ("127.0.0.1", port))
        return one

    def early_message() -> socket.socket:
        one = socket.socket()
        one.sendmsg([b"x"], (), socket.MSG_FASTOPEN, ("127.0.0.1", port))
        return one

    def later() -> socket.socket:
        one = socket.socket()
        one.setsockopt(socket.IPPROTO_TCP, 30, 1)  # TCP_FASTOPEN_CONNECT
        one.connect(("127.0.0.1", port))
        one.send(b"x")
        return one

    ways = (plain, multipath, multipath_6, early, early_message, later)
    return {way.__name__: told(way) for way in ways}


def listens() -> dict[str, str]:
    """Be reached by others."""
    import socket

    told = {}
    for name, protocol, port in (("unbound", 0, None), ("bound", 0, 0), ("multipath", 262, 0)):
        try:
            with socket.socket(socket.AF_INET, socket.SOCK_STREAM, protocol) as one:
                if port is not None:
                    one.bind(("127.0.0.1", port))
                one.listen()
                told[name] = "listens"
        except OSError as error:
            told[name] = type(error).__name__
    return told


def calls() -> dict[str, str]:
    """What the kernel says to calls that no function needs; none of them would do harm."""
    import ctypes
    import errno
    import os
    import socket

    libc = ctypes.CDLL(None, use_errno=True)
    room = ctypes.create_string_buffer(256)

    def said(name: Any, *args: Any) -> str:
        ctypes.set_errno(0)
        call = libc.syscall if isinstance(name, int) else getattr(libc, name)
        result = call(*((name,) if isinstance(name, int) else ()), *args)
        return errno.errorcode.get(ctypes.get_errno(), "?") if result == -1 else "done"

    told = {
        "clone3": said(435, None, 0),
        "io_uring_setup": said(425, 0, room),
        "io_uring_enter": said(426, -1, 0, 0, 0, None, 0),
        "io_uring_register": said(427, -1, 0, None, 0),
        "pidfd_getfd": said(438, -1, 0, 0),
        "open_tree": said(428, -1, b"", 0),
        "move_mount": said(429, -1, b"", -1, b"", 0),
        "fsopen": said(430, b"tmpfs", 0),
        "fsconfig": said(431, -1, 0, None, None, 0),
        "fsmount": said(432, -1, 0, 0),
        "fspick": said(433, -1, b"", 0),
        "mount_setattr": said(442, -1, b"", 0, None, 0),
        "setxattrat": said(463, -1, b"", 0, b"", None, 0),
        "removexattrat": said(466, -1, b"", 0, b""),
        "open_tree_attr": said(467, -1, b"", 0, None, 0),
        "file_setattr": said(469, -1, b"", None, 0, 0),
        "unshare user": said("unshare", 0x10000000),
        "unshare files": said("unshare", 0x400),
        "setns": said("setns", -1, 0),
        "ptrace": said("ptrace", 16, 0, 0, 0),
        "process_vm_readv": said("process_vm_readv", os.getpid(), None, 0, None, 0, 0),
        "process_vm_writev": said("process_vm_writev", os.getpid(), None, 0, None, 0, 0),
        "mount": said("mount", b"none", b".", b"tmpfs", 0, None),
        "umount": said("umount2", b".", 0),
        "shmget": said("shmget", 0x51065, 4096, 0o1600),
        "shmat": said("shmat", -1, None, 0),
        "shmctl": said("shmctl", -1, 0, None),
        "msgget": said("msgget", 0x51065, 0o1600),
        "msgsnd": said("msgsnd", -1, room, 1, 0),
        "semget": said("semget", 0x51065, 1, 0o1600),
        "semop": said("semop", -1, None, 0),
        "setpriority of the user": said("setpriority", 2, 0, 0),
        "setpriority of the group": said("setpriority", 1, 0, 0),
    }
    # Their numbers differ between machines; these are those of the two that there are.
    numbered = {
        "x86_64": {"mq_open": 240, "keyctl": 250, "add_key": 248, "request_key": 249, "bpf": 321, "kcmp": 312}
        | {"perf_event_open": 298, "userfaultfd": 323, "kexec_load": 246, "kexec_file_load": 320},
        "aarch64": {
            "mq_open": 180,
            "keyctl": 219,
            "add_key": 217,
            "request_key": 218,
            "bpf": 280,
            "kcmp": 272,
        }
        | {"perf_event_open": 241, "userfaultfd": 282, "kexec_load": 104, "kexec_file_load": 294},
    }[os.uname().machine]
    told |= {name: said(number, *[-1] * 5) for name, number in numbered.items()}
    if os.uname().machine == "x86_64":
        told["x32 getpid"] = said(0x40000000 + 39)
        told["clone into a namespace"] = said(56, 0x10000000, None, None, None, None)
    else:
        told["clone into a namespace"] = said(220, 0x10000000, None, None, None, None)
    for name, flags, mode in (("set-uid", os.O_CREAT | os.O_WRONLY, 0o4755), ("emptied", os.O_TRUNC, 0)):
        try:
            os.close(os.open("." if name == "emptied" else name, flags, mode))
            told[f"open {name}"] = "done"
        except OSError as error:
            told[f"open {name}"] = errno.errorcode[error.errno or 0]
    told["inotify"] = said("inotify_add_watch", libc.inotify_init(), b"/tmp", 0x100)
    families = {"netlink": (16, socket.SOCK_RAW), "packet": (17, socket.SOCK_RAW), "tipc": (30, 5)}
    families |= {"crypto": (38, 5), "vsock": (40, socket.SOCK_STREAM), "xdp": (44, socket.SOCK_RAW)}
    families |= {"raw": (2, socket.SOCK_RAW), "ping": (2, socket.SOCK_DGRAM, 1), "sctp": (2, 1, 132)}  # type: ignore[dict-item]
    families |= {"lite": (10, socket.SOCK_DGRAM, 136), "smc": (43, socket.SOCK_STREAM, 0)}  # type: ignore[dict-item]
    for name, kind in families.items():
        try:
            socket.socket(*kind).close()
            told[f"socket {name}"] = "done"
        except OSError as error:
            told[f"socket {name}"] = errno.errorcode[error.errno or 0]
    for name, option in (("ulp", 31), ("fast open", 23)):
        try:
            with socket.socket() as one:
                one.setsockopt(socket.IPPROTO_TCP, option, b"nobody" if option == 31 else 5)
                told[f"option {name}"] = "done"
        except OSError as error:
            told[f"option {name}"] = errno.errorcode[error.errno or 0]
    return told


def foreign() -> int:
    """What the kernel says to getpid by the door for programs of 32 bits; ends it, if it ends anything."""
    import ctypes
    import mmap

    # push rbx; mov eax, 20; int 0x80; pop rbx; ret
    code = bytes.fromhex("53b814000000cd805bc3")
    page = mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
    page.write(code)
    at = ctypes.addressof(ctypes.c_char.from_buffer(page))
    return int(ctypes.CFUNCTYPE(ctypes.c_int)(at)())


def presses(pid: int) -> dict[str, str]:
    """Change what another process may use; each to what it has already, or to what hardly matters."""
    import ctypes
    import errno
    import os
    import resource

    libc = ctypes.CDLL(None, use_errno=True)

    def ioprio() -> None:
        number = {"x86_64": 251, "aarch64": 30}[os.uname().machine]
        if libc.syscall(number, 1, pid, 2 << 13 | 5) != 0:
            raise OSError(ctypes.get_errno(), "ioprio_set")

    def attributes() -> None:
        number = {"x86_64": 314, "aarch64": 274}[os.uname().machine]
        if libc.syscall(number, pid, ctypes.create_string_buffer(b"\x30", 48), 0) != 0:
            raise OSError(ctypes.get_errno(), "sched_setattr")

    def told(action: Any, *args: Any) -> str:
        try:
            action(*args)
        except OSError as error:
            return errno.errorcode[error.errno or 0]
        return "done"

    return {
        "limits": told(resource.prlimit, pid, resource.RLIMIT_CORE),
        "limit": told(resource.prlimit, pid, resource.RLIMIT_CORE, (0, 0)),
        "priority": told(os.setpriority, os.PRIO_PROCESS, pid, 1),
        "affinity": told(os.sched_setaffinity, pid, {0}),
        "scheduler": told(os.sched_setscheduler, pid, os.SCHED_BATCH, os.sched_param(0)),
        "parameter": told(os.sched_setparam, pid, os.sched_param(0)),
        "attributes": told(attributes),
        "disk": told(ioprio),
    }


def defaces(path: str) -> dict[str, str]:
    """Change what belongs to a file of others, that it cannot open."""
    import errno
    import os
    import subprocess

    def told(action: Any, *args: Any, **more: Any) -> str:
        try:
            action(*args, **more)
        except OSError as error:
            return errno.errorcode[error.errno or 0]
        return "said"

    held = os.open(path, os.O_PATH)
    return {
        "chmod": told(os.chmod, path, 0o666),
        "chmod at": told(
            os.chmod, os.path.basename(path), 0, dir_fd=os.open(os.path.dirname(path), os.O_PATH)
        ),
        "chmod of the folder": told(os.chmod, os.path.dirname(path), 0),
        "chmod of what is open": told(os.fchmod, held, 0o666),
        "chown": told(os.chown, path, os.getuid(), os.getgid()),
        "lchown": told(os.lchown, path, os.getuid(), os.getgid()),
        "utime": told(os.utime, path, (1, 1)),
        "setxattr": told(os.setxattr, path, "user.core4", b"x"),
        "removexattr": told(os.removexattr, path, "user.mine"),
        "program": str(subprocess.run(["chmod", "666", path], check=False, capture_output=True).returncode),
        "touch": str(
            subprocess.run(["touch", "-d", "@1", path], check=False, capture_output=True).returncode
        ),
    }


def works(port: int) -> dict[str, Any]:
    """What functions may do, by the usual means."""
    import asyncio
    import datetime
    import dbm.dumb
    import io
    import os
    import pathlib
    import resource
    import shutil
    import socket
    import sqlite3
    import subprocess
    import sys
    import tarfile
    import tempfile
    import threading
    import zipfile
    import zoneinfo

    told: dict[str, Any] = {}
    here = pathlib.Path.cwd()
    (here / "folder" / "deep").mkdir(parents=True)
    (here / "folder" / "deep" / "file").write_text("text")
    shutil.copy("folder/deep/file", "copy")
    shutil.copy2("folder/deep/file", "copy2")
    shutil.copytree("folder", "tree")
    shutil.move("tree", "moved")
    (here / "moved" / "deep" / "file").touch()
    told["copied"] = [pathlib.Path(each).read_text() for each in ("copy", "copy2", "moved/deep/file")]
    with tempfile.TemporaryDirectory() as folder, tempfile.NamedTemporaryFile(dir=folder) as file:
        file.write(b"x")
        told["temporary"] = os.path.dirname(folder) == str(here)
    told["gone"] = not os.path.exists(folder)
    shutil.make_archive("zipped", "zip", "folder")
    with zipfile.ZipFile("zipped.zip") as archive:
        archive.extractall("unzipped")
    shutil.make_archive("tarred", "gztar", "folder")
    with tarfile.open("tarred.tar.gz") as tar:
        tar.extractall("untarred", filter="data")
    told["packed"] = [(here / each / "deep" / "file").read_text() for each in ("unzipped", "untarred")]
    with dbm.dumb.open("dumb", "c") as pairs:
        pairs["a"] = "b"
    with sqlite3.connect("base") as base:
        base.execute("create table t (a)")
    with open(os.open("script", os.O_CREAT | os.O_WRONLY, 0o700), "w") as script:
        script.write("#!/bin/sh\necho ran\n")
    told["programs"] = [
        subprocess.run(["./script"], capture_output=True, text=True, check=True).stdout,
        subprocess.run("echo $((1+1)) | cat", shell=True, capture_output=True, text=True, check=True).stdout,
        subprocess.run(
            [sys.executable, "-c", "print(3)"],
            capture_output=True,
            text=True,
            check=True,
            preexec_fn=lambda: None,
        ).stdout,
        subprocess.run(["nice", "cp", "-a", "folder", "other"], check=True, capture_output=True).returncode,
        subprocess.run(["tar", "xzf", "tarred.tar.gz"], check=True, capture_output=True).returncode,
    ]
    found: list[int] = []
    threads = [threading.Thread(target=found.append, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    told["threads"] = sorted(found)
    child = os.fork()
    if child == 0:
        os._exit(5)
    told["fork"] = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

    async def program() -> str:
        made = await asyncio.create_subprocess_exec("echo", "loop", stdout=subprocess.PIPE)
        await asyncio.get_running_loop().run_in_executor(None, len, "")
        return (await made.communicate())[0].decode()

    async def fetched() -> str:
        reader, writer = await asyncio.open_connection("localhost", port)
        text = await reader.readexactly(5)
        writer.close()
        return text.decode()

    told["asyncio"] = [asyncio.run(program()), asyncio.run(fetched())]
    with socket.create_connection(("localhost", port), 5) as one:
        one.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        told["tcp"] = str(one.recv(5), "ascii")
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as mine:
        mine.bind(("127.0.0.1", 0))
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM, socket.IPPROTO_UDP) as other:
            other.sendto(b"by udp", mine.getsockname())
        told["udp"] = str(mine.recv(10), "ascii")
    left, right = socket.socketpair()
    left.sendall(b"pair")
    told["pair"] = str(right.recv(10), "ascii")
    told["name"] = socket.getaddrinfo("localhost", 80, socket.AF_INET, socket.SOCK_STREAM)[0][4][0]
    zone = zoneinfo.ZoneInfo("Europe/Berlin")
    told["zone"] = datetime.datetime(2026, 7, 1, tzinfo=zone).utcoffset() == datetime.timedelta(hours=2)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    told["limit"] = resource.getrlimit(resource.RLIMIT_CORE)
    os.sched_setaffinity(0, os.sched_getaffinity(0))
    told["nice"] = os.nice(1) > 0
    told["module"] = len(zipfile.ZipFile(io.BytesIO(pathlib.Path("zipped.zip").read_bytes())).namelist()) > 0
    return told


def digs(depth: int) -> int:
    """Leave a folder so deep that no path reaches its end, and some that nobody may enter."""
    import os

    for number in range(3):
        os.mkdir(f"shut{number}")
        with open(f"shut{number}/file", "w") as file:
            file.write("x")
    os.makedirs("around/inside")
    os.mkdir("closed", 0)
    os.mkdir("around/inside/closed", 0)
    os.symlink("/", "around/root")
    os.symlink("..", "around/inside/up")
    top = os.open(".", os.O_RDONLY)
    for _ in range(depth):
        os.mkdir("d")
        os.chdir("d")
    os.fchdir(top)
    return depth


def empties(path: str) -> dict[str, str]:
    """Cut a file of others, and one of its own."""
    import os

    told = {}
    try:
        os.truncate(path, 0)
        told["theirs"] = "done"
    except OSError as error:
        told["theirs"] = type(error).__name__
    with open("own", "w+") as own:
        own.write("text")
        own.flush()
        own.truncate(2)
    with open("own") as own:
        told["own"] = own.read()
    return told
