"""Layers that pass something on from token to token, over rows with shared prefixes.

How a call travels through the files:

    parts         RowParts: the prefixes and tails of a row, and which prefix a tail continues
    convolution   shared_convolution: a tail starts from the last inputs of its prefix
    scan          shared_scan: a tail starts from the final state of its prefix, part by part
    varlen        shared_varlen_scan: the same in two calls, all prefixes and then all tails
    naive         every sequence in full; tests compare both with it

The convolution and the recurrence are functions that the caller gives, so nothing here knows a
family of models. Names of dimensions, in addition to those of the package:

    C    channels of a convolution
    L    tokens of one sequence, or of a part of it

A row here is a packed row: the one row [1, T] of a micro-batch.
"""

from __future__ import annotations

from dpofast_kernels.recurrent.convolution import Convolve, shared_convolution
from dpofast_kernels.recurrent.naive import naive_sequences
from dpofast_kernels.recurrent.parts import Groups, RowParts
from dpofast_kernels.recurrent.scan import Scan, shared_scan
from dpofast_kernels.recurrent.varlen import VarlenScan, shared_varlen_scan

__all__ = [
    "Convolve",
    "Groups",
    "RowParts",
    "Scan",
    "VarlenScan",
    "naive_sequences",
    "shared_convolution",
    "shared_scan",
    "shared_varlen_scan",
]
