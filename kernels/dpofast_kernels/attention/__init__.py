"""Attention over packed rows in which a prefix that several sequences share is stored once.

How a call travels through the files:

    dispatch      shared_attention: checks, dtype, back end
    |-- layout    where the groups, segments and copied keys of a packed row are
    |-- options   AttentionOptions: scale, window, softcap, sinks, back end
    |-- backends  which back end can run where, and the reason if one can't
    |-- chunks    attention in chunks: the row in another order, for every back end but naive
    call          AttentionCall, the arguments of every back end
    segments      "sdpa" and "plain", segment by segment, default on a CPU
    |-- merged    "sdpa" on a CPU: no masks, no copies of keys
    |-- gather    keys and values copied into the order of the segments
    flash         "varlen", "flash3" and "flash_attn", all segments at once, CUDA only
    flex          "flex": PyTorch's FlexAttention with a block mask
    naive         all scores at once; tests and the probe compare every back end with it
    probe         a short comparison with naive, for the start of a run

Names of dimensions, in addition to those of the package:

    G    gathered keys: T plus one for every further copy of a prefix token
    Z    segments
    Hq   query heads
    Hkv  key and value heads; divides Hq
    D    head size of queries and keys
    Dv   head size of values
    n, m queries and keys of one segment

A row here is a packed row: the one row [1, T] of a micro-batch.
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
