"""Faults on purpose, and the judge of what they did."""

from __future__ import annotations
