"""How a value of a payload looks in a sentence about it."""

from __future__ import annotations

import json
from typing import Any

_MAX_LETTERS = 80


def shown(value: Any) -> str:
    """As JSON, cut where it would fill the sentence."""
    text = json.dumps(value, ensure_ascii=True)
    return text if len(text) <= _MAX_LETTERS else f"{text[: _MAX_LETTERS - 3]}..."
