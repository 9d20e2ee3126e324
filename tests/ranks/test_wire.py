from __future__ import annotations

import socket

import pytest

from dpofast.ranks.wire import Wire


@pytest.fixture
def connections():
    with socket.create_server(("127.0.0.1", 0)) as server:
        one = socket.create_connection(server.getsockname())
        other, _ = server.accept()
        with one, other:
            yield one, other


class BreaksWhenSending(socket.socket):
    """A connection of which the system says once, at the next call, that nobody answers."""

    def sendall(self, data, flags=0):
        raise TimeoutError("Connection timed out")


def test_messages_arrive_whole(connections):
    one, other = (Wire(each, 20.0) for each in connections)
    one.send(kind="failed", text="a\nb", detail="é")
    one.send(kind="finished")
    messages = []
    while len(messages) < 2:
        messages += other.read()
    assert messages == [{"kind": "failed", "text": "a\nb", "detail": "é"}, {"kind": "finished"}]


def test_the_end_of_a_process_is_an_end_of_file(connections):
    one, other = connections
    one.close()
    with pytest.raises(EOFError):
        Wire(other, 20.0).read()


def test_silence_that_is_found_while_sending_is_not_taken_for_an_end(connections):
    one, other = connections
    broken = BreaksWhenSending(fileno=other.detach())
    wire = Wire(broken, 20.0)
    wire.send(kind="speaker")
    one.close()  # what `recv` returns after the error was reported
    with pytest.raises(TimeoutError):
        wire.read()
    wire.close()


def test_the_kernel_is_told_how_long_silence_may_last(connections):
    wire = Wire(connections[0], 20.0)
    option = connections[0].getsockopt
    assert option(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1
    for timeout, milliseconds in ((20.0, 20_000), (4.0, 4_000), (0.5, 500)):
        wire.keep_alive(timeout)
        idle = option(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE)
        interval = option(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL)
        assert option(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == milliseconds
        assert idle + interval <= max(timeout, 2.0)
