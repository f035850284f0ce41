"""How a worker without database access shows that it knows the shared secret: HMAC-SHA256, never the secret.

The manager gives a challenge that it can recognise without having kept it. The worker answers with a proof
over the challenge and all that it says of itself, with the hash of a token that it has made: the token
itself is sent only later, and is this worker's alone. The manager's own proof tells the worker that it
does not work for a stranger. A challenge is good once, and for a minute.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import secrets
import time
from collections.abc import Mapping
from typing import Any

CHALLENGE_LIFE = 60.0  # seconds
LEAST = 8  # characters of a shared secret; the document's own has so many


def make_challenge(secret: str) -> str:
    """A new challenge."""
    body = f"{int(time.time() + CHALLENGE_LIFE)}.{secrets.token_hex(16)}"
    return f"{body}.{_keyed(secret, 'challenge', body)}"


def is_fresh(secret: str, challenge: str) -> bool:
    """True for one of ours that has not expired; whether it was used is for the store to say."""
    body, _, mark = challenge.rpartition(".")
    if not same(mark, _keyed(secret, "challenge", body)):
        return False
    return float(body.partition(".")[0]) > time.time()


def worker_proof(secret: str, challenge: str, said: Mapping[str, Any]) -> str:
    """What only a worker that knows the secret can send: it covers all that it says of itself."""
    return _keyed(secret, "worker", challenge, json.dumps(said, sort_keys=True))


def manager_proof(secret: str, challenge: str, said: Mapping[str, Any]) -> str:
    """What only a manager that knows the secret can answer."""
    return _keyed(secret, "manager", challenge, json.dumps(said, sort_keys=True))


def make_token(owner_id: str) -> str:
    """A new token of a worker; whose it is can be read off."""
    return f"{owner_id}.{secrets.token_hex(32)}"


def token_owner(token: str) -> str:
    """The owner that a token names."""
    return token.partition(".")[0]


def fingerprint(token: str) -> str:
    """What is stored of a token."""
    return hashlib.sha256(token.encode("utf-8", "replace")).hexdigest()


def same(one: str, other: str) -> bool:
    """Compared in the same time wherever they differ."""
    return hmac.compare_digest(one.encode("utf-8", "replace"), other.encode("utf-8", "replace"))


def _keyed(secret: str, *parts: str) -> str:
    # The first part says whose word it is: no answer of one side is good as one of the other.
    text = "\n".join(("core4", *parts))
    return hmac.new(secret.encode(), text.encode("utf-8", "replace"), hashlib.sha256).hexdigest()
