"""Runs tests and writes the outcome of each into a JSON file, as soon as it is known.

python -m benchmarks.gpu.device_tests tests/gpu -k "bit_for_bit" --json tests.json
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from benchmarks.gpu.runner import write_whole
from benchmarks.stamps import stamps

# Without --strict-config, which refuses the settings of plugins that aren't installed.
OPTIONS = ("-q", "-p", "no:cacheprovider", "-o", "addopts=--import-mode=importlib")


class Outcomes:
    """A plugin of pytest that writes what became of each test so far."""

    def __init__(self, file: Path) -> None:
        self.file, self.stamps = file, stamps("benchmarks.gpu.device_tests")
        self.tests: dict[str, dict[str, Any]] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Called by pytest after set-up, call and teardown of each test."""
        is_last_word = report.when == "call" or not report.passed
        if not is_last_word:
            return
        found: dict[str, Any] = {"outcome": report.outcome, "seconds": report.duration}
        if report.failed:
            found["reason"] = str(report.longrepr).splitlines()[-1]
        self.tests[report.nodeid] = found
        self.write()

    def write(self) -> None:
        counts = Counter(each["outcome"] for each in self.tests.values())
        content = {"benchmark": "device_tests", "counts": counts, "tests": self.tests}
        write_whole(self.file, {**content, "stamps": self.stamps})


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.device_tests")
    parser.add_argument("--json", type=Path, required=True)
    given, for_pytest = parser.parse_known_args()
    outcomes = Outcomes(given.json)
    outcomes.write()
    sys.exit(pytest.main([*OPTIONS, *for_pytest], plugins=[outcomes]))


if __name__ == "__main__":
    main()
