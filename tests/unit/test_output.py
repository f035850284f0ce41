"""From bytes to lines."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from core4.worker.output import GOES_ON, Splitter, readable


def split(*chunks: bytes, limit: int = 64) -> list[str]:
    splitter = Splitter(limit)
    lines = [line for chunk in chunks for line in splitter.feed(chunk)]
    return lines + splitter.end()


def test_lines_are_cut_at_line_feeds_wherever_the_chunks_end() -> None:
    assert split(b"a\nb", b"c\n\n", b"last") == ["a", "bc", "", "last"]
    assert split(b"dos\r\n", b"unix\n") == ["dos", "unix"]


def test_what_is_not_utf8_is_escaped() -> None:
    assert split(b"caf\xc3\xa9 \xff \x00\n") == ["caf\u00e9 \\xff \\x00"]


def test_a_character_may_come_in_two_chunks() -> None:
    assert split(b"\xc3", b"\xa9\n") == ["\u00e9"]


def test_a_long_line_comes_in_marked_pieces() -> None:
    assert split(b"x" * 10 + b"\ny", limit=4) == ["xxxx" + GOES_ON, "xxxx" + GOES_ON, "xx", "y"]


def test_a_piece_does_not_end_inside_of_a_character() -> None:
    assert split("€€€".encode(), limit=4) == ["€" + GOES_ON, "€" + GOES_ON, "€"]


@given(st.binary(max_size=300), st.lists(st.integers(1, 40), max_size=10))
def test_nothing_is_lost(data: bytes, cuts: list[int]) -> None:
    splitter = Splitter(16)
    lines = []
    rest = data
    for cut in cuts:
        lines += splitter.feed(rest[:cut])
        rest = rest[cut:]
    lines += splitter.feed(rest) + splitter.end()

    text = "".join(line.removesuffix(GOES_ON) if line.endswith(GOES_ON) else line + "\n" for line in lines)
    clean = data.replace(b"\r", b"").replace(b"\n", b"")
    if all(byte < 128 for byte in data) and b"\r" not in data:
        assert text.replace("\n", "") == readable(clean)
    assert text.count("\n") <= data.count(b"\n") + 1
