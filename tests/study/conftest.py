"""A function that writes a study."""

from pathlib import Path

import pytest
import yaml


@pytest.fixture
def write(home: Path):
    """A function that writes params/case.yaml, from a dictionary or as text."""
    (home / "params").mkdir()

    def to_file(content: dict | str) -> Path:
        path = home / "params/case.yaml"
        path.write_text(content if isinstance(content, str) else yaml.safe_dump(content))
        return path

    return to_file
