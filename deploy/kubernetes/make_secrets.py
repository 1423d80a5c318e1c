"""`python -m deploy.kubernetes.make_secrets --home DIR`: the secrets of a cluster, made once and kept in DIR.

Each service gets what it reads and nothing else: one Secret per process, whose keys become files under
/run/secrets/esd. A file named after a setting (`esd_database_url`) is that setting (services/common/settings.py).

    python -m deploy.kubernetes.make_secrets --home ~/.esd-cluster | kubectl apply -f -
"""

from __future__ import annotations

import argparse
import base64
import json
import os
from pathlib import Path
from typing import Any

from deploy.kubernetes.certificates import make_certificates
from deploy.local.home import AUDITED, S3_ACCESS_KEY, SERVICES, Home
from deploy.local.postgres import ADMIN

NAMESPACE, WORKERS = "esd", "esd-workers"
DATABASE_URL = "postgresql+psycopg://{service}:{password}@postgres:5432/{service}"


def make_secrets(home: Home, database_url: str, s3_access_key: str, s3_secret_key: str) -> dict[str, dict[str, bytes]]:
    """The files of each process, by its name; `s3` and `postgres` are the parts', `keda` and `prometheus` of others.

    `database_url` is a template with {service} and {password}.
    """
    verifying_key = home.verifying_key_file.read_bytes()
    processes: dict[str, dict[str, bytes]] = {"gateway": {"secret": home.secret("gateway").encode()}}
    for name in SERVICES:
        url = database_url.format(service=name, password=home.database_password(name))
        processes[name] = {
            "secret": home.secret(name).encode(),
            "verifying-key.pem": verifying_key,
            "esd_database_url": url.encode(),
        }
    for name in AUDITED:
        processes[name]["audit-key"] = home.audit_key_file(name).read_bytes()
    processes["identity"] |= {
        "signing-key.pem": home.signing_key_file.read_bytes(),
        "secret-hashes.json": home.secret_hashes_file.read_bytes(),
        "api-key": home.api_key.encode(),
        "password-key": home.password_key_file.read_bytes(),
    }
    processes["s3"] = {"esd_s3_access_key": s3_access_key.encode(), "s3-secret-key": s3_secret_key.encode()}
    processes["postgres"] = {name: home.database_password(name).encode() for name in (ADMIN, *SERVICES)}
    scaler, keda = _certificates(home, "inference", "keda")
    metrics, prometheus = _certificates(home, "gateway", "prometheus")
    return processes | {"scaler": scaler, "keda": keda, "metrics": metrics, "prometheus": prometheus}


def _certificates(home: Home, server: str, client: str) -> tuple[dict[str, bytes], dict[str, bytes]]:
    """What a process and a program that is not ours know each other by (components/keda, components/monitoring)."""

    def make() -> str:
        made = make_certificates([f"{server}.{NAMESPACE}", f"{server}.{NAMESPACE}.svc", server], client)
        sides = made.server_files, made.client_files
        return json.dumps([{file: pem.decode() for file, pem in files.items()} for files in sides])

    kept: list[dict[str, str]] = json.loads(home.kept(f"{client}-certificates.json", make).read_text())
    of_server, of_client = ({file: pem.encode() for file, pem in files.items()} for files in kept)
    return of_server, of_client


def manifest(name: str, files: dict[str, bytes], namespace: str) -> dict[str, Any]:
    """The Secret of one process."""
    return {
        "apiVersion": "v1",
        "kind": "Secret",
        "metadata": {"name": f"esd-{name}", "namespace": namespace, "labels": {"app.kubernetes.io/part-of": "esd"}},
        "type": "Opaque",
        "data": {file: base64.b64encode(content).decode() for file, content in files.items()},
    }


def write(folder: Path, secrets: dict[str, dict[str, bytes]]) -> None:
    """Writes DIR/<process>/<file>, for containers without a cluster.

    Their user is not ours, so the folder above is what keeps others of this machine out.
    """
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    folder.chmod(0o700)
    for name, files in secrets.items():
        (folder / name).mkdir(mode=0o755, exist_ok=True)
        for file, content in files.items():
            with os.fdopen(os.open(folder / name / file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644), "wb") as out:
                out.write(content)


def main() -> None:
    """Reads the command line."""
    parser = argparse.ArgumentParser(prog="make_secrets", description="make the secrets of a cluster, once, in DIR")
    parser.add_argument(
        "--home", type=Path, required=True, metavar="DIR", help="keeps them; the same DIR, the same ones"
    )
    parser.add_argument(
        "--database-url", default=DATABASE_URL, help="with {service} and {password}; default: %(default)s"
    )
    parser.add_argument("--s3-access-key", help="of a store of your own; default: that of the trial's store")
    parser.add_argument("--s3-secret-key-file", type=Path)
    parser.add_argument("--folder", type=Path, help="write files below this folder instead of printing Secrets")
    given = parser.parse_args()
    if (given.s3_access_key is None) != (given.s3_secret_key_file is None):
        parser.error("--s3-access-key and --s3-secret-key-file belong together: give both or neither")
    try:
        given.database_url.format_map({"service": "", "password": ""})
    except (KeyError, IndexError, ValueError):
        parser.error(f"--database-url {given.database_url}: only {{service}} and {{password}} may stand in braces")
    home = Home(given.home)
    own_key = given.s3_secret_key_file.read_text().strip() if given.s3_secret_key_file else home.s3_secret_key
    secrets = make_secrets(home, given.database_url, given.s3_access_key or S3_ACCESS_KEY, own_key)
    if given.folder:
        write(given.folder, secrets)
        return
    items = [manifest(name, files, WORKERS if name == "keda" else NAMESPACE) for name, files in secrets.items()]
    print(json.dumps({"apiVersion": "v1", "kind": "List", "items": items}, indent=1))


if __name__ == "__main__":
    main()
