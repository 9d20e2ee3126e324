"""NVIDIA machine code as basic blocks, and how many instructions its loops take.

The number that counts is that of the path that a warp usually runs: masks for the end of a row, for
instance, are code that most iterations jump over. So a path is the cheapest one that does a given
thing, such as computing exponentials.
"""

from __future__ import annotations

import heapq
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import triton

CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
_LINE = re.compile(
    r"/\*(?P<address>[0-9a-f]{4,})\*/\s+(?P<predicate>@!?U?P\w+\s+)?(?P<opcode>[A-Z][\w.]*)"
    r"(?P<operands>[^;]*);"
)
_TARGET = re.compile(r"0x([0-9a-f]+)")


class Instruction(NamedTuple):
    """An instruction; `opcode` has its suffixes, as in STG.E.128."""

    address: int
    is_conditional: bool
    opcode: str
    operands: str


@dataclass(frozen=True)
class Block:
    """Instructions that run one after another, and the first addresses of what can follow."""

    opcodes: Counter[str]
    targets: tuple[int, ...]

    def has(self, opcode: str) -> bool:
        return any(name.startswith(opcode) for name in self.opcodes)


@dataclass(frozen=True)
class Code:
    """The machine code of a kernel.

    Attributes:
        instructions: in the order of their addresses.
        registers: registers of a thread.
    """

    instructions: tuple[Instruction, ...]
    registers: int

    @cached_property
    def blocks(self) -> dict[int, Block]:
        """Blocks by their first addresses."""
        return dict(_blocks(self.instructions))

    def count(self, *opcodes: str) -> int:
        """Instructions in the whole code whose names begin with one of `opcodes`."""
        return sum(each.opcode.startswith(opcodes) for each in self.instructions)

    def straight_path(self, *through: str) -> Counter[str]:
        """Opcodes of the cheapest path from start to end that runs each of `through`."""
        start = min(self.blocks)
        ends = {address for address, block in self.blocks.items() if not block.targets}
        return min(
            (path for end in ends if (path := self._path(start, end, through))),
            key=Counter.total,
        )

    def cycles(self, *through: str) -> list[Counter[str]]:
        """Opcodes of the cheapest way round each loop that can run each of `through`."""
        found = []
        for header in sorted({target for target, _ in self._back_edges()}):
            sources = [source for target, source in self._back_edges() if target == header]
            paths = [
                path
                for source in sources
                if (path := self._path(header, source, through, self._loop(header, sources)))
            ]
            if paths:
                found.append(min(paths, key=Counter.total))
        return found

    def _back_edges(self) -> list[tuple[int, int]]:
        return [
            (target, address)
            for address, block in self.blocks.items()
            for target in block.targets
            if target <= address
        ]

    def _loop(self, header: int, sources: list[int]) -> set[int]:
        """Blocks from which a back edge is reached without the header."""
        inside, waiting = {header}, list(sources)
        while waiting:
            address = waiting.pop()
            if address not in inside:
                inside.add(address)
                waiting += [a for a, block in self.blocks.items() if address in block.targets]
        return inside

    def _path(
        self, start: int, end: int, through: tuple[str, ...], inside: set[int] | None = None
    ) -> Counter[str] | None:
        """Opcodes of the cheapest path from block `start` to block `end`, both included."""
        queue: list[tuple[int, int, tuple[str, ...], tuple[int, ...]]] = [(0, start, through, ())]
        seen: set[tuple[int, tuple[str, ...]]] = set()
        while queue:
            cost, address, missing, before = heapq.heappop(queue)
            block, path = self.blocks[address], (*before, address)
            missing = tuple(opcode for opcode in missing if not block.has(opcode))
            cost += block.opcodes.total()
            if (address, missing) in seen:
                continue
            seen.add((address, missing))
            if address == end and not missing:
                return sum((self.blocks[each].opcodes for each in path), Counter())
            for target in block.targets:
                if target != start and (inside is None or target in inside):
                    heapq.heappush(queue, (cost, target, missing, path))
        return None


def disassembled(cubin: bytes) -> Code:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        texts = [
            subprocess.run(
                [CUOBJDUMP, option, file.name], capture_output=True, text=True, check=True
            ).stdout
            for option in ("-sass", "-res-usage")
        ]
    registers = re.search(r"REG:(\d+)", texts[1])
    assert registers is not None
    return Code(tuple(parsed(texts[0])), int(registers[1]))


def parsed(text: str) -> Iterator[Instruction]:
    """The instructions in the output of cuobjdump -sass, without those that fill up the end."""
    for found in _LINE.finditer(text):
        if found["opcode"] != "NOP":
            predicate = (found["predicate"] or "").strip()
            is_conditional = predicate not in ("", "@PT", "@UPT")
            yield Instruction(
                int(found["address"], 16), is_conditional, found["opcode"], found["operands"]
            )


def _blocks(instructions: tuple[Instruction, ...]) -> Iterator[tuple[int, Block]]:
    jumps = {each.address: _jump(each, instructions) for each in instructions}
    following = {each.address: after.address for each, after in pairwise(instructions)}
    leaders = {instructions[0].address}
    for address, (targets, is_end) in jumps.items():
        leaders |= set(targets)
        if (targets or is_end) and address in following:
            leaders.add(following[address])
    start, opcodes = instructions[0].address, Counter[str]()
    for each in instructions:
        opcodes[each.opcode] += 1
        targets, is_end = jumps[each.address]
        after = following.get(each.address)
        if targets or is_end or after in leaders or after is None:
            ways = targets if is_end or after is None else (*targets, after)
            yield start, Block(opcodes, tuple(dict.fromkeys(ways)))
            start, opcodes = after or 0, Counter()


def _jump(each: Instruction, instructions: tuple[Instruction, ...]) -> tuple[tuple[int, ...], bool]:
    """Where an instruction can jump to, and whether nothing but that follows."""
    name = each.opcode.split(".")[0]
    if name == "EXIT":
        return (), not each.is_conditional
    if name == "BSYNC":
        # The threads go on where the last BSSY with this barrier said.
        barrier = each.operands.split()[-1]
        for other in reversed(instructions):
            is_before = other.address < each.address and other.opcode.startswith("BSSY")
            if is_before and other.operands.split(",")[0].strip() == barrier:
                return (_target(other),), not each.is_conditional
        return (), False
    if name == "BRA":
        # A branch can depend on a predicate among its operands, too.
        is_always = not each.is_conditional and "P" not in each.operands.split("0x")[0]
        return (_target(each),), is_always
    return (), False


def _target(each: Instruction) -> int:
    found = _TARGET.findall(each.operands)
    return int(found[-1], 16)
