"""Settings from the environment."""

from __future__ import annotations

import pytest
from pydantic import Field

from services.common.settings import Settings, load


class Some(Settings):
    """Two settings."""

    needed: str
    number: int = Field(3, ge=1)


def test_an_empty_variable_is_one_that_is_not_set(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("ESD_NUMBER", "")
    monkeypatch.setenv("ESD_NEEDED", "this")
    assert load(Some).number == 3
    monkeypatch.setenv("ESD_NEEDED", "")
    with pytest.raises(SystemExit) as ended:
        load(Some)
    assert ended.value.code == 2
    assert capsys.readouterr().err == "setting ESD_NEEDED: Field required\n"
