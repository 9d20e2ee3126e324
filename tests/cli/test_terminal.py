"""Printing leaves errors of the terminal to the command line."""

from __future__ import annotations

import io
import sys

import pytest

from dpofast.cli.terminal import print_rich


def test_a_closed_pipe_is_left_to_the_command_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """`main` has an exit code for it; rich would end the process with 1."""

    def closed(text: str) -> int:
        if text:  # the system accepts writes of no bytes
            raise BrokenPipeError
        return 0

    monkeypatch.setattr(sys.stdout, "write", closed)
    with pytest.raises(BrokenPipeError):
        print_rich("a line")


def test_signs_that_the_terminal_does_not_have_become_question_marks(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="ascii"))
    print_rich("█ and a")
    assert written.getvalue() == b"? and a\n"
