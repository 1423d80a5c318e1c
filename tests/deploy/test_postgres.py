"""The embedded PostgreSQL: who gets in, what survives."""

import os
import stat
import tempfile
from pathlib import Path

import psutil
import psycopg
import pytest

from deploy.local.home import Home
from deploy.local.ports import free_port
from deploy.local.postgres import ADMIN, PasswordRefusedError, Postgres, _reachable
from services.common.process import bound
from tests.processes import process_environment, running


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
    # The machine began anew, and gave the dead server's number to another process of the same user.
    started, starting = os.pipe()
    command = bound(["sh", "-c", "echo; exec sleep 1000"], user=again._user)
    with open(started) as words, open(starting, "wb") as log, running(command, process_environment(), log) as other:
        words.readline()
        lock = database_home.postgres / "postmaster.pid"
        lock.write_text(lock.read_text().replace(str(process.pid), str(other.pid), 1))
        again.prepare()
        assert_keeps_its_rows(again)


def assert_keeps_its_rows(server: Postgres) -> None:
    with running(server.command(), process_environment()):
        server.wait_until_up()
        with psycopg.connect(server.url("models").replace("+psycopg", "")) as connection:
            assert connection.execute("SELECT number FROM kept").fetchone() == (1,)


def test_the_lock_of_a_server_that_runs_is_left(postgres: Postgres, esd_home: Home) -> None:
    postgres.prepare()
    assert (esd_home.postgres / "postmaster.pid").exists()


def test_a_role_has_the_password_that_is_in_the_home_now(postgres: Postgres, esd_home: Home) -> None:
    postgres.bootstrap(["endpoints"])
    (esd_home.secrets / "postgres-endpoints.password").unlink()
    postgres.bootstrap(["endpoints"])
    connect(postgres, "endpoints", esd_home.database_password("endpoints"), "endpoints").close()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root's PostgreSQL runs as another user")
def test_who_removes_the_administrators_password_gets_another(database_home: Home) -> None:
    server, file = Postgres(database_home, free_port()), database_home.database_password_file(ADMIN)
    server.prepare()
    before = file.read_text()
    file.unlink()
    server.prepare()
    assert file.read_text() != before
    with running(server.command(), process_environment()):
        server.wait_until_up()
        with pytest.raises(psycopg.OperationalError, match="password authentication failed"):
            connect(server, ADMIN, before, "postgres")


def test_a_password_that_the_database_does_not_know_is_named(postgres: Postgres, tmp_path: Path) -> None:
    other = Home(tmp_path)  # with secrets of its own
    with pytest.raises(PasswordRefusedError, match=f"in {other.database_password_file(ADMIN)}: put the one back"):
        Postgres(other, postgres.port).wait_until_up()


def test_the_database_user_reaches_what_was_made_under_a_strict_umask(monkeypatch: pytest.MonkeyPatch) -> None:
    umask = os.umask(0o077)
    try:
        with tempfile.TemporaryDirectory(prefix="esd-test-") as folder:
            Path(folder).chmod(0o711)
            home = Home(Path(folder) / "home")
            (home.path / "postgres-18-0.1").mkdir()  # what another version of the wheel left
            server = Postgres(home, free_port())
            with monkeypatch.context() as patch:
                patch.setattr("deploy.local.postgres._reachable", lambda *_: False)  # the wheel
                binaries = server._binaries()
            assert server._user is not None
            assert _reachable(binaries / "postgres", server._user)
            files = {path: stat.S_IMODE(path.stat().st_mode) for path in binaries.parent.rglob("*")}
            assert set(files.values()) == {0o755, 0o644}
            assert [path.name for path in home.path.glob("postgres-18*")] == [binaries.parent.name]
    finally:
        os.umask(umask)


@pytest.fixture
def database_home(esd_home: Home) -> Home:
    folder = esd_home.path / "another"
    return Home(folder)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root's PostgreSQL runs as another user")
def test_a_home_that_the_database_user_cannot_reach_is_named(tmp_path: Path) -> None:
    tmp_path.chmod(0o700)
    with pytest.raises(RuntimeError, match="cannot reach ESD_HOME="):
        Postgres(Home(tmp_path / "home"), free_port()).prepare()
