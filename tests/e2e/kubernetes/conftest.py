"""The one-machine stack with ESD_CLUSTER=kubernetes, on a real control plane.

Needs KUBEBUILDER_ASSETS: `make test-k8s`.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from deploy.local.ports import free_port
from deploy.local.stack import Stack
from tests.deploy.control_plane import ASSETS
from tests.e2e.conftest import Api, new_user, upload
from tests.e2e.kubernetes.site import Site


@pytest.fixture(scope="session")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    if not ASSETS:
        pytest.skip("needs a Kubernetes control plane: set KUBEBUILDER_ASSETS (make test-k8s)")
    site = Site(tmp_path_factory.mktemp("site"))
    site.start()
    yield site
    site.stop()


@pytest.fixture(scope="session")
def painter(site: Site, checkpoint: Path) -> Iterator[Api]:
    """A user of a stack whose workers are pods, with a model."""
    address = f"127.0.0.1:{free_port()}"
    settings = {
        "ESD_CLUSTER": "kubernetes",
        "ESD_KUBERNETES_KUBECONFIG": str(site.kubeconfig),
        "ESD_KUBERNETES_IMAGE": "worker:1",
        "ESD_KUBERNETES_SERVER_URL": f"http://{address}",
        "ESD_KUBERNETES_COMMAND": json.dumps([sys.executable, "-m", "gpu_worker"]),
        "ESD_KUBERNETES_PROFILES": json.dumps({"cpu": {"gpus": 0, "cpu": "100m", "memory": "64Mi"}}),
        "ESD_KUBERNETES_CACHE_GIB": "1",
        "ESD_KUBERNETES_LOST_NODE_SECONDS": "2",
        "ESD_SCALE_OUT_SECONDS": "1",
        "ESD_SCALE_IN_SECONDS": "3",
        "ESD_DRAIN_SECONDS": "10",
    }
    with tempfile.TemporaryDirectory(prefix="esd-k8s-") as folder:
        Path(folder).chmod(0o711)  # PostgreSQL's user must get through, when root runs this
        with Stack(Path(folder) / "home", address, env_overrides=settings) as stack:
            admin = Api(stack.url, stack.api_key)
            api = new_user(admin, "painter", ["checkpoint:all", "sagemaker_endpoint:all", "inference:all", "train:all"])
            assert upload(api, checkpoint).status == 200
            yield api
            api.close()
            admin.close()
