"""Attention over packed rows in which what sequences begin with stands once.

Shapes, beside those of the package:

    G    keys, gathered: T and one more for every further copy of a prefix token
    Hq   query heads
    Hkv  key and value heads, a divisor of Hq
    D    size of a query's and a key's head
    Dv   size of a value's head
    n, m queries and keys of one segment
"""

from __future__ import annotations

from dpofast_kernels.attention.dispatch import backend_for, shared_attention
from dpofast_kernels.attention.layout import SharedLayout, build_layout
from dpofast_kernels.attention.naive import attends
from dpofast_kernels.attention.options import AttentionOptions
from dpofast_kernels.attention.probe import WrongBackendError, probe

__all__ = [
    "AttentionOptions",
    "SharedLayout",
    "WrongBackendError",
    "attends",
    "backend_for",
    "build_layout",
    "probe",
    "shared_attention",
]
