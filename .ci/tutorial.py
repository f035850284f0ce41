"""Runs the commands of a tutorial as they are written: python3 .ci/tutorial.py CLONE DOCUMENT

Every `$ ` line of a console block is run by a shell, in the order of the document, in the clone. A python
block with a caption is written to the file it names. Comments in front of a block say what is expected:

.. tutorial: stays until "TEXT"    the command keeps running in a terminal of its own and prints TEXT
.. tutorial: shows "TEXT"          the block prints TEXT
.. tutorial: exit N                its last command ends with this exit code instead of 0
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn

PATIENCE = 300  # seconds for one command; the first one installs everything
PORT = "CORE4_PORT"  # the only setting that may come from outside: others may have the usual one
ENDED = "\x1eended "  # what the shell prints behind each command, with its exit code


@dataclass
class Block:
    """One block of code and what the comments above it expect."""

    kind: str
    text: str
    file: str = ""
    stays: str = ""
    shows: list[str] = field(default_factory=list)
    code: int = 0

    @property
    def commands(self) -> list[str]:
        return [line[2:] for line in self.text.splitlines() if line.startswith("$ ")]


def blocks(document: str) -> Iterator[Block]:
    """The code blocks of a document with what belongs to them."""
    expected: list[str] = []
    lines = document.splitlines()
    for number, line in enumerate(lines):
        if match := re.match(r"\.\. tutorial: (.+)", line):
            expected.append(match[1])
        if match := re.match(r"\.\. code-block:: (console|python)", line):
            body: list[str] = []
            for each in lines[number + 1 :]:
                if each and not each.startswith("   "):
                    break
                body.append(each)
            block = Block(match[1], textwrap.dedent("\n".join(body)).strip("\n"))
            _caption(block)
            for each in expected:
                _expect(block, each)
            expected = []
            yield block


def _caption(block: Block) -> None:
    if match := re.match(r":caption: (\S+)\n\n", block.text):
        block.file = match[1]
        block.text = block.text[match.end() :] + "\n"


def _expect(block: Block, text: str) -> None:
    verb, _, rest = text.partition(" ")
    if verb == "exit":
        block.code = int(rest)
    elif verb == "shows":
        block.shows.append(rest.strip('"'))
    elif text.startswith("stays until "):
        block.stays = text.removeprefix("stays until ").strip('"')
    else:
        raise SystemExit(f"unknown expectation: {text}")


def fail(reason: str) -> NoReturn:
    """Say at once what is wrong, and end."""
    print(f"FAILED: {reason}", flush=True)
    raise SystemExit(1)


class Terminal:
    """A shell that keeps its folder, variables and path from command to command."""

    def __init__(self, clone: Path, environ: dict[str, str]) -> None:
        self.output = ""
        self.shell = subprocess.Popen(
            ["bash"],
            cwd=clone,
            env=environ,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self.shell.stdout is not None
        for line in self.shell.stdout:
            self.output += line
            if not line.startswith(ENDED):
                print(f"    {line}", end="", flush=True)

    def type(self, command: str) -> None:
        assert self.shell.stdin is not None
        print(f"$ {command}", flush=True)
        self.shell.stdin.write(f"{{ {command}\n}} </dev/null; code=$?; echo; echo '{ENDED}'$code\n")
        self.shell.stdin.flush()

    def wait_for(self, text: str, start: int) -> int:
        """Where `text` first stands in the output behind `start`; it must come before the command ends."""
        deadline = time.monotonic() + PATIENCE
        while True:
            # In this order: what is written last must not be missed.
            ended = self.shell.poll() is not None or ENDED in self.output[start:]
            found = self.output.find(text, start)
            if found >= 0:
                return found
            if ended or time.monotonic() > deadline:
                fail(f"no {text!r} in the output")
            time.sleep(0.05)

    def run(self, command: str) -> tuple[int, str]:
        """Run a command to its end; its exit code and output."""
        start = len(self.output)
        self.type(command)
        return self._ended(start)

    def interrupt(self) -> None:
        """Ctrl-C: the command that stays ends as if nothing had happened."""
        start = len(self.output)
        os.killpg(self.shell.pid, signal.SIGINT)
        code, _ = self._ended(start)
        self.close()
        if code != 0:
            fail(f"exit code {code} after Ctrl-C")

    def close(self) -> None:
        """End the shell."""
        assert self.shell.stdin is not None
        self.shell.stdin.close()
        self.shell.wait(60)

    def _ended(self, start: int) -> tuple[int, str]:
        end = self.wait_for(ENDED, start)
        return int(self.output[end + len(ENDED) :].split("\n")[0]), self.output[start:end]


def main(clone: Path, document: Path) -> None:
    """Run all blocks; the first one that does not do what is expected ends it."""
    with tempfile.TemporaryDirectory() as data:
        environ = {
            name: value for name, value in os.environ.items() if name == PORT or not name.startswith("CORE4_")
        }
        environ |= {"XDG_DATA_HOME": data, "COLUMNS": "120"}
        terminal = Terminal(clone, environ)
        with ExitStack() as staying:
            staying.callback(terminal.close)
            for block in blocks(document.read_text(encoding="utf-8")):
                _run(block, clone, environ, terminal, staying)
    print("every command of the tutorial did what it says")


def _run(block: Block, clone: Path, environ: dict[str, str], terminal: Terminal, staying: ExitStack) -> None:
    if block.kind == "python":
        if block.file:
            (clone / block.file).write_text(block.text, encoding="utf-8")
        return
    if block.stays:
        own = Terminal(clone, environ)
        staying.callback(own.interrupt)
        own.run(". .venv/bin/activate")
        start = len(own.output)
        own.type(block.commands[0])
        own.wait_for(block.stays, start)
        return
    output = ""
    for number, command in enumerate(block.commands, start=1):
        code, printed = terminal.run(command)
        output += printed
        wanted = block.code if number == len(block.commands) else 0
        if code != wanted:
            fail(f"exit code {code} of {command!r}, expected {wanted}")
    for text in block.shows:
        if text not in output:
            fail(f"{text!r} is not in the output of {block.commands}")


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve(), Path(sys.argv[2]))
