"""`python -m core4`: the command line, after a look at the interpreter."""

from __future__ import annotations

import sys

# Before any import that an older interpreter cannot read.
if sys.version_info < (3, 11):  # noqa: UP036 - nothing has checked it yet when run from a clone
    sys.exit(
        "core4 needs Python 3.11 or newer; this is {}.{} ({})".format(*sys.version_info[:2], sys.executable)
    )

from core4.cli import main

if __name__ == "__main__":
    sys.exit(main())
