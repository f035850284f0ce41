"""The tutorial on pipelines does what it says, command by command."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from tests.helpers import ROOT, clean_environ, free_port


def test_the_tutorial_on_pipelines(tmp_path: Path) -> None:
    (tmp_path / ".venv").symlink_to(sys.prefix)
    done = subprocess.run(
        [sys.executable, ROOT / ".ci" / "tutorial.py", tmp_path, ROOT / "docs" / "tutorial_etl.rst"],
        env={**clean_environ(), "CORE4_PORT": str(free_port())},
        check=False,
        capture_output=True,
        text=True,
        timeout=240,
    )

    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("$ core4 ") == 6
