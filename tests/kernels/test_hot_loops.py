"""No hot loop of the head gets longer: instructions, registers and store widths in sm_90 code."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import pytest

from tests.kernels.hot_loops import COUNTED

ROOT = Path(__file__).resolve().parents[2]


class Ceiling(NamedTuple):
    """The most of each figure (see `Figures`) with Triton 3.6 and 3.7.

    `before` is the instructions of an element that the kernel replaced: those of two passes over
    the logits, of an epilogue that masked every tile, or of PyTorch's kernel for mixed dtypes.
    """

    loop: int
    epilogue: int
    registers: int
    shared: int
    before: float | None


# The bounds that the kernels were made for: B is the product with its epilogue, A the work on rows.
MAX_EPILOGUE, MAX_REGISTERS = 900, 200
MAX_ROW_WORK, MAX_CAST = 10.0, 6.0
CEILINGS = {
    ("score_tiles", "bf16:plain:True"): Ceiling(97, 716, 165, 213_528, 16.6),
    ("score_tiles", "bf16:plain:False"): Ceiling(98, 617, 156, 147_992, 16.6),
    ("score_tiles", "bf16:scaled:True"): Ceiling(97, 716, 165, 213_528, 16.6),
    ("score_tiles_wide", "bf16:bias:True"): Ceiling(111, 801, 215, 164_384, None),
    ("score_tiles_wide", "bf16:cap:True"): Ceiling(111, 1167, 200, 164_384, None),
    ("score_tiles_wide", "bf16:full:True"): Ceiling(111, 1528, 255, 164_384, None),
    ("score_rows", "bf16:even:plain:True"): Ceiling(79, 0, 64, 32, 30.2),
    ("score_rows", "bf16:even:plain:False"): Ceiling(81, 0, 56, 32, 16.8),
    ("score_rows", "bf16:plain:True"): Ceiling(87, 0, 80, 32, 30.2),
    ("score_rows", "fp32:plain:True"): Ceiling(84, 0, 90, 32, 30.2),
    ("score_rows", "bf16:even:cap:True"): Ceiling(254, 0, 79, 32, 64.8),
    ("scale_cast", "bf16"): Ceiling(0, 58, 62, 0, 87.0),
    ("scale_cast", "fp32"): Ceiling(0, 51, 48, 0, 87.0),
    ("finish_rows", "bf16:plain:True"): Ceiling(550, 0, 50, 256, None),
    ("finish_rows", "bf16:plain:False"): Ceiling(530, 0, 48, 256, None),
    ("target_products", "bf16"): Ceiling(50, 0, 32, 16, None),
    ("pair_loss", "sigmoid"): Ceiling(155, 0, 64, 32, None),
    ("rescale", "bf16"): Ceiling(70, 0, 76, 0, 13.8),
}


@pytest.fixture(scope="module")
def counted(lines_of_compiler) -> dict[tuple[str, str], dict[str, Any]]:
    """The figures of each kernel and variant."""
    lines = lines_of_compiler("tests.kernels.hot_loops")
    for line in lines:
        before = CEILINGS[line["kernel"], line["variant"]].before
        print("instructions of an element before:", before, "now:", line)
    return {(line["kernel"], line["variant"]): line for line in lines}


@pytest.mark.aot
@pytest.mark.slow
@pytest.mark.timeout(960)
def test_hot_loops(counted):
    assert counted.keys() == CEILINGS.keys() == set(COUNTED)
    for job, line in counted.items():
        ceiling = CEILINGS[job]
        assert line["spills"] == 0, line
        for name in ("loop", "epilogue", "registers", "shared"):
            assert line[name] <= getattr(ceiling, name), (name, line)
    for kernel, variant in (job for job in COUNTED if job[0] == "score_tiles"):
        line = counted[kernel, variant]
        assert line["epilogue"] <= MAX_EPILOGUE, line
        assert line["registers"] <= MAX_REGISTERS, line
    for variant in ("bf16:even:plain:True", "bf16:plain:True"):
        line = counted["score_rows", variant]
        assert line["per_element"] <= MAX_ROW_WORK, line
        assert line["bytes"] <= 6.0, line
    assert counted["scale_cast", "bf16"]["per_element"] <= MAX_CAST


@pytest.mark.aot
@pytest.mark.slow
@pytest.mark.timeout(960)
def test_gradients_are_stored_in_wide_words_whatever_the_vocabulary(counted):
    """By the copy engine, or 16 bytes at a time. A tile's sums are one number for each row."""
    for (kernel, variant), line in counted.items():
        if kernel.startswith("score_tiles"):
            gradients = {"UTMASTG.2D": 1} if variant.endswith("True") else {}
            assert line["stores"] == {"STG.E": 1, **gradients}, line
        else:
            # A label's own gradient is one number.
            label = {"STG.E.U16"} if kernel == "finish_rows" else set()
            assert set(line["stores"]) <= {"STG.E.128"} | label, line
