from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Iterator
from typing import Any

import psutil
import pytest

from dpofast.data import load_preferences, tokenize_preferences
from dpofast.data.reading.row_error import RowError
from dpofast.data.tokens.boundary import RowTexts
from dpofast.data.tokens.render import TokenizerError, render_row_texts
from dpofast.data.tokens.render_process import RowRenderer, TemplateLimits
from dpofast.errors import DataError
from tests.support import byte_tokenizer

LIMITS = TemplateLimits(seconds=0.25, memory=150_000_000)
PLAIN = "{% for m in messages %}{{ m.role }}:{{ m.content }}\n{% endfor %}"
WITH_FAULT = "{% if 'BAD' in messages[0].content %}FAULT{% endif %}" + PLAIN
LOOPS = {
    "without output": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}"
    "{% endfor %}",
    "one call": "{{ (messages | length + 6) ** (7 ** 9) }}",
    "regular": "{% for i in range(99999) %}{{ ('a' * 9999).split('a') | length }}{% endfor %}",
}
GROWS = {
    "output": "{% for i in range(99999) %}{% for j in range(99999) %}xxxxxxxxxxxxxxxxxxxxxxxxxxx"
    "xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx{{ i }}{% endfor %}"
    "{% endfor %}",
    "one call": "{{ 'a' * 10000000000 }}",
    "format": "{{ '%1000000000d' % 1 }}",
    "doubling": "{% set ns = namespace(s='abcdefgh') %}{% for i in range(64) %}"
    "{% set ns.s = ns.s ~ ns.s %}{% endfor %}",
}

FAST_LOOP, FAST_GROWTH = "without output", "doubling"


def pairs(*contents: str) -> Any:
    def message(role: str, text: str) -> list[dict[str, str]]:
        return [{"role": role, "content": text}]

    return load_preferences(
        [
            {
                "prompt": message("user", content),
                "chosen": message("assistant", "yes"),
                "rejected": message("assistant", "no"),
            }
            for content in contents
        ]
    )


def tokenizer_with(template: str) -> Any:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template
    tokenizer.name_or_path = "some/model"
    return tokenizer


@contextlib.contextmanager
def renderer_of(template: str, limits: TemplateLimits = LIMITS) -> Iterator[RowRenderer]:
    with contextlib.closing(RowRenderer(tokenizer_with(template), limits)) as renderer:
        yield renderer


def fault(rows: Any, template: str, limits: TemplateLimits = LIMITS) -> str:
    """What is said of the second row."""
    with renderer_of(template, limits) as renderer:
        results = renderer.all_texts(list(rows))
    assert len(results) == 2  # the first one is good, and those after the second aren't rendered
    assert isinstance(results[-1], TokenizerError)
    assert "the chat template of 'some/model'" in str(results[-1])
    return str(results[-1])


@pytest.mark.parametrize(
    "loop", [FAST_LOOP, *(pytest.param(x, marks=pytest.mark.slow) for x in LOOPS if x != FAST_LOOP)]
)
def test_a_template_that_loops_is_stopped(loop: str) -> None:
    template = WITH_FAULT.replace("FAULT", LOOPS[loop])
    started = time.monotonic()
    message = fault(pairs("a", "BAD", "c"), template)
    assert "took more than 0.25 s for this pair" in message
    assert time.monotonic() - started < 5.0


@pytest.mark.parametrize(
    "growth",
    [FAST_GROWTH, *(pytest.param(x, marks=pytest.mark.slow) for x in GROWS if x != FAST_GROWTH)],
)
def test_a_template_that_grows_is_stopped(growth: str) -> None:
    template = WITH_FAULT.replace("FAULT", GROWS[growth])
    limits = TemplateLimits(seconds=20.0, memory=150_000_000)
    message = fault(pairs("a", "BAD", "c"), template, limits)
    assert "needs more than 150 MB for this pair" in message


def test_a_template_that_writes_too_much_is_refused() -> None:
    template = WITH_FAULT.replace("FAULT", "{{ 'a' * 2000000 }}")
    message = fault(pairs("a", "BAD", "c"), template)
    assert "writes 2,000," in message
    with renderer_of("{{ 'a' * 999000 }}" + PLAIN) as renderer:
        assert len(renderer.texts(pairs("x")[0]).prompt) > 999_000


def test_the_error_names_the_row_and_the_data() -> None:
    """A macro that calls itself is a fault of a row; a template without an end stops the run."""
    recursive = "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}"
    tokenizer = tokenizer_with(WITH_FAULT.replace("FAULT", recursive))
    with pytest.raises(DataError, match=r"pairs, row 1 .*can't render the messages: .*recursion"):
        tokenize_preferences(pairs("a", "BAD"), tokenizer, max_length=None, name="pairs")
    raising = "{{ raise_exception('roles must alternate') }}"
    tokenizer = tokenizer_with(WITH_FAULT.replace("FAULT", raising))
    with pytest.raises(DataError, match=r"pairs, row 1 .*roles must alternate"):
        tokenize_preferences(pairs("a", "BAD"), tokenizer, max_length=None, name="pairs")
    tokenizer = tokenizer_with(WITH_FAULT.replace("FAULT", "{{ 'a' * 2000000 }}"))
    with pytest.raises(DataError, match=r"pairs, row 1 .*'some/model' writes 2,000,"):
        tokenize_preferences(pairs("a", "BAD"), tokenizer, max_length=None, name="pairs")


@pytest.mark.slow
def test_each_of_several_processes_has_its_limits() -> None:
    tokenizer = tokenizer_with(WITH_FAULT.replace("FAULT", "{{ 'a' * 2000000 }}"))
    rows = pairs(*"abcde", "BAD", "g", "h")
    with pytest.raises(DataError, match=r"pairs, row 5 .*'some/model' writes 2,000,"):
        tokenize_preferences(rows, tokenizer, max_length=None, num_proc=2, name="pairs")


def test_texts_are_those_without_a_process() -> None:
    rows = list(pairs("a", "日本 😀", "BAD", "c" * 1000))
    template = WITH_FAULT.replace("FAULT", "{{ raise_exception('no such row') }}")
    with renderer_of(template) as renderer:
        for _ in range(2):
            found = renderer.all_texts(rows)
            good = [index for index in range(4) if index != 2]
            for index in good:
                assert found[index] == render_row_texts(rows[index], renderer.tokenizer)
            assert isinstance(found[2], RowError)  # a fault of this row; the others are read
            assert "no such row" in str(found[2])
        with pytest.raises(RowError, match="no such row"):
            renderer.texts(rows[2])


def test_works_in_threads_and_leaves_no_process() -> None:
    before = children()
    rows, results = list(pairs("a", "b")), []
    with renderer_of(PLAIN) as renderer:
        thread = threading.Thread(target=lambda: results.extend(renderer.all_texts(rows)))
        thread.start()
        thread.join()
        assert children() - before
    assert len(results) == 2
    assert children() == before


def test_a_killed_process_is_an_error() -> None:
    rows = list(pairs("a"))
    before = children()
    with renderer_of(PLAIN) as renderer:
        renderer.texts(rows[0])
        (child,) = children() - before
        os.kill(child, 9)
        with pytest.raises(TokenizerError, match=r"ended by signal 9, perhaps .* no memory"):
            renderer.texts(rows[0])
        assert renderer.texts(rows[0]).prompt  # a new one was started


def test_long_texts_come_in_several_messages() -> None:
    """The process keeps few of them, so that they don't count as memory of a template."""
    template = WITH_FAULT.replace("FAULT", "{{ 'a' * 2000000 }}") + "{{ 'b' * 999000 }}"
    limits = TemplateLimits(seconds=20.0, memory=60_000_000)
    with renderer_of(template, limits) as renderer:
        found = renderer.all_texts(list(pairs(*"abcdefghijklmnop")))
        assert [text.prompt[5] for text in found] == list("abcdefghijklmnop")
        *good, fault = renderer.all_texts(list(pairs(*"abc", "BAD", "e")))
        assert len(good) == 3
        assert isinstance(fault, TokenizerError)
        assert renderer.texts(pairs("x")[0]).prompt  # nothing unread is left


def test_a_signal_to_the_whole_job_leaves_the_process_alone() -> None:
    """The parent saves a checkpoint then, and may need further rows for its step."""
    rows, before = list(pairs("a")), children()
    with renderer_of(PLAIN) as renderer:
        first = renderer.texts(rows[0])
        (child,) = children() - before
        for number in ("SIGTERM", "SIGINT", "SIGUSR1", "SIGUSR2", "SIGHUP", "SIGQUIT", "SIGXCPU"):
            os.kill(child, signal.Signals[number])
        assert renderer.texts(rows[0]) == first
        assert children() - before == {child}
    assert signal.pthread_sigmask(signal.SIG_BLOCK, ()) == set()


def test_time_in_which_the_process_is_stopped_does_not_count() -> None:
    slow = WITH_FAULT.replace("FAULT", "{% for i in range(9999) %}{% endfor %}" * 20)
    rows, before, found = list(pairs(*["BAD"] * 12)), children(), []
    with renderer_of(slow) as renderer:
        renderer.texts(rows[0])
        (child,) = children() - before
        thread = threading.Thread(target=lambda: found.extend(renderer.all_texts(rows)))
        thread.start()
        time.sleep(0.03)  # it is within a row then
        os.kill(child, signal.SIGSTOP)
        time.sleep(0.4)  # more than the limit
        os.kill(child, signal.SIGCONT)
        thread.join()
    assert [type(text) for text in found] == [RowTexts] * 12


def test_other_errors_of_a_tokenizer_pass() -> None:
    class OddError(Exception):
        def __init__(self, a: int, b: int) -> None:
            super().__init__("odd")

    class Tokenizer:
        chat_template, eos_token, name_or_path = PLAIN, "</s>", ""

        def apply_chat_template(self, messages: Any, **options: Any) -> str:
            raise OddError(1, 2)

    with (
        contextlib.closing(RowRenderer(Tokenizer())) as renderer,
        pytest.raises(RuntimeError, match="OddError: odd"),
    ):
        renderer.texts(pairs("a")[0])


def children() -> set[int]:
    # Not by /proc/self/task/*/children: when a thread ends, its children go to another thread.
    return {child.pid for child in psutil.Process().children()}
