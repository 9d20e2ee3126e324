"""Measurements of this project and its peers, and the data they run on."""

from __future__ import annotations

from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
