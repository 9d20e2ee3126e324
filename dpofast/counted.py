"""Writes numbers with their nouns."""

from __future__ import annotations


def counted(number: int, noun: str) -> str:
    """Write a number with its noun, such as "1 row" or "2,000 rows"."""
    return f"1 {noun}" if number == 1 else f"{number:,} {noun}s"
