"""Owns the conversions that the servicers of checkpoints and datasets share."""

from __future__ import annotations

from typing import Any

from services.common.auth import current_caller
from services.common.viewer import Viewer


def viewer() -> Viewer:
    """The caller. The WebUI client names nobody where it finishes uploads; the interceptor let it in."""
    return Viewer.of(current_caller(), anonymous_sees_everything=True)


def numbers_as_text(params: dict[str, Any]) -> dict[str, Any]:
    """Numbers read back from storage are text in lists (contract 1.7)."""
    return {name: _as_text(value) for name, value in params.items()}


def _as_text(value: Any) -> Any:
    if isinstance(value, dict):
        return numbers_as_text(value)
    if isinstance(value, list):
        return [_as_text(entry) for entry in value]
    return str(value) if isinstance(value, int | float) and not isinstance(value, bool) else value
