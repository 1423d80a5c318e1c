"""The layers of ARCHITECTURE.md as a test: what each kind of file may import."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SERVICES = ("identity", "models", "endpoints", "inference", "training")

WIRE, SQL, NEVER = ("grpc", "esd"), ("sqlmodel", "sqlalchemy", "psycopg"), ("boto3", "botocore", "torch")
# Beside files whose names end so: those of a service that speak protos, and those with statements of its stores. The
# others decide, and know neither; `__main__` puts all together.
SPEAK = ("servicer.py", "peers.py"), {"authz.py", "relay.py", "scaler.py", "session.py"}
REMEMBER = ("store.py",), {"chores.py", "claim.py", "enqueue.py", "quotas.py", "rows.py", "submissions.py", "table.py"}
# Outside libraries that only these files of services/common may import.
OWNERS = {
    "boto3": {"blobs.py"},
    "botocore": {"blobs.py"},
    "sqlalchemy": {"audit.py", "database.py", "driver.py", "env.py", "leftovers.py"},
    "psycopg": {"database.py", "driver.py"},
    "protovalidate": {"validation.py"},
    "jwt": {"auth.py"},
    "pydantic_settings": {"settings.py"},
    "httpcore": {"outbound.py"},
}
WORKER_MAY = {"settings", "logs", "auth", "clients", "process", "errors", "payloads", "sentences", "tasks", "structs"}
TORCH_OWNERS = {"devices.py", "demo_model", "engine", "models", "sampling", "tasks", "trainer"}
# Of the engine, what decides: it is tried without a model.
WITHOUT_TORCH = {"batch.py", "bounds.py", "engine.py", "importing.py", "resident.py", "run.py", "settings.py"}


def imports(path: Path) -> Iterator[str]:
    """The modules that a file imports, wherever the import stands."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{name.name}" for name in node.names)


def starts(module: str, prefix: str) -> bool:
    """Whether the module is the prefix or below it."""
    return module == prefix.rstrip(".") or module.startswith(prefix.rstrip(".") + ".")


def python_files(*folders: str) -> list[Path]:
    """All Python files below the folders."""
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


@pytest.mark.parametrize("service", SERVICES)
def test_a_service_has_the_shape_of_a_service(service: str) -> None:
    assert {path.name for path in (ROOT / "services" / service).glob("*.py")} >= {"__main__.py", "servicer.py"}


def forbidden(path: Path) -> tuple[str, ...]:
    """The module prefixes that a service's file must not import."""
    if path.name == "__main__.py":
        return ()
    speaks, remembers = (path.name.endswith(ends) or path.name in names for ends, names in (SPEAK, REMEMBER))
    return NEVER + (() if speaks else WIRE) + (() if remembers or "migrations" in path.parts else SQL)


@pytest.mark.parametrize("path", python_files("services"), ids=lambda path: str(path.relative_to(ROOT)))
def test_a_layer_imports_only_what_lies_below_it(path: Path) -> None:
    own = path.relative_to(ROOT / "services").parts[0]
    others = tuple(f"services.{service}" for service in SERVICES if service != own)
    prefixes = others if own == "common" else others + forbidden(path)
    assert not [module for module in imports(path) for prefix in prefixes if starts(module, prefix)]


@pytest.mark.parametrize("path", python_files("services/common"), ids=lambda path: path.name)
def test_each_outside_library_has_one_owner_in_common(path: Path) -> None:
    for library, owners in OWNERS.items():
        if any(starts(module, library) for module in imports(path)):
            assert path.name in owners, f"{library} belongs to {owners}"


@pytest.mark.parametrize("path", python_files("gpu_worker"), ids=lambda path: str(path.relative_to(ROOT)))
def test_the_worker_knows_no_service_and_only_its_owners_know_torch(path: Path) -> None:
    found = set(imports(path))
    for module in found:
        if starts(module, "services"):
            parts = module.split(".")
            assert parts[1:2] in ([], ["common"]), module
            assert len(parts) < 3 or parts[2] in WORKER_MAY, module
        assert not starts(module, "sqlmodel")
        assert not starts(module, "boto3")
    owner, *_ = path.relative_to(ROOT / "gpu_worker").parts
    if owner not in TORCH_OWNERS or (owner == "engine" and path.name in WITHOUT_TORCH):
        assert not [module for module in found if starts(module, "torch") or starts(module, "diffusers")]


def test_who_runs_next_is_decided_without_torch() -> None:
    modules = "gpu_worker.engine.batch, gpu_worker.engine.resident, gpu_worker.engine.run"
    command = f"import sys, {modules}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", command], cwd=ROOT, check=False).returncode == 0


@pytest.mark.parametrize("path", python_files("services/common/payloads"), ids=lambda path: path.name)
def test_payloads_know_neither_services_nor_protocols(path: Path) -> None:
    for module in imports(path):
        assert not starts(module, "services") or starts(module, "services.common"), module
        assert not starts(module, "grpc")
        assert not starts(module, "esd")
        assert not starts(module, "gpu_worker")


def test_the_services_run_without_torch() -> None:
    for path in python_files("services", "gateway", "deploy"):
        assert not [module for module in imports(path) if starts(module, "torch") or starts(module, "diffusers")], path
    programs = [*(f"services.{service}.__main__" for service in SERVICES), "gateway.__main__", "deploy.local.cli"]
    command = f"import sys, {', '.join(programs)}; sys.exit(not {{'torch', 'diffusers'}}.isdisjoint(sys.modules))"
    assert subprocess.run([sys.executable, "-c", command], cwd=ROOT, check=False).returncode == 0
