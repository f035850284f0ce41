"""Who may do what: rights as text, compiled once, asked often. Pure.

A right is `cop` (every job and all administration) or `job://PATTERN/x` (execute, includes reading) or
`job://PATTERN/r` (read). PATTERN is a regular expression that must match the whole qual_name. `code` is the
right to ship functions as source, beside that to execute jobs of their names; `cop` does not include it:
whoever comes by an administrator's password shall not thereby run code of his own.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache

from core4.errors import BadRequest

COP, CODE = "cop", "code"
KEY_NAME = r"[A-Za-z0-9._-]{1,50}"  # of a key that signs functions
NAME_LIMIT = 200  # characters of a qual_name that rights are asked about
_PATTERN_LIMIT = 200
_REPEATS = 3  # unbounded repeats in one pattern: each multiplies the worst case by the length of the name
_CHOICES = 64  # ways through one pattern: each `?` doubles them, groups with `|` multiply them

_RIGHT = re.compile(r"job://(?P<pattern>.+)/(?P<mode>[xr])")
# What is left of a pattern without its literals: only this decides how long a match may take.
_LITERALS = re.compile(r"\\.|\[\^?\]?(?:\\.|[^\]\\])*\]", re.DOTALL)


@dataclass(frozen=True)
class Rights:
    """What one user may do. Build it with `Rights.of`, which checks and caches."""

    cop: bool
    executable: tuple[re.Pattern[str], ...]
    readable: tuple[re.Pattern[str], ...]
    code: bool = False  # may ship functions as source

    @classmethod
    def of(cls, rights: Iterable[str]) -> Rights:
        """The rights these texts give.

        Raises: BadRequest naming the right that is not accepted.
        """
        return _compile(tuple(rights))

    def may_execute(self, qual_name: str) -> bool:
        """True if the user may enqueue, kill, restart and remove jobs of this name."""
        return self.cop or _any_match(self.executable, qual_name)

    def may_read(self, qual_name: str) -> bool:
        """True if the user may see jobs of this name."""
        return self.cop or _any_match(self.readable, qual_name)


def check(right: str) -> None:
    """Raises: BadRequest if `right` is not the text of a right."""
    Rights.of((right,))


def _any_match(patterns: tuple[re.Pattern[str], ...], qual_name: str) -> bool:
    if len(qual_name) > NAME_LIMIT:
        return False
    return any(pattern.fullmatch(qual_name) for pattern in patterns)


@lru_cache(maxsize=1024)
def _compile(rights: tuple[str, ...]) -> Rights:
    executable, readable = [], []
    for right in rights:
        if right in (COP, CODE):
            continue
        match = _RIGHT.fullmatch(right)
        if match is None:
            raise BadRequest(
                f"right [{right}] is neither `cop` nor `code` nor `job://PATTERN/x` nor `job://PATTERN/r`"
            )
        pattern = _pattern(right, match["pattern"])
        readable.append(pattern)
        if match["mode"] == "x":
            executable.append(pattern)
    return Rights(COP in rights, tuple(executable), tuple(readable), CODE in rights)


def _choices(skeleton: str) -> int:
    """How many ways through a pattern there are, at most: a match may try them all."""
    optional: int = 2 ** skeleton.replace("(?:", "(").count("?")
    return optional * math.prod(1 + part.count("|") for part in re.split(r"[()]", skeleton))


def _pattern(right: str, text: str) -> re.Pattern[str]:
    """Compile a pattern that matches fast whatever the name: names come from clients."""
    if len(text) > _PATTERN_LIMIT:
        raise BadRequest(f"right [{right[:60]}...]: the pattern is longer than {_PATTERN_LIMIT} characters")
    skeleton = _LITERALS.sub("a", text)
    if "(?" in skeleton.replace("(?:", "") or re.search(r"\\[0-9]", text):
        raise BadRequest(f"right [{right}]: look-around, flags and back references are not accepted")
    if re.search(r"\)[*+{]", skeleton):
        raise BadRequest(f"right [{right}]: a group must not be repeated")
    if len(re.findall(r"[*+]|\{", skeleton)) > _REPEATS:
        raise BadRequest(f"right [{right}]: more than {_REPEATS} repeats")
    if _choices(skeleton) > _CHOICES:
        raise BadRequest(f"right [{right}]: too many `?` and `|`, split it into several rights")
    try:
        return re.compile(text)
    except (re.error, OverflowError, RecursionError) as error:
        raise BadRequest(f"right [{right}]: {error}") from error
