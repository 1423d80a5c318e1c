"""What deploy/kubernetes renders, with any two of its optional components and all, and if it suits our processes."""

from __future__ import annotations

import base64
import functools
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
import warnings
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from cryptography import x509
from hatchling.builders.wheel import WheelBuilder

from deploy.kubernetes.make_secrets import DATABASE_URL, main, make_secrets, manifest, write
from deploy.local.home import S3_ACCESS_KEY, Home
from gateway.settings import GatewaySettings, refuse_open_door
from services.common.settings import BlobSettings, load
from services.endpoints.__main__ import EndpointsSettings
from services.endpoints.cluster.kubernetes_api import KubernetesSettings
from services.endpoints.scaling import ScalingPolicy
from services.identity.settings import IdentitySettings
from services.inference.__main__ import InferenceSettings
from services.models.settings import ModelsSettings
from services.training.__main__ import TrainingSettings

ROOT = Path(__file__).resolve().parents[2]
KUBERNETES = ROOT / "deploy" / "kubernetes"
KUBECTL = Path(sys.executable).with_name("kubectl")  # the wheel's
MOUNT = "/run/secrets/esd"
COMPONENT = "app.kubernetes.io/component"
OPTIONAL = ("autoscaling", "tls", "network-policies", "keda", "monitoring")
FOREIGN = ("keda.sh/", "monitoring.coreos.com/")  # whose schemas Kubernetes does not have
SETTINGS: dict[str, list[Any]] = {
    "gateway": [GatewaySettings],
    "identity": [IdentitySettings],
    "models": [ModelsSettings, BlobSettings],
    "endpoints": [EndpointsSettings, ScalingPolicy, KubernetesSettings],
    "inference": [InferenceSettings, BlobSettings],
    "training": [TrainingSettings, BlobSettings],
}

# Compose makes the bucket in a container of its own.
COMPOSED = SETTINGS | {"bucket": [BlobSettings]}

Manifest = dict[str, Any]


def render(folder: Path) -> list[Manifest]:
    """The objects of a kustomization."""
    done = subprocess.run([KUBECTL, "kustomize", str(folder)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return [found for found in yaml.load_all(done.stdout, yaml.CSafeLoader) if found]


def combinations(extras: Iterable[tuple[str, ...]]) -> Iterator[tuple[str, ...]]:
    """One component of each kind that is needed, in every way, with each of these choices of optional ones."""
    for parts, workers, extra in itertools.product(
        ("trial-parts", "external-parts"), ("workers-cpu", "workers-gpu"), extras
    ):
        yield parts, workers, *extra


@pytest.fixture(
    scope="module",
    params=[
        pytest.param([OPTIONAL], id="all of them"),
        pytest.param(
            [extra for number in range(3) for extra in itertools.combinations(OPTIONAL, number)],
            id="any two of them",  # what gets in each other's way does so in pairs
            marks=[pytest.mark.slow, pytest.mark.timeout(900)],
        ),
    ],
)
def rendered(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Manifest]]:
    """The objects of both overlays, and of combinations of components."""
    copy = tmp_path_factory.mktemp("deploy") / "kubernetes"
    shutil.copytree(KUBERNETES, copy, ignore=shutil.ignore_patterns("*.py", "__pycache__"))
    for components in combinations(request.param):
        overlay = copy / "overlays" / "-".join(components)
        overlay.mkdir()
        content = {
            "apiVersion": "kustomize.config.k8s.io/v1beta1",
            "kind": "Kustomization",
            "resources": ["../../base", "../../workers"],
            "components": [f"../../components/{name}" for name in components],
        }
        (overlay / "kustomization.yaml").write_text(yaml.safe_dump(content))
    overlays = sorted((copy / "overlays").iterdir())
    with ThreadPoolExecutor(2) as pool:
        return {overlay.name: objects for overlay, objects in zip(overlays, pool.map(render, overlays), strict=True)}


@pytest.fixture(scope="module")
def secrets(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Manifest]:
    """The Secrets that make_secrets prints, by name."""
    home = Home(tmp_path_factory.mktemp("home"))
    files = make_secrets(home, DATABASE_URL, S3_ACCESS_KEY, home.s3_secret_key)
    return {f"esd-{name}": manifest(name, content, "esd") for name, content in files.items()}


def workloads(objects: list[Manifest]) -> list[Manifest]:
    """What has pods."""
    return [found for found in objects if found["kind"] in {"Deployment", "StatefulSet"}]


def test_what_is_rendered_is_valid_for_the_three_newest_versions(
    rendered: dict[str, list[Manifest]], secrets: dict[str, Manifest], monkeypatch: pytest.MonkeyPatch
) -> None:
    utils = kubernetes_validate.utils
    monkeypatch.setattr(utils, "schema_contents", functools.cache(utils.schema_contents))  # it reads 1 MB per object
    objects = [found for every in rendered.values() for found in every] + list(secrets.values())
    distinct = {json.dumps(found, sort_keys=True): found for found in objects}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of its own use of jsonschema
        versions = utils.all_versions()[-3:]
        own = [found for found in distinct.values() if not found["apiVersion"].startswith(FOREIGN)]
        for version, found in itertools.product(versions, own):
            kubernetes_validate.validate(found, version, strict=True)


def test_nothing_runs_as_root_or_can_write_to_its_own_files_or_ignores_sigterm(
    rendered: dict[str, list[Manifest]],
) -> None:
    for found in workloads([found for every in rendered.values() for found in every]):
        pod = found["spec"]["template"]["spec"]
        assert pod["securityContext"]["runAsNonRoot"]
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        assert pod.get("shareProcessNamespace") or found["metadata"]["name"] == "postgres"
        assert pod["automountServiceAccountToken"] == (found["metadata"]["name"] == "endpoints")
        for container in (*pod["containers"], *pod.get("initContainers", ())):
            assert container["securityContext"]["readOnlyRootFilesystem"]
            assert not container["securityContext"]["allowPrivilegeEscalation"]
            assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
            assert ":" in container["image"], "an image without a version"
            assert container["resources"]["limits"]["memory"]


def test_selectors_find_pods_and_names_find_objects(
    rendered: dict[str, list[Manifest]], secrets: dict[str, Manifest]
) -> None:
    for objects in rendered.values():
        labels = [found["spec"]["template"]["metadata"]["labels"].items() for found in workloads(objects)]
        for service in (found for found in objects if found["kind"] == "Service"):
            assert any(service["spec"]["selector"].items() <= of_pod for of_pod in labels), service
        names = {(found["kind"], found["metadata"]["name"]) for found in objects}
        for found in objects:
            if found["kind"] == "HorizontalPodAutoscaler":
                assert ("Deployment", found["spec"]["scaleTargetRef"]["name"]) in names
        for found in workloads(objects):
            for source in sources_of(found):
                if "secret" in source:
                    name = source["secret"].get("name") or source["secret"]["secretName"]
                    assert name in secrets or name == "esd-tls"
                elif "configMap" in source:
                    assert ("ConfigMap", source["configMap"]["name"]) in names


def sources_of(workload: Manifest) -> Iterator[Manifest]:
    """Where the volumes of its pods come from."""
    for volume in workload["spec"]["template"]["spec"]["volumes"]:
        yield from volume.get("projected", {}).get("sources", [volume])


def test_keda_finds_the_certificates_that_the_inference_service_asks_for(
    rendered: dict[str, list[Manifest]], secrets: dict[str, Manifest]
) -> None:
    objects = next(objects for name, objects in rendered.items() if "keda" in name)
    (authentication,) = (found for found in objects if found["kind"] == "TriggerAuthentication")
    for source in authentication["spec"]["secretTargetRef"]:
        assert source["key"] in secrets[source["name"]]["data"]
    config = next(found for found in objects if found["metadata"]["name"].startswith("esd-settings"))["data"]
    inference = next(found for found in workloads(objects) if found["metadata"]["name"] == "inference")
    (mount,) = (
        found["name"]
        for found in inference["spec"]["template"]["spec"]["containers"][0]["volumeMounts"]
        if found["mountPath"] == config["ESD_KEDA_CERTIFICATES"]
    )
    volumes = {found["name"]: found for found in inference["spec"]["template"]["spec"]["volumes"]}
    assert {"tls.crt", "tls.key", "ca.crt"} == set(secrets[volumes[mount]["secret"]["secretName"]]["data"])
    assert config["ESD_AUTOSCALER"] == "keda"


def test_prometheus_finds_the_certificates_that_the_gateway_asks_for(
    rendered: dict[str, list[Manifest]], secrets: dict[str, Manifest]
) -> None:
    objects = next(objects for name, objects in rendered.items() if "monitoring" in name)
    (monitor,) = (found for found in objects if found["kind"] == "ServiceMonitor")
    (endpoint,) = monitor["spec"]["endpoints"]
    service = next(found for found in objects if (found["kind"], found["metadata"]["name"]) == ("Service", "gateway"))
    assert monitor["spec"]["selector"]["matchLabels"].items() <= service["metadata"]["labels"].items()
    assert endpoint["port"] in {port["name"] for port in service["spec"]["ports"]}
    tls = endpoint["tlsConfig"]
    for source in (tls["ca"]["secret"], tls["cert"]["secret"], tls["keySecret"]):
        assert source["key"] in secrets[source["name"]]["data"]
    certificate = x509.load_pem_x509_certificate(base64.b64decode(secrets["esd-metrics"]["data"]["tls.crt"]))
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert tls["serverName"] in names.get_values_for_type(x509.DNSName)


def test_the_patch_in_the_readme_opens_the_port_of_a_store_to_all_who_ask_it(tmp_path: Path) -> None:
    shutil.copytree(KUBERNETES, tmp_path / "k", ignore=shutil.ignore_patterns("*.py", "__pycache__"))
    (patch,) = re.findall(r"```yaml\n(patches:.*?)```", (KUBERNETES / "README.md").read_text(), re.DOTALL)
    overlay = tmp_path / "k" / "overlays" / "mine"
    overlay.mkdir()
    (overlay / "kustomization.yaml").write_text(f"resources: [../production]\n{patch}")
    opened = {
        (policy["metadata"]["namespace"], json.dumps(policy["spec"]["podSelector"]))
        for policy in render(overlay)
        if policy["kind"] == "NetworkPolicy"
        for rule in policy["spec"].get("egress", ())
        if {"port": 9000} in rule["ports"] and any("ipBlock" in peer for peer in rule.get("to", ()))
    }
    askers = {"matchExpressions": [{"key": COMPONENT, "operator": "In", "values": ["service", "gateway"]}]}
    assert opened == {("esd", json.dumps(askers)), ("esd-workers", "{}")}


def test_the_gateway_refuses_requests_long_before_its_memory_is_at_the_pods_limit(
    rendered: dict[str, list[Manifest]],
) -> None:
    for objects in rendered.values():
        (gateway,) = (found for found in workloads(objects) if found["metadata"]["name"] == "gateway")
        (container,) = gateway["spec"]["template"]["spec"]["containers"]
        assert container["resources"]["limits"]["memory"] == "2Gi"
        assert "ESD_MAX_HEAP_BYTES" not in {variable["name"] for variable in container["env"]}
        assert GatewaySettings.model_fields["max_heap_bytes"].default * 2 == 2 << 30


def test_the_gateway_is_given_the_time_in_which_it_ends(rendered: dict[str, list[Manifest]]) -> None:
    for objects in rendered.values():
        (gateway,) = (found for found in workloads(objects) if found["metadata"]["name"] == "gateway")
        pod = gateway["spec"]["template"]["spec"]
        environment = {entry["name"]: entry["value"] for entry in pod["containers"][0]["env"]}
        bound = int(environment["ESD_LINGER_SECONDS"]) + int(environment["ESD_STOP_SECONDS"])
        assert bound < pod["terminationGracePeriodSeconds"]


@pytest.mark.parametrize("overlay", ["local", "production"])
@pytest.mark.parametrize("process", SETTINGS)
def test_each_process_accepts_the_settings_and_secrets_that_it_gets(
    rendered: dict[str, list[Manifest]],
    secrets: dict[str, Manifest],
    overlay: str,
    process: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    objects = rendered[overlay]
    workload = next(found for found in workloads(objects) if found["metadata"]["name"] == process)
    for source in sources_of(workload):
        for name, content in secrets.get(source.get("secret", {}).get("name", ""), {}).get("data", {}).items():
            (tmp_path / name).write_bytes(base64.b64decode(content))
    config = next(found for found in objects if found["metadata"]["name"].startswith("esd-settings"))
    container = workload["spec"]["template"]["spec"]["containers"][0]
    environment = config["data"] | {entry["name"]: entry["value"] for entry in container.get("env", ())}
    mapped = {
        name: value.replace(f"{MOUNT}/", f"{tmp_path}/") if value != MOUNT else str(tmp_path)
        for name, value in environment.items()
    }
    accept(process, mapped, monkeypatch)


def accept(process: str, environment: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Loads the settings of a process from this environment and no other, and looks for the files that they name."""
    for name in [name for name in os.environ if name.startswith("ESD_")]:
        monkeypatch.delenv(name)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    for settings in COMPOSED[process]:
        if settings is KubernetesSettings and environment["ESD_CLUSTER"] != "kubernetes":
            continue
        loaded = load(settings)
        files = {name: value for name, value in loaded if name.endswith("_file") and value is not None}
        missing = [name for name, path in files.items() if not path.exists() and path.parent.name != "esd-tls"]
        assert not missing, f"{process} gets no file for {missing}"
        if isinstance(loaded, GatewaySettings):
            refuse_open_door(loaded)


@pytest.mark.parametrize("process", COMPOSED)
def test_each_container_of_compose_accepts_the_settings_and_secrets_that_it_gets(
    process: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = Home(tmp_path / "home")
    write(tmp_path / "secrets", make_secrets(home, DATABASE_URL, S3_ACCESS_KEY, home.s3_secret_key))
    services = yaml.safe_load((ROOT / "deploy" / "docker" / "compose.yaml").read_text())["services"]
    environment = {name: str(value) for name, value in services[process]["environment"].items()}
    for volume in services[process]["volumes"]:
        source, target, *_ = volume.split(":")
        place = str(tmp_path / source) if source.startswith("./") else str(tmp_path / "volumes" / source)
        for name, value in environment.items():
            if value == target or value.startswith(f"{target}/"):
                environment[name] = place + value.removeprefix(target)
    accept(process, environment, monkeypatch)


def test_pods_are_spread_by_labels_that_an_api_server_takes(rendered: dict[str, list[Manifest]]) -> None:
    """A label of `matchLabelKeys` may not stand in the selector too, and pods must have those that are selected by."""
    spread = [
        (found["spec"]["template"], rule)
        for objects in rendered.values()
        for found in workloads(objects)
        for rule in found["spec"]["template"]["spec"].get("topologySpreadConstraints", ())
    ]
    assert spread
    for template, rule in spread:
        selected = {one["key"] for one in rule["labelSelector"]["matchExpressions"]}
        assert not selected & set(rule["matchLabelKeys"])
        assert selected <= template["metadata"]["labels"].keys()


def test_secrets_beside_the_sources_get_into_no_image(tmp_path: Path) -> None:
    """Compose's lie where its images are built from. Docker may not take them, nor what builds the wheel there, which
    has no .gitignore that would tell it."""
    assert "deploy/docker/secrets" in (ROOT / ".dockerignore").read_text().splitlines()
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    left_out = WheelBuilder(str(tmp_path)).config.exclude_spec
    assert left_out is not None
    assert left_out.match_file("deploy/docker/secrets/identity/signing-key.pem")
    assert not left_out.match_file("deploy/docker/compose.yaml")


def test_a_folder_of_settings_that_is_not_there_stops_the_process(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("ESD_SETTINGS_DIR", "/no/such/folder")
    with pytest.raises(SystemExit):
        load(BlobSettings)
    assert capsys.readouterr().err == "setting ESD_SETTINGS_DIR: /no/such/folder is not a folder\n"


def test_the_same_home_gives_the_same_secrets(tmp_path: Path) -> None:
    first, second = (make_secrets(Home(tmp_path), DATABASE_URL, "key", "secret") for _ in range(2))
    assert first == second


def test_what_compose_mounts_is_made(secrets: dict[str, Manifest]) -> None:
    file = ROOT / "deploy" / "docker" / "compose.yaml"
    for name, service in yaml.safe_load(file.read_text())["services"].items():
        for source in (volume.partition(":")[0] for volume in service.get("volumes", ())):
            if source.startswith("./secrets/"):
                assert f"esd-{source.removeprefix('./secrets/')}" in secrets, name
            elif source.startswith("."):
                assert (file.parent / source).exists(), name


def test_compose_ends_workers_before_what_they_dial() -> None:
    """Whoever depends on another ends before it; workers run in the container of endpoints."""
    services = yaml.safe_load((ROOT / "deploy" / "docker" / "compose.yaml").read_text())["services"]
    waiting, ends_after = ["endpoints"], set[str]()
    while waiting:
        found = set(services[waiting.pop()].get("depends_on", ())) - ends_after
        ends_after |= found
        waiting += found
    assert ends_after == services.keys() - {"endpoints"}


def test_who_follows_the_readme_has_the_namespaces_of_all_secrets_before_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["make_secrets", "--home", str(tmp_path / "home")])
    main()
    items = json.loads(capsys.readouterr().out)["items"]
    before_them = (KUBERNETES / "README.md").read_text().partition("-f secrets.json")[0]
    files = re.findall(r"-f (deploy/\S+)", before_them)
    there = {yaml.safe_load((ROOT / file).read_text())["metadata"]["name"] for file in files}
    assert {item["metadata"]["namespace"] for item in items} <= there
