"""When the worker's gate closes and opens."""

from __future__ import annotations

from core4.worker.gate import CPU_WINDOW, Gate

PLENTY = 2**40


def test_a_mean_over_the_window_closes_and_opens_it() -> None:
    gate = Gate(max_cpu=90, min_free_ram=1024)
    assert not any(gate.judge(100, PLENTY) for _ in range(CPU_WINDOW - 1))
    assert gate.judge(100, PLENTY)
    assert gate.reason == "cpu: 100.0 % of all cores over 20 s, max_cpu is 90"
    assert not gate.judge(50, PLENTY)  # the mean is 97.5 still
    assert [gate.judge(0, PLENTY) for _ in range(3)] == [False, True, False]
    assert gate.reason is None


def test_a_peak_closes_nothing() -> None:
    gate = Gate(max_cpu=90, min_free_ram=1024)
    assert not any(gate.judge(100 if n % 4 else 0, PLENTY) for n in range(5 * CPU_WINDOW))
    assert gate.reason is None


def test_a_hundred_percent_allowed_is_never_exceeded() -> None:
    gate = Gate(max_cpu=100, min_free_ram=1024)
    assert not any(gate.judge(100.0, PLENTY) for _ in range(3 * CPU_WINDOW))


def test_memory_counts_at_once_and_the_first_reason_stays() -> None:
    gate = Gate(max_cpu=99, min_free_ram=32 * 2**20)
    assert not gate.judge(0, 32 * 2**20)
    assert gate.judge(0, 31 * 2**20)
    assert not gate.judge(0, 30 * 2**20)
    assert gate.reason == "memory: 31 MiB available, min_free_ram is 32 MiB"
    assert gate.judge(0, PLENTY)


def test_it_measures_this_machine() -> None:
    gate = Gate(max_cpu=99, min_free_ram=2**60)
    assert gate.look()
    assert gate.reason is not None
    assert gate.reason.startswith("memory: ")
