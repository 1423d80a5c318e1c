"""`make bench`: starts the stack in a folder of its own, measures, and prints the tables that the README quotes.

    python -m tests.bench [startup] [get] [jobs] [watchers] [endpoints] [trainings]
                          [--jobs N] [--watchers N]

Figures are medians and percentiles of one run; the machine's name and load belong to them.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import datetime
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import psutil
from rich.console import Console
from rich.table import Table

from deploy.local.demo import Client, Picture, deploy, upload
from deploy.local.stack import Stack
from tests.bench import endpoints, trainings, watchers

console = Console(width=110)
TIME_FORMAT = "%Y-%m-%d %H:%M:%S.%f"


def percentile(values: list[float], percent: int) -> float:
    """The value below which so many percent of the values lie."""
    return sorted(values)[min(len(values) - 1, len(values) * percent // 100)]


def row(table: Table, name: str, values: list[float], unit: str, target: str = "") -> None:
    """Adds median, 99th percentile and number of values."""
    table.add_row(
        name, f"{statistics.median(values):.1f}", f"{percentile(values, 99):.1f}", unit, str(len(values)), target
    )


def new_table(title: str) -> Table:
    """A table for rows of `row`."""
    table = Table(title=title, title_justify="left")
    for column in ("what", "p50", "p99", "unit", "n", "target"):
        table.add_column(column, justify="left" if column in {"what", "unit", "target"} else "right")
    return table


def pss_megabytes(stack: Stack) -> dict[str, float]:
    """Proportional memory of each process of the stack, its children included."""
    sizes = {"launcher": psutil.Process(stack.launcher_pid).memory_full_info().pss / 2**20}
    for name, pid in stack.processes().items():
        process = psutil.Process(pid)
        family = [process, *process.children(recursive=True)]
        sizes[name] = sum(member.memory_full_info().pss for member in family) / 2**20
    return sizes


def bench_startup(home: Path) -> None:
    """Time from the start to the ready line, warm, and memory at rest."""
    seconds = []
    sizes: dict[str, float] = {}
    for _ in range(4):
        began = time.monotonic()
        stack = Stack(home)
        stack.start()
        seconds.append(time.monotonic() - began)
        sizes = pss_megabytes(stack)
        stack.stop()
    table = new_table("Start and memory")
    row(table, "start to ready, warm", seconds[1:], "s", "p50 ≤ 15")
    table.add_row("memory of the stack without worker (PSS)", f"{sum(sizes.values()):.0f}", "", "MB", "1", "≤ 900")
    for name, size in sizes.items():
        table.add_row(f"  {name}", f"{size:.0f}", "", "MB", "1", "")
    console.print(table)


def prepare(stack: Stack, folder: Path) -> tuple[Client, str]:
    """A client with an Async endpoint in service and a model; answers the client and the model's name."""
    checkpoint = folder / "bench.safetensors"
    if not checkpoint.exists():
        subprocess.run([sys.executable, "-m", "gpu_worker.models.tiny", str(checkpoint)], check=True)
    admin = Client(stack.url, stack.api_key)
    admin.call("POST", "/roles", {"role_name": "demo", "permissions": ["inference:all"]})
    upload(admin, checkpoint, console, 64 * 2**20)
    for endpoint in admin.call("GET", "/endpoints", limit="-1")["endpoints"]:
        admin.call("DELETE", "/endpoints", {"endpoint_name_list": [endpoint["endpoint_name"]]})
    body = {"username": "bench", "password": os.urandom(8).hex(), "roles": ["demo", "IT Operator"]}
    admin.call("POST", "/users", body)
    client = Client(stack.url, admin.call("POST", "/keys", {"username": "bench"})["key"])
    deploy(client, "Async", console)
    return client, checkpoint.name


def one_job(client: Client, model: str, picture: Picture) -> dict[str, Any]:
    """Runs one Async job and answers it when it has ended."""
    body = {"task_type": "txt2img", "inference_type": "Async", "models": {"Stable-diffusion": [model]}}
    created = client.call("POST", "/inferences", body)["inference"]
    client.put_json(created["api_params_s3_upload_url"], picture.payload())
    client.call("PUT", f"/inferences/{created['id']}/start")
    while (job := client.call("GET", f"/inferences/{created['id']}"))["status"] == "inprogress":
        time.sleep(0.03)
    if job["status"] != "succeed":
        raise SystemExit(f"a job failed: {job['sagemakerRaw']}")
    return job


def milliseconds(begin: str, end: str) -> float:
    """Between two of the job's own timestamps."""
    return (datetime.strptime(end, TIME_FORMAT) - datetime.strptime(begin, TIME_FORMAT)).total_seconds() * 1000


def bench_jobs(client: Client, model: str, number: int) -> None:
    """Time that the platform adds to a job: from submit to succeed, less the time inside the pipeline."""
    picture = Picture("a red circle", 64, 64, steps=4)
    for _ in range(3):
        one_job(client, model, picture)
    jobs = [one_job(client, model, picture) for _ in range(number)]
    timings = [job["params"]["timings"] for job in jobs]
    pipeline = [1000 * each["pipeline_seconds"] for each in timings]
    added = [
        milliseconds(each["submit_time"], each["complete_time"]) - inside
        for each, inside in zip(timings, pipeline, strict=True)
    ]
    table = new_table(f"Time added by the platform: {number} Async jobs one at a time, warm tiny model")
    row(table, "added (submit to succeed less pipeline)", added, "ms", "p50 ≤ 150, p99 ≤ 500")
    store = {
        "payload_seconds": "GET of the payload",
        "fetch_seconds": "the worker's downloads",
        "upload_seconds": "the worker's uploads",
        "check_seconds": "HEAD of the results",
    }
    stored = [1000 * sum(each[name] for name in store) for each in timings]
    row(table, "  of which the object store", stored, "ms")
    for name, words in store.items():
        row(table, f"    {words}", [1000 * each[name] for each in timings], "ms")
    own = [all_of_it - part for all_of_it, part in zip(added, stored, strict=True)]
    row(table, "  of which the platform's own", own, "ms", "p50 ≤ 30, p99 ≤ 120")
    for name, words in {"load_seconds": "loading the model", "encode_seconds": "encoding PNG and JSON"}.items():
        row(table, f"    {words}", [1000 * each[name] for each in timings], "ms")
    row(table, "pipeline", pipeline, "ms")
    console.print(table)


def bench_get(stack: Stack, client: Client, model: str) -> None:
    """Latency of reading a finished job through the gateway at one connection."""
    job = one_job(client, model, Picture("a red circle", 64, 64, steps=1))
    path = f"/inferences/{job['InferenceJobId']}"
    # The standard library's client, because a comfortable one takes as long as half of the request.
    connection = HTTPConnection(stack.url.removeprefix("http://"))
    values: list[float] = []
    for index in range(1100):
        began = time.perf_counter()
        connection.request("GET", path, headers={"x-api-key": stack.api_key})
        response = connection.getresponse()
        response.read()
        if response.status != 200:
            raise SystemExit(f"GET {path} answers {response.status}")
        if index >= 100:
            values.append(1000 * (time.perf_counter() - began))
    table = new_table("GET /inferences/{id} through Envoy, authenticated, from the database")
    row(table, "one connection", values, "ms", "p50 ≤ 6")
    console.print(table)


def bench_events(folder: Path, number: int, http2: bool) -> None:
    """Delivery of jobs' events to watchers, and the memory that a watcher takes, beside a worker that only tells."""
    stack = Stack(folder / f"watched{int(http2)}", env_overrides=watchers.SETTINGS)
    stack.start()
    try:
        client, model = prepare(stack, folder)
        job_ids = watchers.start_jobs(client, model, number)
        values, memory = watchers.bench_watchers(stack, stack.api_key, job_ids, lambda: pss_megabytes(stack), http2)
    finally:
        stack.stop()
    if not http2:  # there httpx lets each stream wait for its neighbours' next event
        table = new_table(f"Events of {number} jobs at 2 a second each, a watcher on each, through Envoy")
        row(table, "from the worker's word to the watcher", values, "ms", "p99 ≤ 250")
        console.print(table)
    console.print(memory)


def bench_endpoints(home: Path, folder: Path) -> None:
    """How long endpoints take to start and to grow from zero, and a round of the control loop."""
    stack = Stack(home, env_overrides={"ESD_SCALE_IN_SECONDS": "0"})
    stack.start()
    try:
        client, model = prepare(stack, folder)
        for endpoint in client.call("GET", "/endpoints", limit="-1")["endpoints"]:
            client.call("DELETE", "/endpoints", {"endpoint_name_list": [endpoint["endpoint_name"]]})
        picture = Picture("a red circle", 64, 64, steps=4)
        started, grown = endpoints.start_and_growth(client, lambda: one_job(client, model, picture))
    finally:
        stack.stop()
    table = new_table("Endpoints: a tiny model on the CPU")
    row(table, "create to InService", started, "s", "p50 ≤ 20")
    row(table, "no worker to first picture", grown, "s", "p50 ≤ 25")
    words = f"round of the control loop, {endpoints.NUM_ENDPOINTS} endpoints"
    row(table, words, endpoints.rounds(), "ms", "p50 ≤ 200")
    console.print(table)


def bench_trainings(home: Path, folder: Path) -> None:
    """How soon a training takes its first step."""
    stack = Stack(home)
    stack.start()
    try:
        client, model = prepare(stack, folder)
        heard = trainings.first_steps(stack, client, model)
    finally:
        stack.stop()
    table = new_table("From POST /trainings to the first step: a tiny model on the CPU, a worker at rest beside it")
    row(table, "the trainer fetches its files", heard["Downloading"], "s")
    row(table, "it has them and loads the model", heard["Training"], "s")
    row(table, "the first step", heard["step"], "s", "p50 ≤ 20")
    console.print(table)


def main() -> None:
    """Runs the benchmarks named on the command line, or all."""
    parser = argparse.ArgumentParser(prog="make bench", description=__doc__.splitlines()[0])
    names = ["startup", "get", "jobs", "watchers", "endpoints", "trainings"]
    parser.add_argument("what", nargs="*", choices=[*names, []], help="default: all")
    parser.add_argument("--jobs", type=int, default=500, help="number of jobs (default 500)")
    parser.add_argument("--watchers", type=int, default=500, help="number of watchers (default 500)")
    options = parser.parse_args()
    chosen = options.what or names
    console.print(f"{platform.platform()}, {os.cpu_count()} cores, Python {platform.python_version()}")
    with tempfile.TemporaryDirectory(prefix="esd-bench-") as folder:
        Path(folder).chmod(0o711)  # PostgreSQL's user must get through, when root runs this
        home = Path(folder) / "home"
        if "startup" in chosen:
            bench_startup(home)
        if {"get", "jobs"} & set(chosen):
            stack = Stack(home)
            stack.start()
            try:
                client, model = prepare(stack, Path(folder))
                if "get" in chosen:
                    bench_get(stack, client, model)
                if "jobs" in chosen:
                    bench_jobs(client, model, options.jobs)
            finally:
                stack.stop()
        if "watchers" in chosen:
            for http2 in (False, True):
                bench_events(Path(folder), options.watchers, http2)
        if "endpoints" in chosen:
            bench_endpoints(home, Path(folder))
        if "trainings" in chosen:
            bench_trainings(home, Path(folder))


if __name__ == "__main__":
    main()
