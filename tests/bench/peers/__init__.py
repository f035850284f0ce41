"""Other job systems, measured beside the product; each is loaded only in an environment of its own.

The modules here run in that environment and import nothing of the product. Each peer's has ``open_peer``,
which fails if its service is not there, ``enqueue``, ``fill`` with many jobs and ``clear``, which leaves
nothing behind. A job's body is `tests.bench.peers.mark.mark`.
"""

from __future__ import annotations
