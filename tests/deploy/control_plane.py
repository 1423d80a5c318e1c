"""Owns a real Kubernetes control plane for tests: etcd, API server, controllers and scheduler on free ports.

The programs are those of the folder KUBEBUILDER_ASSETS; tests/deploy/kube-assets.sh makes one. There are no nodes but
those of tests/deploy/process_kubelet.py.
"""

from __future__ import annotations

import asyncio
import json
import os
import secrets
import subprocess
from collections.abc import AsyncIterator
from contextlib import ExitStack, asynccontextmanager
from dataclasses import dataclass
from http import HTTPStatus
from pathlib import Path
from typing import Any

import aiohttp
import yaml
from cryptography.hazmat.primitives.asymmetric.rsa import generate_private_key
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat
from kubernetes_asyncio import client, config
from kubernetes_asyncio.client.exceptions import ApiException

from deploy.local.ports import free_port
from tests.processes import ROOT, running

ASSETS = os.environ.get("KUBEBUILDER_ASSETS", "")
_KUBERNETES = ROOT / "deploy" / "kubernetes"
_ADMIN = secrets.token_hex(16)
NODE_GRACE_SECONDS = 8  # of silence, after which a node is taken for dead
# What the tests need of the controllers, and few threads for it.
_CONTROLLERS = ",".join(
    [
        *("deployment", "replicaset", "job", "podgc", "disruption", "garbagecollector", "namespace", "nodelifecycle"),
        *("serviceaccount", "serviceaccount-token"),
    ]
)


@dataclass
class ControlPlane:
    """A running control plane. `server` is its API server, which may be taken away for a while."""

    folder: Path
    url: str
    has_budgets: bool
    server: running | None = None

    @asynccontextmanager
    async def without_api(self) -> AsyncIterator[None]:
        """The API server is gone during the block, and answers again behind it."""
        assert self.server is not None
        await asyncio.to_thread(self.server.__exit__)
        try:
            yield
        finally:
            self.server.__enter__()
            await _until_it_answers(self)

    def kubeconfig(self, token: str = _ADMIN) -> Path:
        """A kubeconfig for who has the token."""
        file = self.folder / f"kubeconfig-{abs(hash(token))}"
        cluster = {"server": self.url, "insecure-skip-tls-verify": True}
        content = {
            "apiVersion": "v1",
            "kind": "Config",
            "clusters": [{"name": "tests", "cluster": cluster}],
            "users": [{"name": "tests", "user": {"token": token}}],
            "contexts": [{"name": "tests", "context": {"cluster": "tests", "user": "tests"}}],
            "current-context": "tests",
        }
        file.write_text(json.dumps(content))
        return file

    async def client(self, token: str = _ADMIN) -> client.ApiClient:
        """A client for who has the token."""
        configuration = client.Configuration()
        await config.load_kube_config(str(self.kubeconfig(token)), client_configuration=configuration)
        return client.ApiClient(configuration)


@asynccontextmanager
async def control_plane(folder: Path) -> AsyncIterator[ControlPlane]:
    """A control plane that runs during the block; its API answers when the block begins."""
    minor = _minor_version()
    etcd, peer, api = (free_port() for _ in range(3))
    plane = ControlPlane(folder, f"https://127.0.0.1:{api}", minor >= 21)
    key = generate_private_key(public_exponent=65537, key_size=2048)
    private = folder / "accounts.key"
    private.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    public = folder / "accounts.pub"
    public.write_bytes(key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo))
    tokens = folder / "tokens.csv"
    tokens.write_text(f'{_ADMIN},admin,admin,"system:masters"\n')
    kubeconfig = plane.kubeconfig()
    clear = ["--port=0"] if minor < 24 else []  # a door without a lock that newer ones do not have
    commands = [
        [
            "etcd",
            f"--data-dir={folder / 'etcd'}",
            f"--listen-client-urls=http://127.0.0.1:{etcd}",
            f"--advertise-client-urls=http://127.0.0.1:{etcd}",
            f"--listen-peer-urls=http://127.0.0.1:{peer}",
            f"--initial-advertise-peer-urls=http://127.0.0.1:{peer}",
            f"--initial-cluster=default=http://127.0.0.1:{peer}",
            "--log-level=error",
        ],
        [
            "kube-apiserver",
            f"--etcd-servers=http://127.0.0.1:{etcd}",
            "--bind-address=127.0.0.1",
            f"--secure-port={api}",
            f"--cert-dir={folder / 'certificates'}",
            f"--token-auth-file={tokens}",
            "--authorization-mode=RBAC",
            "--service-cluster-ip-range=10.0.0.0/24",
            "--service-account-issuer=https://tests",
            f"--service-account-signing-key-file={private}",
            f"--service-account-key-file={public}",
        ],
        [
            "kube-controller-manager",
            f"--kubeconfig={kubeconfig}",
            f"--service-account-private-key-file={private}",
            "--leader-elect=false",
            "--secure-port=0",
            f"--controllers={_CONTROLLERS}",
            f"--node-monitor-grace-period={NODE_GRACE_SECONDS}s",
            "--node-monitor-period=1s",
            *clear,
        ],
        ["kube-scheduler", f"--kubeconfig={kubeconfig}", "--leader-elect=false", "--secure-port=0", *clear],
    ]
    with ExitStack() as stack:
        for name, *arguments in commands:
            log = stack.enter_context((folder / f"{name}.log").open("wb"))
            command = ["sh", "-c", 'exec "$@" 2>&1', "sh", _program(name), *arguments]
            process = running(command, {"PATH": os.environ["PATH"], "HOME": str(folder)}, log)
            stack.enter_context(process)
            if name == "kube-apiserver":
                plane.server = process
                await _until_it_answers(plane)  # the controllers would wait for 10 seconds only
        yield plane


async def _until_it_answers(plane: ControlPlane) -> None:
    async with await plane.client() as api:
        while True:
            try:
                await client.CoreV1Api(api).list_namespace()
            except (ApiException, aiohttp.ClientError):
                await asyncio.sleep(0.2)  # a server that does not listen yet sends no event
            else:
                return


def _minor_version() -> int:
    said = subprocess.run([_program("kube-apiserver"), "--version"], capture_output=True, text=True, check=True).stdout
    return int(said.partition("v1.")[2].partition(".")[0])


def _program(name: str) -> str:
    return str(Path(ASSETS) / name)


async def prepare(api: client.ApiClient) -> None:
    """Makes the namespaces, the account, the role and the priorities of deploy/kubernetes."""
    base, workers = _KUBERNETES / "base", _KUBERNETES / "workers"
    core, rbac = client.CoreV1Api(api), client.RbacAuthorizationV1Api(api)
    for file in (base / "namespace.yaml", workers / "namespace.yaml"):
        await core.create_namespace(yaml.safe_load(file.read_text()))
    await core.create_namespaced_service_account("esd", yaml.safe_load((base / "service-account.yaml").read_text()))
    for priority in yaml.safe_load_all((workers / "priorities.yaml").read_text()):
        await client.SchedulingV1Api(api).create_priority_class(priority)
    role, binding = yaml.safe_load_all((workers / "role.yaml").read_text())
    await rbac.create_namespaced_role("esd-workers", role)
    await rbac.create_namespaced_role_binding("esd-workers", binding)


async def account_token(plane: ControlPlane) -> str:
    """A token of the service account `endpoints`, whose role the API server knows."""
    async with await plane.client() as api:
        request = {"spec": {"audiences": ["https://tests"], "expirationSeconds": 3600}}
        core: Any = client.CoreV1Api(api)
        token = str((await core.create_namespaced_service_account_token("endpoints", "esd", request)).status.token)
    async with await plane.client(token) as own:
        apps: Any = client.AppsV1Api(own)
        while True:
            try:
                await client.ApisApi(own).get_api_versions()  # by a role that every account has
                await apps.list_namespaced_deployment("esd-workers")
            except ApiException as error:
                if error.status != HTTPStatus.FORBIDDEN:
                    raise
                await asyncio.sleep(0.1)  # the API server reads new roles in its own time, and does not tell when
            else:
                return token
