"""The option save_on_signal: the signals at which a run saves a checkpoint and ends."""

from __future__ import annotations

import signal
from typing import Any

from dpofast.errors import ConfigError

# Signals that ask a process to end. Others mean something else to PyTorch or to Python, or can't be
# caught at all.
USABLE = ("SIGTERM", "SIGUSR1", "SIGUSR2", "SIGHUP", "SIGINT", "SIGQUIT", "SIGXCPU")
_NONE = ("", "none", "null")


def settle_save_signals(config: Any) -> None:
    """Give a DPOConfig's save_on_signal its usual form, a list of names.

    enable_jit_checkpoint is transformers' option for SIGTERM. It becomes a name in that list, and
    False, since transformers would install a handler of its own: that one waits three seconds, and
    lets the run end as if it were finished.

    Raises:
        ConfigError: save_on_signal names a signal that can't be used.
    """
    names = read_save_signals(config.save_on_signal)
    if config.enable_jit_checkpoint and "SIGTERM" not in names:
        names.append("SIGTERM")
    config.save_on_signal, config.enable_jit_checkpoint = names, False


def read_save_signals(value: Any) -> list[str]:
    """The names of the signals in save_on_signal, each once.

    Args:
        value: a name or a list of names, with or without SIG, in any case; None or "none" for no
            signal.

    Raises:
        ConfigError: a name isn't one of `USABLE`.
    """
    given = value if isinstance(value, list | tuple) else [value]
    names = [] if value is None else [_name(each) for each in given]
    if len(names) == 1 and names[0] in _NONE:
        return []
    for name in names:
        if name not in USABLE:
            exists = name in {each.name for each in signal.Signals}
            reason = "can't be used for this" if exists else "is unknown"
            raise ConfigError(
                f"save_on_signal: the signal {name!r} {reason}; choose among "
                f"{', '.join(USABLE)}, or none."
            )
    return list(dict.fromkeys(names))


def watched_signals(value: Any) -> list[signal.Signals]:
    """The signals that save_on_signal names, and that of Ctrl-C if there is any.

    Raises:
        ConfigError: a name isn't one of `USABLE`.
    """
    names = read_save_signals(value)
    return [signal.Signals[name] for name in dict.fromkeys([*names, "SIGINT"])] if names else []


def _name(value: Any) -> str:
    if isinstance(value, signal.Signals):
        return value.name
    name = str(value).strip().upper()
    if name.lower() in _NONE:
        return name.lower()
    return name if name.startswith("SIG") else f"SIG{name}"
