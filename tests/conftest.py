"""Owns the real parts that tests share: one PostgreSQL and one object store per session, fresh databases.

lend_database  from the name of a service to the URL of a database with its tables, for the time of this test
make_database  to the URL of a new database without any
database_url   what `make_database` makes; some services' tests have one that is lent
s3             S3Access: endpoint, keys and a bucket of this test module's own
blobs          the same as services use it
line           a way to the object store that can be cut
"""

import gc
import shutil
import signal
import tempfile
import uuid
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import pytest
import structlog
from xdist.scheduler import LoadScopeScheduling

from deploy.local.home import S3_ACCESS_KEY, S3_REGION, Home
from deploy.local.ports import free_port
from deploy.local.postgres import Postgres
from deploy.local.store import Store
from services.common.blobs import Blobs
from services.common.settings import BlobSettings
from tests.databases import ROLE, Databases
from tests.line import Line
from tests.processes import process_environment, running

# Plain tracebacks, as the services and the worker have: drawing tensors prettily takes half a minute.
structlog.configure(
    processors=[
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper("%H:%M:%S"),
        structlog.dev.ConsoleRenderer(colors=False, exception_formatter=structlog.dev.plain_traceback),
    ]
)


# What a shell runs in the background ignores Ctrl-C, and so would all that is started here.
signal.signal(signal.SIGINT, signal.default_int_handler)


@dataclass(frozen=True)
class S3Access:
    """What a test needs to reach the object store."""

    endpoint_url: str
    bucket: str
    region: str
    access_key: str
    secret_key_file: Path
    store: Store

    def settings(self, **changed: Any) -> BlobSettings:
        """What a service is told about it."""
        names = ("bucket", "region", "endpoint_url", "access_key", "secret_key_file")
        return BlobSettings(**{name: getattr(self, name) for name in names} | changed)

    def client(self, endpoint_url: str | None = None) -> object:
        """Returns a boto3 client."""
        return self.store.client(endpoint_url)


@pytest.fixture(scope="session")
def esd_home() -> Iterator[Home]:
    """An ESD_HOME of this session. Not under tmp_path, which root's PostgreSQL user could not enter."""
    folder = Path(tempfile.mkdtemp(prefix="esd-test-"))
    folder.chmod(0o711)
    yield Home(folder)
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="session")
def postgres(esd_home: Home) -> Iterator[Postgres]:
    """A running PostgreSQL. Nobody needs its data for longer than it runs, so it neither flushes nor saves them."""
    server = Postgres(esd_home, free_port())
    server.prepare()
    with running([*server.command(), "--fsync=off"], process_environment(), signum=signal.SIGQUIT):
        server.wait_until_up()
        server.bootstrap([ROLE])
        yield server


@pytest.fixture(scope="session")
def databases(postgres: Postgres, esd_home: Home) -> Databases:
    """The databases of that PostgreSQL."""
    return Databases(postgres, esd_home)


@pytest.fixture
def make_database(databases: Databases) -> Callable[[], str]:
    """Makes a fresh database at each call and returns its URL."""
    return databases.make


@pytest.fixture
def lend_database(databases: Databases) -> Iterator[Callable[[str], str]]:
    """Lends a database with the tables of a service, all of them empty, and returns its URL."""
    yield databases.lend
    databases.take_back()


@pytest.fixture
def database_url(make_database: Callable[[], str]) -> str:
    """The URL of a fresh, empty database."""
    return make_database()


@pytest.fixture(scope="session")
def swift(esd_home: Home) -> Iterator[Store]:
    """A running object store."""
    store = Store(esd_home, free_port())
    with running(store.command(), process_environment() | store.environment()):
        store.wait_until_up()
        yield store


@pytest.fixture(scope="module")
def s3(swift: Store, esd_home: Home) -> S3Access:
    """The object store with a fresh bucket."""
    bucket = f"test-{uuid.uuid4().hex[:12]}"
    swift.bootstrap(bucket)
    return S3Access(swift.url, bucket, S3_REGION, S3_ACCESS_KEY, esd_home.s3_secret_key_file, swift)


@pytest.fixture(scope="module")
def blobs(s3: S3Access) -> Blobs:
    """That bucket as services use it. A client of boto3 takes half a second to make."""
    return Blobs(s3.settings())


@pytest.fixture
async def line(s3: S3Access) -> AsyncIterator[Line]:
    """A way to the object store that can be cut."""
    async with Line() as found:
        found.url = s3.endpoint_url
        yield found


# While it imports and collects, pytest makes millions of objects that stay: the collector goes through none of them.
gc.disable()


def pytest_collection_finish() -> None:
    """What pytest calls before the first test."""
    gc.freeze()
    gc.enable()


# What takes longest begins first, before what has most tests: else one process would be left alone with it at the end.
# Stacks do not all start at once.
_LONG = (
    "e2e",
    "tests/deploy/test_stack.py",
    "tests/gpu_worker/test_any_payload.py",
    "tests/gpu_worker/demo_model/test_checkpoint.py",
    "tests/gpu_worker/trainer/test_learning.py",
    "tests/chaos/test_chaos.py",
    "tests/gpu_worker/engine/test_fast.py",
    "tests/e2e/test_demo.py",
)


class _BySharedParts(LoadScopeScheduling):
    """Keeps a file's tests in one process, and all that share a whole stack or a control plane in one."""

    def _split_scope(self, nodeid: str) -> str:
        file = PurePosixPath(nodeid.partition("::")[0])
        has_own_stack = file.name == "test_demo.py"
        # The files of e2e/kubernetes start a control plane each: they mostly wait, and do so at the same time.
        shares_plane = self.config.option.markexpr == "k8s" and file.parent.name == "endpoints"
        is_shared = file.parent.name in {"e2e", "rest"} or shares_plane
        return file.parent.name if is_shared and not has_own_stack else str(file)

    def _assign_work_unit(self, node: Any) -> None:
        longest = next((scope for scope in _LONG if scope in self.workqueue), None)
        if longest:
            self.workqueue.move_to_end(longest, last=False)
        super()._assign_work_unit(node)


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> LoadScopeScheduling:
    """What xdist calls to learn which tests go together, when tests run in several processes."""
    return _BySharedParts(config, log)
