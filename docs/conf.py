"""Sphinx: `make docs`. Warnings are errors; tables are made from the code that they describe."""

from __future__ import annotations

import sys
from importlib import metadata
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "_ext"))

project = "core4-jobs"
author = "The core4-jobs developers"
project_copyright = author
release = metadata.version("core4-jobs")

extensions = ["sphinx.ext.autodoc", "sphinx.ext.napoleon", "tables"]
exclude_patterns = ["_build", "generated"]
nitpicky = False
autodoc_typehints = "none"
autodoc_member_order = "bysource"
html_theme = "furo"
html_title = f"core4-jobs {release}"
