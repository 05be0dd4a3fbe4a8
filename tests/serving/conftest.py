"""One server with a scripted engine for each module, checked after each test."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from fake_engine import FakeEngine
from served import Served, serving


@pytest.fixture(scope="module")
def _served() -> Iterator[Served]:
    with serving(FakeEngine(["Hello."])) as served:
        yield served


@pytest.fixture
def served(_served: Served) -> Iterator[Served]:
    """A server; whatever a test does to it, it lives on and loses no slot."""
    _served.engine.say("Hello.")
    yield _served
    _served.check_alive()
