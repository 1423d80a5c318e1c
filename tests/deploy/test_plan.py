"""What the stack consists of, by what its user chose."""

from __future__ import annotations

from inspect import signature

import pytest

from deploy.local.home import SERVICES, CannotRunError, Home
from deploy.local.plan import Options, Plan, PortRefusedError, make_plan
from services.common.database import Database


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Home:
    return Home(tmp_path_factory.mktemp("home"))


@pytest.fixture(autouse=True)
def _plain(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("ESD_TLS_CERT_FILE", "ESD_PUBLIC_URL", "ESD_BASE_PATH"):
        monkeypatch.delenv(name, raising=False)


def url_of_workers(plan: Plan) -> str:
    (endpoints,) = [program for program in plan.programs if program.name == "endpoints"]
    return endpoints.environment["ESD_PUBLIC_URL"]


@pytest.mark.parametrize(
    ("listen", "itself"),
    [("0.0.0.0:0", "127.0.0.1"), ("[::]:0", "[::1]"), ("[::1]:0", "[::1]"), ("localhost:0", "localhost")],
)
def test_the_stack_finds_itself_where_it_listens(home: Home, listen: str, itself: str) -> None:
    plan = make_plan(Options(home.path, listen), home)
    assert plan.probe_url == f"http://{itself}:{plan.ports['gateway']}"
    assert url_of_workers(plan) == plan.probe_url


@pytest.mark.parametrize("replicas", [1, 8])
def test_the_database_has_room_for_all_connections_of_all_replicas(home: Home, replicas: int) -> None:
    programs = make_plan(Options(home.path, "127.0.0.1:0", replicas=replicas), home).programs
    command = next(program.command for program in programs if program.name == "postgres")
    (room,) = (int(option.partition("=")[2]) for option in command if option.startswith("--max_connections="))
    pool_size = signature(Database).parameters["pool_size"].default
    assert room >= replicas * len(SERVICES) * (2 * pool_size + 6)  # and listeners, and what models has for its chores


def test_workers_trust_the_certificate_of_a_gateway_with_tls(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    def trusted() -> str | None:
        programs = make_plan(Options(home.path, "127.0.0.1:0"), home).programs
        return next(program for program in programs if program.name == "endpoints").environment.get("SSL_CERT_FILE")

    assert trusted() is None
    monkeypatch.setenv("ESD_TLS_CERT_FILE", "certificate.pem")
    assert trusted() == str(home.trust_file)


def test_workers_call_a_gateway_with_tls_by_its_name(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ESD_PUBLIC_URL", "https://esd.example")
    assert url_of_workers(make_plan(Options(home.path, "127.0.0.1:0"), home)).startswith("http://127.0.0.1:")
    monkeypatch.setenv("ESD_TLS_CERT_FILE", "certificate.pem")
    assert url_of_workers(make_plan(Options(home.path, "127.0.0.1:0"), home)) == "https://esd.example"


def test_a_public_url_that_is_none_is_named(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ESD_PUBLIC_URL", "esd.example")
    with pytest.raises(CannotRunError, match="setting ESD_PUBLIC_URL: a value such as"):
        make_plan(Options(home.path, "127.0.0.1:0"), home)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"listen": "192.0.2.1:8080"}, "nobody can listen on port 8080 of 192.0.2.1 here"),
        ({"listen": "127.0.0.1:8093", "webui_port": 8093}, "the webui needs a port of its own"),
    ],
)
def test_a_port_that_cannot_be_had_is_named(home: Home, options: dict[str, object], said: str) -> None:
    with pytest.raises(PortRefusedError, match=said):
        make_plan(Options(home.path, **options), home)  # type: ignore[arg-type]
