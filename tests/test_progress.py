"""Bars are bars on a terminal, and lines that are some seconds apart everywhere else."""

from __future__ import annotations

import io

import pytest
from datasets import enable_progress_bars
from datasets.utils.tqdm import tqdm as datasets_bar
from huggingface_hub.utils import enable_progress_bars as enable_hub_bars
from huggingface_hub.utils import tqdm as hub_bar
from tqdm import tqdm as plain_bar
from transformers import TrainerCallback
from transformers.utils.logging import enable_progress_bar
from transformers.utils.logging import tqdm as transformers_bar

from dpofast import progress
from dpofast.progress import bars_as_lines, progress_bar
from tests.support import make_trainer, token_pairs

BARS = {
    "tqdm": plain_bar,
    "datasets": datasets_bar,
    "transformers": transformers_bar,
    "huggingface_hub": hub_bar,
}


class Terminal(io.StringIO):
    def isatty(self):
        return True


class Clock:
    """Stands still until it is moved."""

    def __init__(self, monkeypatch):
        self.now = 1000.0
        monkeypatch.setattr("tqdm.std.time", lambda: self.now)
        monkeypatch.setattr("time.monotonic", lambda: self.now)


@pytest.fixture
def clock(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    # Other tests switch them off.
    for enable in (enable_progress_bars, enable_progress_bar, enable_hub_bars):
        enable()
    return Clock(monkeypatch)


@pytest.mark.parametrize("library", BARS)
def test_a_bar_in_a_log_writes_a_line_now_and_then(library, clock):
    log = io.StringIO()
    with bars_as_lines():
        bar = BARS[library](total=120, desc="work", file=log)
    for _ in range(120):  # a minute
        clock.now += 0.5
        bar.update()
    bar.close()
    lines = log.getvalue().splitlines()
    assert "\r" not in log.getvalue()
    assert 3 <= len(lines) <= 60 / progress.LINE_SECONDS + 1
    assert lines[-1].startswith("work: 100% 120/120 [01:00<00:00")


def test_refreshes_postfixes_and_written_text_add_no_lines(clock):
    log = io.StringIO()
    with bars_as_lines(), plain_bar(range(50), file=log) as bar:
        for step in bar:
            bar.set_postfix(loss=step)
            bar.set_description(f"step {step}")
            bar.refresh()
            clock.now += 0.1
        bar.write("a line", file=log)
    assert log.getvalue() == "a line\n"


def test_a_short_bar_writes_nothing_and_our_own_its_end(clock):
    log = io.StringIO()
    with bars_as_lines():
        for _ in plain_bar(range(3), file=log):
            pass
        plain_bar(total=3, file=log).close()
    assert log.getvalue() == ""
    with progress_bar(total=2000, desc="tokens", unit=" tokens", unit_scale=True, file=log) as bar:
        clock.now += 2
        bar.update(2000)
    assert log.getvalue() == "tokens: 100% 2.00k/2.00k [00:02<00:00, 1.00k tokens/s]\n"


def test_only_rank_0_writes_lines(clock, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    log = io.StringIO()
    with progress_bar(total=2, file=log) as bar:
        clock.now += 60
        bar.update(2)
    assert log.getvalue() == ""


def test_a_terminal_keeps_its_bars_and_so_do_others_afterwards(clock):
    terminal, log = Terminal(), io.StringIO()
    with bars_as_lines(), plain_bar(total=3, file=terminal) as bar:
        clock.now += 1
        bar.update(3)
    assert terminal.getvalue().count("\r") >= 2
    assert "|" in terminal.getvalue()
    plain_bar(total=3, file=log).close()
    assert log.getvalue().startswith("\r")


def test_a_disabled_bar_stays_silent(clock):
    log = io.StringIO()
    with bars_as_lines(), plain_bar(total=3, file=log, disable=True) as bar:
        clock.now += 60
        bar.update(3)
    assert log.getvalue() == ""


def test_a_bar_in_another_bar_writes_to_the_same_log(clock):
    log = io.StringIO()
    with bars_as_lines(), plain_bar(total=2, file=log, desc="outer") as outer:
        with plain_bar(total=2, file=log, desc="inner", leave=False) as inner:
            clock.now += 60
            inner.update(2)
        outer.update(2)
    assert [line.split(":")[0] for line in log.getvalue().splitlines()] == [
        *("inner", "inner"),
        *("outer", "outer"),
    ]


def test_all_bars_of_a_training_run_become_lines(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(progress, "LINE_SECONDS", 0.0)  # every look at a bar writes a line

    class Slow(TrainerCallback):
        seen = ""

        def on_step_end(self, args, state, control, **kwargs):
            Slow.seen += capsys.readouterr().err

    options = {
        **{"disable_tqdm": False, "save_strategy": "steps", "save_steps": 3},
        **{"eval_strategy": "steps", "eval_steps": 3},
    }
    trainer = make_trainer(
        tmp_path, eval_dataset=token_pairs(4, seed=4), options=options, callbacks=[Slow()]
    )
    trainer.train()
    trainer.evaluate()
    trainer.predict(trainer.train_dataset)
    trainer.save_model()
    log = Slow.seen + capsys.readouterr().err
    assert "\r" not in log
    assert "reference log-probs (train), 20 answers: 100%" in log
    assert "100% 6/6" in log


def test_notebooks_keep_their_bars(monkeypatch):
    monkeypatch.setattr("tqdm.auto.tqdm", type("tqdm_notebook", (plain_bar,), {}))
    log = io.StringIO()
    with bars_as_lines():
        plain_bar(total=3, file=log).close()
    assert log.getvalue().startswith("\r")
