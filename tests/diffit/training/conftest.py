"""The tiny presets, for all tests here."""

from tests.diffit.training.tiny import tiny_presets  # noqa: F401
