"""The option save_on_signal: which names it takes, and what it makes of them."""

from __future__ import annotations

import signal

import pytest

from dpofast import DPOConfig
from dpofast.cli.run_options import read_options
from dpofast.errors import ConfigError
from dpofast.options.save_signals import read_save_signals, watched_signals


@pytest.mark.parametrize(
    ("given", "names"),
    [
        (["SIGTERM", "SIGUSR1"], ["SIGTERM", "SIGUSR1"]),
        (["term", "Usr2", "SIGTERM"], ["SIGTERM", "SIGUSR2"]),
        ("hup", ["SIGHUP"]),
        ([signal.SIGINT], ["SIGINT"]),
        (None, []),
        ("none", []),
        (["None"], []),
        ([], []),
    ],
)
def test_names_are_taken_with_and_without_sig(given, names):
    assert read_save_signals(given) == names


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("SIGKILL", "the signal 'SIGKILL' can't be used for this; choose among SIGTERM, SIGUSR1"),
        (["TERM", "STOP"], "the signal 'SIGSTOP' can't be used for this"),
        ("CHLD", "the signal 'SIGCHLD' can't be used for this"),
        ("USR3", "the signal 'SIGUSR3' is unknown; choose among"),
        (["TERM", "none"], "the signal 'none' is unknown"),
        ("15", "the signal 'SIG15' is unknown"),
    ],
)
def test_other_names_are_refused(given, expected):
    with pytest.raises(ConfigError, match=expected):
        read_save_signals(given)


def test_ctrl_c_is_watched_wherever_another_signal_is():
    assert watched_signals("USR1") == [signal.SIGUSR1, signal.SIGINT]
    assert watched_signals(["INT"]) == [signal.SIGINT]
    assert watched_signals(None) == []


@pytest.mark.parametrize(
    ("words", "names"),
    [
        ([], ["SIGTERM", "SIGUSR1"]),
        (["--save_on_signal", "TERM", "USR2"], ["SIGTERM", "SIGUSR2"]),
        (["--save_on_signal=HUP"], ["SIGHUP"]),
        (["--save_on_signal", "none"], []),
        (["--save_on_signal", "null"], []),
    ],
)
def test_the_command_line_takes_one_name_or_several(words, names):
    assert read_options(None, ["--use_cpu", "true", *words]).config.save_on_signal == names


def test_a_file_takes_a_list_or_null(tmp_path):
    file = tmp_path / "run.yaml"
    for text, names in (("[TERM, HUP]", ["SIGTERM", "SIGHUP"]), ("null", [])):
        file.write_text(f"use_cpu: true\nsave_on_signal: {text}\n")
        assert read_options(str(file), []).config.save_on_signal == names
    file.write_text("use_cpu: true\nsave_on_signal: [TERM, KILL]\n")
    with pytest.raises(ConfigError, match=r"run\.yaml.*save_on_signal: the signal 'SIGKILL'"):
        read_options(str(file), [])


def test_enable_jit_checkpoint_means_sigterm():
    for given in (None, ["USR1"], ["TERM"]):
        config = DPOConfig(
            output_dir="x", use_cpu=True, save_on_signal=given, enable_jit_checkpoint=True
        )
        assert "SIGTERM" in config.save_on_signal
        assert config.save_on_signal.count("SIGTERM") == 1
        assert config.enable_jit_checkpoint is False  # transformers' own handler would exit with 0
