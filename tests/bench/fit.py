"""Least squares in plain Python, for models whose coefficients are costs: none of them is below zero."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

Counts = Mapping[str, float]  # how often each term occurred
TINY = 1e-9  # a pivot that is as small as this: the points do not tell two terms apart


def solve(matrix: Sequence[Sequence[float]], right: Sequence[float]) -> list[float]:
    """The solution of linear equations, by elimination with pivots.

    Raises: ValueError if they have none or many.
    """
    rows = [[*row, value] for row, value in zip(matrix, right, strict=True)]
    size = len(rows)
    for column in range(size):
        pivot = max(range(column, size), key=lambda number: abs(rows[number][column]))
        rows[column], rows[pivot] = rows[pivot], rows[column]
        if abs(rows[column][column]) < TINY:
            raise ValueError("the points do not tell all terms apart")
        for number in range(size):
            if number != column:
                factor = rows[number][column] / rows[column][column]
                rows[number] = [a - factor * b for a, b in zip(rows[number], rows[column], strict=True)]
    return [row[size] / row[number] for number, row in enumerate(rows)]


def fitted(points: Sequence[tuple[Counts, float]], terms: Sequence[str], least: float) -> dict[str, float]:
    """The cost of each term, from points with what was counted and what was measured there.

    An error counts in relation to what was measured, but to no less than `least`: else the smallest points
    would decide. A term that would be below zero is left out, as 0, and the others are fitted again.
    """
    left = list(terms)
    while left:
        costs = _fitted(points, left, least)
        lowest = min(costs, key=lambda term: costs[term])
        if costs[lowest] >= 0:
            break
        left.remove(lowest)
    else:
        costs = {}
    return {term: costs.get(term, 0.0) for term in terms}


def _fitted(points: Sequence[tuple[Counts, float]], terms: Sequence[str], least: float) -> dict[str, float]:
    # Columns of the same size: what is counted in seconds and what in documents differ by a million.
    scale = {term: max(abs(counts[term]) for counts, _ in points) or 1.0 for term in terms}
    rows = []
    for counts, measured in points:
        weight = 1 / max(measured, least)
        rows.append(([counts[term] / scale[term] * weight for term in terms], measured * weight))
    square = [[sum(row[a] * row[b] for row, _ in rows) for b in range(len(terms))] for a in range(len(terms))]
    right = [sum(row[a] * value for row, value in rows) for a in range(len(terms))]
    found = solve(square, right)
    return {term: value / scale[term] for term, value in zip(terms, found, strict=True)}


def predicted(costs: Mapping[str, float], counts: Counts) -> float:
    """What the model says for a point."""
    return sum(cost * counts[term] for term, cost in costs.items())
