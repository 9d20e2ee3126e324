"""Counts the instructions of the head's hot loops in sm_90 machine code.

test_hot_loops.py runs this as a process of its own, as test_aot.py does with compile_kernels. It
prints one line of JSON per kernel and variant; see `Figures`.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any

from tests.kernels.compile_kernels import compiled, launched, variants
from tests.kernels.machine_code import Code, disassembled

ARCHITECTURE = "sm_90"
BYTES = {"128": 16, "64": 8, "U16": 2, "U8": 1}


@dataclass(frozen=True)
class Figures:
    """What a warp runs, and what a thread occupies.

    Attributes:
        kernel: name in the launch table.
        variant: name in compile_kernels.
        loop: instructions of the inner loop: of a step of the product, or of a block of a row; or
            of all loops, each once.
        epilogue: instructions of what follows the inner loop, for each tile.
        per_element: instructions of the loop or the epilogue by elements that a thread works on.
        bytes: bytes that an element is read and written with.
        stores: store instructions on the counted paths.
        registers: registers of a thread.
        spills: loads and stores of spilled registers, in the whole code.
        shared: bytes of shared memory.
    """

    kernel: str
    variant: str
    loop: int
    epilogue: int
    per_element: float
    bytes: float
    stores: dict[str, int]
    registers: int
    spills: int
    shared: int


def of_product(code: Code, elements: int) -> dict[str, Any]:
    """A loop over H with matrix instructions, and an epilogue with exponentials."""
    step = min(code.cycles("HGMMA"), key=Counter.total)
    tile = min(code.cycles("HGMMA", "MUFU.EX2"), key=Counter.total)
    epilogue = tile.total() - step.total()
    return {
        "loop": step.total(),
        "epilogue": epilogue,
        "per_element": epilogue / elements,
        "bytes": 0.0,  # the copy engine moves them
        "stores": stores(tile),
    }


def of_rows(code: Code, elements: int) -> dict[str, Any]:
    """A loop over the blocks of a row."""
    block = min(code.cycles("MUFU.EX2"), key=Counter.total)
    return in_one_piece(block, elements) | {"loop": block.total(), "epilogue": 0}


def of_cast(code: Code, elements: int) -> dict[str, Any]:
    """No loop: one whole block a program."""
    block = code.straight_path("LDG", "STG")
    return in_one_piece(block, elements) | {"loop": 0, "epilogue": block.total()}


def of_blocks(code: Code, elements: int) -> dict[str, Any]:
    """A loop over whole blocks, or the masked last one."""
    block = min(code.cycles("LDG", "STG"), key=Counter.total)
    return in_one_piece(block, elements) | {"loop": block.total(), "epilogue": 0}


def of_loops(code: Code, elements: int) -> dict[str, Any]:
    """Every loop once, by its cheapest way round: for kernels that take little time in all."""
    # Code ends with a jump to itself.
    loops = sum((way for way in code.cycles() if way.total() > 1), Counter())
    return in_one_piece(loops, elements) | {"loop": loops.total(), "epilogue": 0}


def in_one_piece(path: Counter[str], elements: int) -> dict[str, Any]:
    moved = sum(
        number * BYTES.get(opcode.split(".")[-1], 4)
        for opcode, number in path.items()
        if opcode.startswith(("LDG", "STG"))
    )
    return {
        "per_element": path.total() / elements,
        "bytes": moved / elements,
        "stores": stores(path),
    }


def stores(path: Counter[str]) -> dict[str, int]:
    return {
        opcode: number
        for opcode, number in sorted(path.items())
        if opcode.startswith(("STG", "UTMASTG"))
    }


# How a kernel's code is counted, and which of its constexprs give the elements of a program.
COUNTERS: dict[str, tuple[Callable[[Code, int], dict[str, Any]], tuple[str, ...]]] = {
    "score_tiles": (of_product, ("BM", "BN")),
    "score_tiles_wide": (of_product, ("BM", "BN")),
    "score_rows": (of_rows, ("BV",)),
    "scale_cast": (of_cast, ("B",)),
    "finish_rows": (of_loops, ("BT",)),
    "target_products": (of_loops, ("BH",)),
    "pair_loss": (of_loops, ("BN",)),
    "rescale": (of_blocks, ("B",)),
}
# Vocabularies that are a multiple of 16 ("even") and any others. The product doesn't care.
COUNTED = (
    ("score_tiles", "bf16:plain:True"),
    ("score_tiles", "bf16:plain:False"),
    ("score_tiles", "bf16:scaled:True"),
    ("score_tiles_wide", "bf16:bias:True"),
    ("score_tiles_wide", "bf16:cap:True"),
    ("score_tiles_wide", "bf16:full:True"),
    ("score_rows", "bf16:even:plain:True"),
    ("score_rows", "bf16:even:plain:False"),
    ("score_rows", "bf16:plain:True"),
    ("score_rows", "fp32:plain:True"),
    ("score_rows", "bf16:even:cap:True"),
    ("scale_cast", "bf16"),
    ("scale_cast", "fp32"),
    ("finish_rows", "bf16:plain:True"),
    ("finish_rows", "bf16:plain:False"),
    ("target_products", "bf16"),
    ("pair_loss", "sigmoid"),
    ("rescale", "bf16"),
)


def figures(job: tuple[str, str]) -> Figures:
    kernel, variant = job
    types, constants = {name: rest for name, *rest in variants(kernel)}[variant]
    binary = compiled(kernel, ARCHITECTURE, types, constants)
    code = disassembled(binary.asm["cubin"])
    (count, names), options = COUNTERS[kernel], launched(kernel, ARCHITECTURE)
    elements = 1
    for name in names:
        elements *= options[name]
    elements //= 32 * options["num_warps"]
    return Figures(
        kernel,
        variant,
        **count(code, elements),
        registers=code.registers,
        spills=code.count("STL", "LDL"),
        shared=binary.metadata.shared,
    )


def main() -> None:
    with ProcessPoolExecutor(max_workers=2) as pool:
        for each in pool.map(figures, COUNTED):
            print(json.dumps(asdict(each)), flush=True)


if __name__ == "__main__":
    main()
