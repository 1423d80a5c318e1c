"""The embedded PostgreSQL: who gets in, what survives."""

import os
import stat
from pathlib import Path

import psutil
import psycopg
import pytest

from deploy.local.home import Home
from deploy.local.ports import free_port
from deploy.local.postgres import ADMIN, Postgres
from deploy.local.store import process_environment
from tests.processes import running


def connect(server: Postgres, user: str, password: str, database: str) -> psycopg.Connection:
    return psycopg.connect(host="127.0.0.1", port=server.port, user=user, password=password, dbname=database)


def test_a_fresh_database_speaks_sql(database_url: str) -> None:
    with psycopg.connect(database_url.replace("+psycopg", "")) as connection:
        assert connection.execute("SHOW server_encoding").fetchone() == ("UTF8",)


def test_a_wrong_password_is_refused(postgres: Postgres) -> None:
    with pytest.raises(psycopg.OperationalError, match="password authentication failed"):
        connect(postgres, ADMIN, "guess", "postgres")


def test_a_role_enters_its_own_database_only(postgres: Postgres, esd_home: Home) -> None:
    postgres.bootstrap(["models", "training"])
    postgres.bootstrap(["models", "training"])  # and twice is once
    connect(postgres, "models", esd_home.database_password("models"), "models").close()
    with pytest.raises(psycopg.OperationalError, match="permission denied"):
        connect(postgres, "models", esd_home.database_password("models"), "training")


def test_secrets_are_for_the_owner_alone(esd_home: Home) -> None:
    files = list(esd_home.secrets.iterdir())
    assert len(files) > 5
    assert {stat.S_IMODE(file.stat().st_mode) for file in files} == {0o600}
    assert stat.S_IMODE(esd_home.secrets.stat().st_mode) == 0o700


def test_committed_rows_survive_a_kill(database_home: Home) -> None:
    server = Postgres(database_home, free_port())
    server.prepare()
    with running(server.command(), process_environment()) as process:
        server.wait_until_up()
        server.bootstrap(["models"])
        with psycopg.connect(server.url("models").replace("+psycopg", "")) as connection:
            connection.execute("CREATE TABLE kept AS SELECT 1 AS number")
        below = psutil.Process(process.pid).children(recursive=True)
        process.kill()
        process.wait()
        psutil.wait_procs(below)  # while one of them is there, the next server does not start
    again = Postgres(database_home, free_port())
    again.prepare()
    with running(again.command(), process_environment()):
        again.wait_until_up()
        with psycopg.connect(again.url("models").replace("+psycopg", "")) as connection:
            assert connection.execute("SELECT number FROM kept").fetchone() == (1,)


@pytest.fixture
def database_home(esd_home: Home) -> Home:
    folder = esd_home.path / "another"
    return Home(folder)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root's PostgreSQL runs as another user")
def test_a_home_that_the_database_user_cannot_reach_is_named(tmp_path: Path) -> None:
    tmp_path.chmod(0o700)
    with pytest.raises(RuntimeError, match="cannot reach ESD_HOME="):
        Postgres(Home(tmp_path / "home"), free_port()).prepare()
