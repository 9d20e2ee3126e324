from __future__ import annotations

import pytest
from torch.distributed import DistNetworkError

from dpofast.errors import CheckpointError, ModelError, RankError
from dpofast.ranks.broken import follows_from_another_rank

GLOO = RuntimeError("[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:553] Connection closed")


def raised_from(error, cause):
    try:
        raise error from cause
    except Exception as caught:
        return caught


def raised_while(error, handled):
    try:
        try:
            raise handled
        except Exception:
            raise error  # noqa: B904
    except Exception as caught:
        return caught


@pytest.mark.parametrize(
    "error",
    [
        GLOO,
        DistNetworkError("Connection reset by peer"),
        RankError("rank 0 can't be reached any more"),
        raised_from(ModelError("can't be loaded: Connection closed"), GLOO),
        raised_while(CheckpointError("can't be written"), DistNetworkError("reset")),
        raised_from(ValueError("x"), raised_from(ModelError("y"), GLOO)),
    ],
    ids=lambda error: type(error).__name__,
)
def test_broken_connections(error):
    assert follows_from_another_rank(error)


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("shapes don't match"),
        ModelError("no such model"),
        ConnectionError("the Hub can't be reached"),
        raised_from(ModelError("can't be loaded"), OSError(2, "No such file")),
        raised_from(ModelError("no such model"), None),
    ],
)
def test_other_errors(error):
    assert not follows_from_another_rank(error)


def test_a_circle_of_causes_ends():
    first, second = ValueError("a"), ValueError("b")
    first.__context__, second.__context__ = second, first
    assert not follows_from_another_rank(first)
