"""Fixtures for laws of papers."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from tests.support import laws


@pytest.fixture(params=["loop", "engine"])
def run(request: pytest.FixtureRequest) -> SimpleNamespace:
    """All methods, as the loops of the papers and as the engine: each law is stated once and run on both."""
    return laws.methods(request.param)


@pytest.fixture
def loop() -> SimpleNamespace:
    """All methods as loops, for laws with values that the engine does not let anybody choose."""
    return laws.methods("loop")
