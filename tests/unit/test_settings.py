"""Settings from the environment."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from pydantic import Field, Json

from deploy.local.home import SERVICES
from services.common.blobs import Blobs
from services.common.process import EXIT_WRONG_SETTING
from services.common.settings import BlobSettings, Networks, Settings, load, read_secret
from services.endpoints.__main__ import EndpointsSettings
from services.identity.settings import IdentitySettings
from services.inference.__main__ import InferenceSettings
from services.models.settings import ModelsSettings
from services.training.__main__ import TrainingSettings
from tests.processes import ROOT


class Some(Settings):
    """One of each kind."""

    needed: str
    number: int = Field(3, ge=1)
    networks: Networks = Field(default=[])
    ranges: Json[dict[str, tuple[int, int]]] = Field({}, validate_default=False)


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


@pytest.mark.parametrize(
    ("name", "given", "said"),
    [
        ("NUMBER", "0", "Input should be greater than or equal to 1 (given: '0')"),
        ("NETWORKS", "10.0.0.0/8", """a value such as ["10.0.0.0/8"] is wanted (given: '10.0.0.0/8')"""),
        ("NETWORKS", '"10.0.0.0/8"', "Input should be a valid list (given: '10.0.0.0/8')"),
        ("NETWORKS", '["::/0", "10.0.0.1/8"]', "[1]: 10.0.0.1/8 has host bits set (given: '10.0.0.1/8')"),
        ("RANGES", "{'a': [0, 1]}", "Invalid JSON: key must be a string at line 1 column 2 (given: \"{'a': [0, 1]}\")"),
        ("RANGES", '{"a": [0, 0.5]}', '["a"][1]: Input should be a valid integer, got a number with a fractional part'),
    ],
)
def test_a_wrong_value_is_named_with_its_variable(
    name: str, given: str, said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("ESD_NEEDED", "this")
    monkeypatch.setenv(f"ESD_{name}", given)
    with pytest.raises(SystemExit):
        load(Some)
    within = "" if said.startswith("[") else ": "
    error = capsys.readouterr().err
    assert error.startswith(f"setting ESD_{name}{within}{said}")
    assert error.count("\n") == 1


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
        ("models", {"ESD_IDENTITY_ADDRESS": ""}, "setting ESD_IDENTITY_ADDRESS: Field required\n"),
        (
            "endpoints",
            {"ESD_PUBLIC_URL": "esd.example"},
            "setting ESD_PUBLIC_URL: a value such as https://esd.example.org is wanted (given: 'esd.example')\n",
        ),
        (
            "models",
            {"ESD_IDENTITY_ADDRESS": "one:1,two:1"},
            "setting ESD_IDENTITY_ADDRESS: a value such as identity:9000 or, for replicas, "
            "10.0.0.1:9000,10.0.0.2:9000 is wanted (given: 'one:1,two:1')\n",
        ),
    ],
)
def test_a_service_that_cannot_run_as_it_is_set_up_says_so_and_ends_for_good(
    service: str, settings: dict[str, str], said: str
) -> None:
    files = ("SECRET", "VERIFYING_KEY", "AUDIT_KEY", "SIGNING_KEY", "SECRET_HASHES", "API_KEY", "PASSWORD_KEY")
    environment = {f"ESD_{name}_FILE": "/no/such/file" for name in files}
    environment |= {f"ESD_{name.upper()}_ADDRESS": "127.0.0.1:1" for name in SERVICES}
    environment |= {"ESD_DATABASE_URL": "postgresql+psycopg://nobody@127.0.0.1:1/none", **settings}
    command = [sys.executable, "-m", f"services.{service}"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == EXIT_WRONG_SETTING, done.stderr
    assert done.stderr.startswith(said)
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("given", ["ESD_S3_ACCESS_KEY", "ESD_S3_SECRET_KEY_FILE"])
def test_one_half_of_the_stores_credentials_stops_the_process_by_name(
    given: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("ESD_S3_BUCKET", "esd")
    monkeypatch.setenv(given, "Makefile")
    with pytest.raises(SystemExit):
        load(BlobSettings)
    assert "it and ESD_S3_ACCESS_KEY belong together: set both or neither" in capsys.readouterr().err


def test_a_service_that_finds_no_credentials_of_the_store_says_so(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))  # where others may have theirs
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    with pytest.raises(SystemExit, match="there are no credentials for the object store: set ESD_S3_ACCESS_KEY and"):
        Blobs(BlobSettings(bucket="esd"))


SETTINGS_OF: dict[str, type[Settings]] = {
    "identity": IdentitySettings,
    "models": ModelsSettings,
    "endpoints": EndpointsSettings,
    "inference": InferenceSettings,
    "training": TrainingSettings,
}


@pytest.mark.parametrize("service", SERVICES)
def test_who_starts_a_service_by_hand_finds_every_setting_that_it_has(service: str) -> None:
    told = set()
    for names, services in re.findall(
        r"^\| (`ESD_.*?) \| (.*?) \|", (ROOT / "services/README.md").read_text(), re.MULTILINE
    ):
        if service in services.split(", ") or (services.startswith("all") and service not in services):
            told |= set(re.findall(r"ESD_\w+", names))
    fields = SETTINGS_OF[service].model_fields.items()
    assert {f"ESD_{name.upper()}" for name, _ in fields} <= told
    needed = {f"ESD_{name.upper()}" for name, field in fields if field.is_required()}
    addresses = {f"ESD_{name.upper()}_ADDRESS" for name in SERVICES}
    assert addresses & told == addresses & needed
