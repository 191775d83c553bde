"""Fixtures of the tests of vectors."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture
def folder(request: pytest.FixtureRequest) -> Path:
    """A pico model of the family that a test's module or parameter names (``indirect``)."""
    return request.getfixturevalue(f"pico_{request.param}")
