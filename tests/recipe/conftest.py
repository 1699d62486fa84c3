"""Fixtures of the recipe tests."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.recipes import write_recipe


@pytest.fixture
def minimal_recipe(tmp_path: Path) -> Path:
    """The path of a recipe with the required keys only."""
    return write_recipe(tmp_path)
