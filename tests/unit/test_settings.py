"""Settings from the environment."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from pydantic import Field

from services.common.process import EXIT_WRONG_SETTING
from services.common.settings import Settings, load, read_secret
from tests.processes import ROOT


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
    assert ended.value.code == EXIT_WRONG_SETTING
    assert capsys.readouterr().err == "setting ESD_NEEDED: Field required\n"


def test_a_secret_that_cannot_be_read_stops_the_process_by_name(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "bytes").write_bytes(b"\xff")
    for name, problem in (("none", "cannot be read: No such file or directory"), ("bytes", "holds no text")):
        with pytest.raises(SystemExit) as ended:
            read_secret(tmp_path / name)
        assert ended.value.code == EXIT_WRONG_SETTING
        assert capsys.readouterr().err == f"the file {tmp_path / name} {problem}\n"


@pytest.mark.parametrize(
    ("service", "settings", "said"),
    [
        ("endpoints", {"ESD_AUTOSCALER": "keda"}, "setting ESD_AUTOSCALER: keda scales what runs with"),
        ("identity", {"ESD_SECRET_HASHES_FILE": "Makefile"}, "setting ESD_SECRET_HASHES_FILE: Makefile is not a JSON"),
    ],
)
def test_a_service_that_cannot_run_as_it_is_set_up_says_so_and_ends_for_good(
    service: str, settings: dict[str, str], said: str
) -> None:
    files = ("SECRET", "VERIFYING_KEY", "AUDIT_KEY", "SIGNING_KEY", "SECRET_HASHES", "API_KEY", "PASSWORD_KEY")
    environment = {f"ESD_{name}_FILE": "/no/such/file" for name in files}
    environment |= {"ESD_DATABASE_URL": "postgresql+psycopg://nobody@127.0.0.1:1/none", **settings}
    command = [sys.executable, "-m", f"services.{service}"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == EXIT_WRONG_SETTING, done.stderr
    assert done.stderr.startswith(said)
    assert done.stderr.count("\n") == 1
