"""The HTTP side: `main` runs it, `core4.api.app.create_app` builds it into a program of your own."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from core4.config import Settings


def main(settings: Settings) -> None:
    """Run the API until SIGTERM or SIGINT; see `core4.api.app.main`."""
    from core4.api import app

    app.main(settings)
