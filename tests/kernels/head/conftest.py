"""Which tests of the head are slow ones."""

from __future__ import annotations

import pytest


@pytest.hookimpl(tryfirst=True)  # before pytest leaves out what the command line doesn't want
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The interpreter is slow. So of the two back ends that it runs, one is left to the slow tests.

    That is `triton`. What it has in common with `triton_fused` is tested at every change.
    """
    for item in items:
        call = getattr(item, "callspec", None)
        if "kernels/head/" in item.nodeid and call and "triton" in call.params.values():
            item.add_marker(pytest.mark.slow)
