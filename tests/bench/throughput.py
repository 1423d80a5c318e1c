"""Jobs per second end to end through the gateway, and where the CPU's time goes.

    python -m tests.bench.throughput [--jobs N] [--clients 32]

Clients create Real-time jobs with a `payload_string` of 2 KB, which stays in the row; the answer to a creation is the
ended job. A worker ends them at once: without objects, which takes a failure, or with a picture in the object store.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import aiohttp
import psutil
from rich.console import Console
from rich.table import Table

from deploy.local.demo import Client, upload
from deploy.local.stack import Stack
from tests.bench.instant_worker import REASON

_PAYLOAD_BYTES = 2048
_CASES = {"failed": "without objects", "objects": "with result objects"}
_TARGET = {"failed": "≥ 40 jobs/s", "objects": ""}
console = Console(width=110)


def cpu_seconds(stack: Stack) -> dict[str, float]:
    """CPU time by process of the stack, replicas and children included, and of this one."""
    seconds = {"this client": sum(psutil.Process().cpu_times()[:2])}
    for name, pid in stack.processes().items():
        seconds[name] = _of_family(psutil.Process(pid))
    for process in psutil.Process(stack.launcher_pid).children(recursive=True):
        if "tests.bench.instant_worker" in process.cmdline():
            seconds["worker"] = seconds.get("worker", 0.0) + sum(process.cpu_times()[:2])
    return seconds


def _of_family(process: psutil.Process) -> float:
    family = [process, *process.children(recursive=True)]
    return sum(sum(member.cpu_times()[:2]) for member in family if "instant_worker" not in " ".join(member.cmdline()))


def prepare(stack: Stack, folder: Path) -> tuple[str, str]:
    """A model and a Real-time endpoint in service; answers the key of a user who may use them, and the model's name."""
    checkpoint = folder / "bench.safetensors"
    subprocess.run([sys.executable, "-m", "gpu_worker.models.tiny", str(checkpoint)], check=True)
    admin = Client(stack.url, stack.api_key)
    permissions = ["checkpoint:all", "sagemaker_endpoint:all", "inference:all"]
    admin.call("POST", "/roles", {"role_name": "bench", "permissions": permissions})
    admin.call("POST", "/users", {"username": "bench", "password": "secret", "roles": ["bench"]})
    key: str = admin.call("POST", "/keys", {"username": "bench"})["key"]
    client = Client(stack.url, key)
    upload(client, checkpoint, console, 64 * 2**20)
    body = {"endpoint_name": "bench", "endpoint_type": "Real-time", "instance_type": "local"}
    body |= {"initial_instance_count": 1, "autoscaling_enabled": False, "assign_to_roles": ["bench"]}
    client.call("POST", "/endpoints", body)
    while any(item["endpoint_status"] != "InService" for item in client.call("GET", "/endpoints")["endpoints"]):
        time.sleep(0.1)
    client.close()
    admin.close()
    return key, checkpoint.name


async def submit_all(url: str, key: str, model: str, numbers: Iterator[int], latencies: list[float]) -> None:
    """One client: creates one job after the other until there are no more numbers."""
    async with aiohttp.ClientSession(headers={"x-api-key": key}) as http:
        for number in numbers:
            payload = {"prompt": f"job {number}", "steps": 1, "width": 64, "height": 64, "seed": number}
            payload["negative_prompt"] = "x" * (_PAYLOAD_BYTES - len(json.dumps(payload)) - 25)
            body = {"task_type": "txt2img", "inference_type": "Real-time", "models": {"Stable-diffusion": [model]}}
            began = time.perf_counter()
            async with http.post(f"{url}/inferences", json=body | {"payload_string": json.dumps(payload)}) as answer:
                text = await answer.text()
            if answer.status != 200 and REASON not in text:
                raise SystemExit(f"POST /inferences answers {answer.status}: {text}")
            latencies.append(1000 * (time.perf_counter() - began))


async def measure(stack: Stack, key: str, model: str, num_jobs: int, num_clients: int) -> tuple[float, list[float]]:
    """Seconds of so many jobs, and each one's milliseconds."""
    latencies: list[float] = []
    numbers = iter(range(num_jobs))
    began = time.perf_counter()
    await asyncio.gather(*(submit_all(stack.url, key, model, numbers, latencies) for _ in range(num_clients)))
    return time.perf_counter() - began, latencies


def bench(case: str, num_jobs: int, num_clients: int) -> None:
    """One stack, one table."""
    with tempfile.TemporaryDirectory(prefix="esd-bench-") as folder:
        Path(folder).chmod(0o711)  # PostgreSQL's user must get through, when root runs this
        command = [sys.executable, "-m", "tests.bench.instant_worker", case]
        with Stack(Path(folder) / "home", env_overrides={"ESD_WORKER_COMMAND": json.dumps(command)}) as stack:
            key, model = prepare(stack, Path(folder))
            asyncio.run(measure(stack, key, model, max(50, num_jobs // 10), num_clients))  # warm
            before = cpu_seconds(stack)
            seconds, latencies = asyncio.run(measure(stack, key, model, num_jobs, num_clients))
            spent = {name: value - before.get(name, 0.0) for name, value in cpu_seconds(stack).items()}
    console.print(_table(case, num_clients, seconds, sorted(latencies), spent))


def _table(case: str, num_clients: int, seconds: float, latencies: list[float], spent: dict[str, float]) -> Table:
    num_jobs = len(latencies)
    table = Table(title=f"{num_jobs} jobs of {num_clients} clients, {_CASES[case]}", title_justify="left")
    for column in ("what", "figure", "target"):
        table.add_column(column, justify="right" if column == "figure" else "left")
    table.add_row("throughput", f"{num_jobs / seconds:.1f} jobs/s", _TARGET[case])
    table.add_row("a job, p50", f"{latencies[num_jobs // 2]:.0f} ms")
    table.add_row("a job, p99", f"{latencies[num_jobs * 99 // 100]:.0f} ms", end_section=True)
    for name, value in sorted(spent.items(), key=lambda item: -item[1]):
        table.add_row(f"CPU of {name}", f"{1000 * value / num_jobs:.2f} ms/job")
    table.add_row("CPU of all", f"{1000 * sum(spent.values()) / num_jobs:.2f} ms/job")
    cores = os.cpu_count() or 1
    table.add_row("cores busy", f"{sum(spent.values()) / seconds:.2f} of {cores}")
    return table


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--jobs", type=int, default=2000)
    parser.add_argument("--clients", type=int, default=32)
    options: Any = parser.parse_args()
    for case in _CASES:
        bench(case, options.jobs, options.clients)


if __name__ == "__main__":
    main()
