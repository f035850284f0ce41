"""The page that a host of inline jobs shares with its worker."""

from __future__ import annotations

import os

from core4 import attempts
from core4.worker.host import _frames, _place
from core4.worker.page import Look, Page


def test_the_other_side_sees_whose_step_it_is() -> None:
    ours = Page.create()
    theirs = Page(os.dup(ours.fd))
    seen = [ours.look()]
    for job in (7, 0):
        theirs.begin(job)
        seen.append(ours.look())
        theirs.end()
        seen.append(ours.look())

    assert seen == [Look(0, 0), Look(1, 7), Look(2, 0), Look(3, 0), Look(4, 0)]
    theirs.close()
    ours.close()


def test_a_traceback_stands_behind_the_page() -> None:
    ours = Page.create()
    theirs = Page(os.dup(ours.fd))
    os.write(theirs.trace_here(), b"where it was \xff")

    assert ours.trace() == "where it was \\xff"
    assert ours.look() == Look(0, 0)
    theirs.close()
    ours.close()


def test_the_users_part_of_a_traceback_is_cut_out() -> None:
    text = (
        "Fatal Python error: Segmentation fault\n\nCurrent thread 0x1 (most recent call first):\n"
        f'  File "{os.__file__}", line 3 in inner\n'
        '  File "/srv/my jobs.py", line 12 in execute\n'
        f'  File "{attempts.__file__}", line 50 in perform_async\n'
        '  File "/usr/lib/python3.11/asyncio/events.py", line 80 in _run\n'
    )

    frames = _frames(text)

    assert frames == [
        '  File "/srv/my jobs.py", line 12, in execute\n',
        f'  File "{os.__file__}", line 3, in inner\n',
    ]
    assert _place(frames) == 'File "/srv/my jobs.py", line 12, in execute'
    assert _place(frames[1:]) == f'File "{os.__file__}", line 3, in inner'
    assert _frames("") == []
