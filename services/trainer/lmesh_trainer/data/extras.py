"""Packages that only some sources need."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from lmesh_trainer.data.errors import DatasetError


def extra(module: str) -> Any:  # noqa: ANN401 - a module that may not be there
    """A module of the extra `data`. Raises DatasetError MISSING_EXTRA."""
    try:
        return import_module(module)
    except ImportError as error:
        raise DatasetError("MISSING_EXTRA", "this needs the package datasets: lmesh-trainer[data]") from error
