"""A connection between two ranks: JSON messages, and the kernel's own heartbeat.

The kernels of the two machines ask each other whether they are there, by TCP's keepalive. No thread
of Python has to run for that. So a rank that computes for minutes without releasing Python's lock,
or that is stopped and continued by a debugger or a scheduler, is not taken for lost. The
connections of a process end with it, whatever ends it, and a machine that is down or cut off stops
answering.
"""

from __future__ import annotations

import json
import math
import socket
from typing import Any

LONGEST_MESSAGE = 1 << 20  # bytes
SEND_SECONDS = 5.0


class Wire:
    """Sends and reads messages, which are dicts.

    Args:
        connection: a connected TCP socket, which belongs to the wire from here on.
        timeout: seconds of silence after which the other side counts as lost.
    """

    def __init__(self, connection: socket.socket, timeout: float) -> None:
        self._connection, self._buffer = connection, b""
        self._silence: OSError | None = None
        connection.settimeout(SEND_SECONDS)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.keep_alive(timeout)

    def fileno(self) -> int:
        """The descriptor, for `selectors`."""
        return self._connection.fileno()

    def keep_alive(self, timeout: float) -> None:
        """Let the kernel break the connection after `timeout` seconds of silence."""
        idle, interval = max(1, int(timeout / 4)), max(1, int(timeout / 8))
        options = {
            "TCP_KEEPIDLE": idle,  # seconds until the first question
            "TCP_KEEPALIVE": idle,  # its name on macOS
            "TCP_KEEPINTVL": interval,  # seconds between questions
            "TCP_KEEPCNT": max(1, math.ceil((timeout - idle) / interval)),
            # Linux: milliseconds, also for messages that the other side hasn't acknowledged
            "TCP_USER_TIMEOUT": int(timeout * 1000),
        }
        self._connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name, value in options.items():
            if hasattr(socket, name):
                self._connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)

    def send(self, **message: Any) -> None:
        """Send a message. A broken connection is no error here: `read` finds it."""
        try:
            self._connection.sendall(json.dumps(message).encode() + b"\n")
        except ConnectionError:
            pass
        except OSError as error:
            self._silence = error  # the system says it only once; `read` would get an end of file

    def read(self) -> list[dict[str, Any]]:
        """The messages that have arrived; called when the socket is readable.

        Raises:
            EOFError: the other side has closed the connection, or its process has ended.
            OSError: the other side is silent.
            ValueError: what came isn't a message.
        """
        try:
            data = self._connection.recv(1 << 16)
        except ConnectionResetError:
            data = b""
        if not data:
            raise self._silence or EOFError
        *lines, self._buffer = (self._buffer + data).split(b"\n")
        if len(self._buffer) > LONGEST_MESSAGE:
            raise ValueError("the message is too long")
        messages = [json.loads(line) for line in lines]
        if not all(isinstance(message, dict) for message in messages):
            raise ValueError("the message isn't a dict")
        return messages

    def close(self) -> None:
        """Close this process's end of the connection."""
        self._connection.close()
