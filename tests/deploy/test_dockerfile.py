"""The images, built without Docker: every line of the Dockerfile is run in a clean folder that stands for the root.

`RUN` runs as the user who builds, here and there root; what `CMD` starts runs as the user of the image. Paths of the
image are mapped into the folder, since there is no other root file system. Packages are those of this machine's Debian,
with all that they depend on, since the folder has none of the base image's.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest

from tests.processes import ROOT

pytestmark = [
    pytest.mark.images,
    pytest.mark.timeout(2400),
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root, as a build of images does"),
]

DOCKERFILE = ROOT / "deploy" / "docker" / "Dockerfile"
# How packages are installed: nothing that is merely recommended, and the lists of all there are do not stay.
APT = re.compile(
    r"apt-get update && apt-get install --yes --no-install-recommends ([a-z0-9 -]+) && rm -r /var/lib/apt/lists/\*"
)
EXTENSION = """\
#include <Python.h>
static struct PyModuleDef module = {PyModuleDef_HEAD_INIT, "extension"};
PyMODINIT_FUNC PyInit_extension(void) { return PyModule_Create(&module); }
"""
# What each image is for: modules that its processes are started as (compose.yaml, deploy/kubernetes/base).
PROGRAMS = {
    "service": [f"services.{name}" for name in ("identity", "models", "endpoints", "inference", "training")],
    "gateway": ["gateway", "deploy.local.swift"],
    "gpu-worker": ["gpu_worker", "services.endpoints"],
}


@dataclass(frozen=True)
class Image:
    """A root file system, and how processes start in it."""

    root: Path
    workdir: str = "/"
    user: str = "0:0"
    environment: dict[str, str] = field(default_factory=dict)
    command: list[str] = field(default_factory=list)

    def here(self, path: str) -> Path:
        """Where a path of the image is on this machine."""
        return self.root / str(Path(self.workdir) / path).lstrip("/")

    def run(self, command: list[str], user: int | None = None) -> subprocess.CompletedProcess[str]:
        """Runs something in the image."""
        variables = {name: value.replace("/esd/", f"{self.root}/esd/") for name, value in self.environment.items()}
        self.here(".").mkdir(parents=True, exist_ok=True)
        return subprocess.run(
            command, cwd=self.here("."), env=variables, user=user, text=True, capture_output=True, check=False
        )


class Builder:
    """Builds the stages of a Dockerfile, as far as ours goes."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.images: dict[str, Image] = {}

    def build(self, dockerfile: str) -> None:
        """Runs all lines."""
        arguments: dict[str, str] = {}
        for instruction, rest in instructions(dockerfile):
            words = shlex.split(rest)
            match instruction:
                case "ARG":
                    name, _, value = rest.partition("=")
                    arguments[name] = value
                case "FROM":
                    base, _, stage = words
                    self._begin(stage, self.images.get(base) or self._python(base, arguments))
                case "WORKDIR":
                    self._set(workdir=rest)
                    self._image.here(".").mkdir(parents=True, exist_ok=True)
                case "ENV":
                    variables = dict(word.split("=", 1) for word in words)
                    before = self._image.environment
                    for name, value in variables.items():
                        variables[name] = value.replace("$PATH", before["PATH"])
                    self._set(environment=before | variables)
                case "USER":
                    self._set(user=rest)
                case "CMD":
                    self._set(command=[word.strip('",[]') for word in words])
                case "COPY":
                    self._copy(words)
                case "RUN" if packages := APT.fullmatch(rest):
                    self._install(packages[1].split())
                case "RUN":
                    mapped = re.sub(r"(?<=\s)/", f"{self._image.root}/", rest)
                    done = self._image.run(["/bin/sh", "-c", mapped])
                    assert done.returncode == 0, f"RUN {rest}\n{done.stdout}\n{done.stderr}"
                case other:
                    raise AssertionError(f"this test does not know what {other} does")

    def _install(self, packages: list[str]) -> None:
        """Unpacks packages into the root. Nothing of them is run, and this machine's own are left alone."""
        apt = self._folder / "apt"
        for folder in ("lists", "archives"):
            (apt / folder / "partial").mkdir(parents=True)
        (apt / "status").touch()
        places = f"Dir::Cache={apt} Dir::State::lists={apt}/lists Dir::State::status={apt}/status"
        get = ["apt-get", *(f"--option={place}" for place in places.split()), "--option=APT::Sandbox::User=root"]
        install = ["install", "--yes", "--no-install-recommends", "--download-only", *packages]
        for command in (["update"], install):
            subprocess.run([*get, *command], check=True, capture_output=True)
        for package in (apt / "archives").glob("*.deb"):
            subprocess.run(["dpkg-deb", "--extract", package, self._image.root], check=True)

    @property
    def _image(self) -> Image:
        return self.images[self._stage]

    def _set(self, **values: object) -> None:
        self.images[self._stage] = replace(self._image, **values)  # type: ignore[arg-type]

    def _begin(self, stage: str, base: Image) -> None:
        self._stage = stage
        root = self._folder / stage
        if base.root.exists():
            subprocess.run(["cp", "--archive", "--reflink=auto", base.root, root], check=True)
        else:
            root.mkdir()
        self.images[stage] = replace(base, root=root)

    def _python(self, base: str, arguments: dict[str, str]) -> Image:
        """The base image: a Python of this version, and the programs of Debian."""
        assert base == "${PYTHON}"
        version = re.match(r"python:(\d+\.\d+)", arguments["PYTHON"])
        assert version is not None
        binaries = self._folder / "python"
        binaries.mkdir(exist_ok=True)
        python = shutil.which(f"python{version[1]}") or sys.executable
        (binaries / "python").unlink(missing_ok=True)
        (binaries / "python").symlink_to(os.path.realpath(python))
        return Image(self._folder / "nothing", environment={"PATH": f"{binaries}:/usr/bin:/bin", "HOME": "/tmp"})

    def _copy(self, words: list[str]) -> None:
        source = Image(ROOT)
        if words[0].startswith("--from="):
            source = self.images[words.pop(0).removeprefix("--from=")]
            source = replace(source, workdir="/")
        *paths, target = words
        for path in paths:
            here = self._image.here(target)
            if source.here(path).is_dir():
                ignored = shutil.ignore_patterns("__pycache__") if source.root == ROOT else None
                shutil.copytree(source.here(path), here, symlinks=True, ignore=ignored, dirs_exist_ok=True)
            else:
                here.mkdir(parents=True, exist_ok=True)
                shutil.copy(source.here(path), here)


def instructions(dockerfile: str) -> Iterator[tuple[str, str]]:
    """The instructions of a Dockerfile."""
    for line in dockerfile.splitlines():
        if line.strip() and not line.startswith("#"):
            instruction, _, rest = line.partition(" ")
            assert not rest.endswith("\\"), "this test does not know lines that go on"
            yield instruction, rest.strip()


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Image]:
    folder = tmp_path_factory.mktemp("images")
    for parent in (folder, *folder.parents[:2]):
        parent.chmod(0o755)  # the image's user must get through, as it would in a container
    builder = Builder(folder)
    builder.build(DOCKERFILE.read_text())
    return builder.images


@pytest.mark.parametrize("target", PROGRAMS)
def test_every_line_builds_and_only_the_worker_has_something_to_build_with(
    images: dict[str, Image], target: str
) -> None:
    image = images[target]
    debian = {"etc", "lib", "lib64", "usr"} if target == "gpu-worker" else set()
    assert {path.name for path in image.root.iterdir()} == {"data", "esd", "tmp"} | debian
    assert [path.name for path in (image.root / "esd").iterdir()] == [".venv"]
    uid = int(image.user.partition(":")[0])
    assert uid != 0
    assert (image.root / "data").stat().st_uid == uid
    assert image.command[:2] == ["python", "-m"]
    assert image.command[2] in PROGRAMS[target]


@pytest.mark.parametrize("target", PROGRAMS)
def test_an_image_has_what_its_programs_import_and_only_the_worker_has_torch(
    images: dict[str, Image], target: str
) -> None:
    image = images[target]
    imports = "; ".join(
        f"import {program}.__main__" if _is_package(program) else f"import {program}" for program in PROGRAMS[target]
    )
    has_torch = "import importlib.util as util; print(util.find_spec('torch') is not None)"
    python = image.here("/esd/.venv/bin/python")
    # The image's user, unless this machine keeps its Python where only root can go.
    is_open = all(folder.stat().st_mode & 0o001 for folder in python.resolve().parents)
    uid = int(image.user.partition(":")[0]) if is_open else None
    done = image.run([str(python), "-I", "-c", f"{imports}; {has_torch}"], user=uid)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == str(target == "gpu-worker")


def test_a_worker_compiles_modules_of_python_as_triton_does(images: dict[str, Image]) -> None:
    image = images["gpu-worker"]
    python = str(image.here("/esd/.venv/bin/python"))
    headers = image.run([python, "-c", "import sysconfig; print(sysconfig.get_path('include'))"]).stdout.strip()
    # The base image brings them, with Python.
    shutil.copytree(headers, image.here(headers), dirs_exist_ok=True)
    image.here("/tmp/extension.c").write_text(EXTENSION)
    # The options of triton/runtime/build.py. In the root as its own, where it has no headers but the image's.
    compiler = ["gcc", "/tmp/extension.c", "-O3", "-shared", "-fPIC", f"-I{headers}", "-o", "/tmp/extension.so"]
    done = image.run(["/usr/sbin/chroot", str(image.root), *compiler])
    assert done.returncode == 0, done.stderr
    imported = Image(image.root, "/tmp", environment=image.environment).run([python, "-c", "import extension"])
    assert imported.returncode == 0, imported.stderr


def test_the_service_image_brings_every_migration(images: dict[str, Image]) -> None:
    (installed,) = (images["service"].root / "esd/.venv/lib").glob("python*/site-packages/services")
    there, here = (
        {file.relative_to(root) for file in root.rglob("migrations/versions/*.py")}
        for root in (installed, ROOT / "services")
    )
    assert there == here
    assert {file.parts[0] for file in here} == {"identity", "models", "endpoints", "inference", "training"}


def _is_package(module: str) -> bool:
    return (ROOT / module.replace(".", "/")).is_dir()
