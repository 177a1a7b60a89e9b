"""The tiny presets are there for all tests."""

import pytest


@pytest.fixture(autouse=True)
def everywhere(tiny_presets: None) -> None:
    """Nothing to do."""
