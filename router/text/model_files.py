"""The JSON files beside a model's weights."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from router.errors import StartupError

Json = Mapping[str, object]


def read_object(path: Path) -> Json:
    """A JSON object, empty when there is no such file. Raises `StartupError` for anything else."""
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise StartupError(f"{path} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise StartupError(f"{path} is not a JSON object")
    return value
