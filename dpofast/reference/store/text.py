"""Writes sizes for people."""

from __future__ import annotations


def human_bytes(count: int) -> str:
    """Write a number of bytes with a decimal unit, such as "1.8 kB"."""
    size, units = float(count), ["B", "kB", "MB", "GB", "TB"]
    while size >= 1000 and len(units) > 1:
        size, units = size / 1000, units[1:]
    return f"{size:.1f} {units[0]}" if units[0] != "B" else f"{count} B"
