"""The first commands of the README, and what they say on a machine that is not ready for them."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

from tests.helpers import ROOT, clean_environ

README = (ROOT / "README.rst").read_text()


def test_readme_starts_with_two_commands() -> None:
    """The first block of commands is exactly the two that set up everything."""
    block = README.split(".. code-block:: console\n\n")[1].split("\n\n")[0]

    assert block.splitlines() == ["   $ make demo", "   $ make test"]


def make(tmp_path: Path, python: str) -> subprocess.CompletedProcess[str]:
    """`make demo` with `python` (a shell script's body) as the only python3 of the machine."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name in ("sh", "make", "rm", "echo"):
        found = shutil.which(name)
        assert found, f"{name} is not installed"
        os.symlink(found, folder / name)
    (folder / "python3").write_text(f"#!/bin/sh\n{python}\n")
    (folder / "python3").chmod(0o755)
    return subprocess.run(
        ["make", "-C", str(ROOT), "demo", f"VENV={tmp_path / 'venv'}"],
        env=clean_environ(PATH=str(folder)),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )


def test_an_old_python_is_named(tmp_path: Path) -> None:
    """With a Python that is too old, the message says which is needed and which was found."""
    done = make(tmp_path, 'case "$1" in --version) echo Python 3.9.2;; *) exit 1;; esac')

    assert done.returncode != 0
    assert "needs Python 3.11 or newer; found: Python 3.9.2" in done.stderr
    assert not (tmp_path / "venv").exists()


def test_a_missing_venv_module_is_named(tmp_path: Path) -> None:
    """With a Python that cannot make environments, the message says what to install."""
    done = make(tmp_path, 'case "$2" in *ensurepip*) exit 1;; *) exit 0;; esac')

    assert done.returncode != 0
    assert "has no venv module" in done.stderr
    assert "python3-venv" in done.stderr
    assert not (tmp_path / "venv").exists()
