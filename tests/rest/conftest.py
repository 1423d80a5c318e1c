"""A stack of its own for the tables of REST requests: two replicas of every service behind the gateway, no workers.

Envoy asks the replicas in turn, so every request of these tests meets now one, now the other.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import requests

from deploy.local.stack import Stack
from tests.e2e.conftest import Api

SETTINGS = {"ESD_BASE_PATH": "/prod", "ESD_REPLICAS": "2", "ESD_IMPORT_ALLOWED_NETWORKS": '["127.0.0.0/8"]'}


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """What pytest asks before it imports a file. Where schemathesis is in use, collecting makes all of its cases, which
    takes as long as importing torch: a run without slow tests goes without."""
    return (collection_path.name == "test_openapi.py" and "not slow" in config.option.markexpr) or None


@pytest.fixture(scope="session")
def stack() -> Iterator[Stack]:
    """Two of everything, both listeners, a base path."""
    with tempfile.TemporaryDirectory(prefix="esd-rest-") as folder:
        Path(folder).chmod(0o711)  # PostgreSQL's user must get through, when root runs this
        with Stack(Path(folder) / "home", webui=True, env_overrides=SETTINGS) as stack:
            yield stack


@pytest.fixture(scope="session")
def admin(stack: Stack) -> Iterator[Api]:
    """The first key on the document port; it may act for anybody."""
    api = Api(stack.url, stack.api_key)
    yield api
    api.close()


@pytest.fixture(scope="session")
def webui(stack: Stack) -> Iterator[Api]:
    """The first key on the webui port; it names nobody."""
    api = Api(stack.webui_url, stack.api_key)
    yield api
    api.close()


@pytest.fixture(scope="session")
def session(stack: Stack) -> Iterator[requests.Session]:
    """A session of schemathesis's own library, with the first key."""
    with requests.Session() as session:
        session.headers["x-api-key"] = stack.api_key
        yield session
