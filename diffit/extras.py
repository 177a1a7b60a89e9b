"""Optional dependencies: imported at first use; where one is missing, what installs it."""

from __future__ import annotations

from importlib import import_module
from types import ModuleType


def import_extra(module: str, extra: str) -> ModuleType:
    """The module, or an ImportError of one line that says how to install it.

    Args:
        module: its name.
        extra: the extra of this package that brings it.
    """
    try:
        return import_module(module)
    except ImportError as error:
        raise ImportError(
            f"{module} is needed here and cannot be imported ({error}): "
            f"pip install 'diffit[{extra}]'"
        ) from error
