"""Writes the README's figures, from the results that are committed under benchmarks/results/.

python -m benchmarks.report           # after a result was added or measured again
python -m benchmarks.report --check   # exit code 1 if the README says anything else
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import REPOSITORY

RESULTS = REPOSITORY / "benchmarks" / "results"
README = REPOSITORY / "README.md"
BEGIN = "<!-- figures: written by `python -m benchmarks.report`, from benchmarks/results/ -->"
END = "<!-- end of figures -->"
# Contenders in the README, in this order. The README leaves out other layouts of ours and the bare
# products.
RIVALS = {
    "ungrouped": "dpofast without groups: each pair for itself",
    "naive": "plain PyTorch",
    "compile": "the same under torch.compile",
    "trl": "TRL",
    "trl_compact": "TRL, its head made to score only the answers, as on a GPU",
    "trl_plain": "TRL, reference on every step",
    "liger_dpo": "Liger's DPO loss",
    "liger_flce": "Liger's fused linear cross-entropy",
    "cce_exact": "Cut Cross-Entropy, exact",
    "cce_filtered": "Cut Cross-Entropy, filtered",
}
# Results without contenders, which have no line in the README.
WITHOUT_CONTENDERS = ("gpu", "ceilings", "device_tests", "step_profile", "model")
TITLES = {
    "head": "head and loss, forward and backward",
    "train": "whole training steps, TRL with precomputed reference log-probs",
    "reference": "reference log-probs of a dataset",
}


class ResultError(ValueError):
    """A result file that can't be reported."""


@dataclass(frozen=True)
class Figures:
    """The figures of one result file.

    Attributes:
        machine: hardware and versions, in words.
        title: the benchmark and what it ran.
        rows: (rival, its time over ours, our memory over its memory); None if unknown.
        source: the command, with the commit and the date of the run.
    """

    machine: str
    title: str
    rows: tuple[tuple[str, float | None, float | None], ...]
    source: str


def read_figures(path: Path) -> Figures | None:
    """Read a file that a benchmark wrote with --json; None if the README leaves it out.

    Raises:
        ResultError: the file isn't a benchmark's result, or comes from a dry run or a checkout with
            uncommitted changes.
    """
    name = path.name
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
        return None if result["benchmark"] in WITHOUT_CONTENDERS else _figures(result, name)
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        if isinstance(error, ResultError):
            raise
        raise ResultError(
            f"{path} can't be read as a benchmark's result ({error!r}): write it with "
            "`python -m benchmarks.NAME --json FILE`."
        ) from error


def block(figures: list[Figures]) -> str:
    """The text of the README from one marker to the other."""
    lines = [BEGIN, ""]
    for machine in sorted({each.machine for each in figures}):
        lines += [f"On {machine}:", ""]
        lines += ["| dpofast against | times as fast | of its memory |", "|---|---|---|"]
        sources = []
        for each in figures:
            if each.machine == machine:
                lines += [f"| **{each.title}** | | |"]
                lines += [
                    f"| {rival} | {_number(speed)} | {_number(memory)} |"
                    for rival, speed, memory in each.rows
                ]
                sources.append(each.source)
        lines += ["", f"({'; '.join(sources)})", ""]
    if not figures:
        lines += ["Nothing has been measured yet.", ""]
    return "\n".join([*lines, END])


def with_block(text: str, new: str) -> str:
    """Replace the block between the markers of a README.

    Raises:
        ResultError: the text has no markers.
    """
    begin, end = text.find(BEGIN), text.find(END)
    if begin < 0 or end < begin:
        raise ResultError(f"The README lacks the lines {BEGIN!r} and {END!r}: add them.")
    return text[:begin] + new + text[end + len(END) :]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; 1 if out of step")
    parser.add_argument("--results", type=Path, default=RESULTS, help="default: %(default)s")
    parser.add_argument("--readme", type=Path, default=README, help="default: %(default)s")
    given = parser.parse_args(arguments)
    try:
        found = [read_figures(path) for path in sorted(given.results.rglob("*.json"))]
        figures = [each for each in found if each is not None]
        old = given.readme.read_text(encoding="utf-8")
        new = with_block(old, block(figures))
    except (ResultError, OSError) as error:
        print(error, file=sys.stderr)
        return 2
    if given.check:
        if old != new:
            print(
                f"{given.readme} is out of step with {given.results}: run "
                "`python -m benchmarks.report`.",
                file=sys.stderr,
            )
        return int(old != new)
    given.readme.write_text(new, encoding="utf-8")
    return 0


def _figures(result: dict[str, Any], name: str) -> Figures:
    stamps, git = result["stamps"], result["stamps"]["git"]
    if result["dry_run"]:
        raise ResultError(f"{name} is of a dry run, whose figures say nothing: measure without.")
    if git["commit"] is None or git["dirty"] is not False:
        raise ResultError(
            f"{name} was measured in a checkout with changes, or in none: commit them, and measure "
            "again."
        )
    benchmark = result["benchmark"]
    title = f"{TITLES.get(benchmark, benchmark)}: {'; '.join(_what_ran(result))}"
    command = stamps["command"].partition(" --json")[0]
    source = f"`{command}` at {git['commit'][:7]}, {stamps['date'][:10]}"
    return Figures(_machine(result), title, tuple(_rows(result["ratios"])), source)


def _rows(ratios: dict[str, float | None]) -> Iterator[tuple[str, float | None, float | None]]:
    for name, words in RIVALS.items():
        time, speed = ratios.get(f"{name}_time"), ratios.get(f"{name}_speed")
        # Benchmarks of kernels give ratios of times, races give ratios of speeds.
        speed = 1 / time if time else speed
        memory = ratios.get(f"{name}_memory")
        if speed or memory:
            yield words, speed, memory


def _what_ran(result: dict[str, Any]) -> list[str]:
    if "cases" in result:
        return [case["name"] for case in result["cases"]]
    case = result["case"]
    family, shape = case["model"]
    layers = case["layers"] or shape["num_hidden_layers"]
    model = f"{family} of {layers} layers x {shape['hidden_size']}, {case['dtype']}"
    answers = case.get("answers", 2)  # older results do not say
    pairs = f", {answers} answers to a prompt and all their pairs" if answers > 2 else ""
    return [f"{model}, on {case['data']}{pairs}"]


def _machine(result: dict[str, Any]) -> str:
    hardware, versions = result["stamps"]["hardware"], result["stamps"]["versions"]
    names = ", ".join(hardware["devices"])
    if result["device"] == "cpu":
        names = f"{hardware['threads']} cores of {hardware['cpu']}"
    return f"{names} (PyTorch {versions['torch']}, TRL {versions['trl']})"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


if __name__ == "__main__":
    sys.exit(main())
