"""Jobs at once in the engine's core against the same jobs one by one in a diffusers pipeline: throughput, and latency
under a load that one by one cannot bear.

    python -m tests.bench.batching [--steps N] [--repeats N] [--arrivals N]

Both run a tiny Stable Diffusion 1.5 with random weights in the same process on one thread of the CPU, from prompt to
pixels. Figures are the medians of alternating repeats. The last table says which part of a tick is not the UNet.
"""

from __future__ import annotations

import argparse
import random
import statistics
import tempfile
import threading
import time
import warnings
from collections import deque
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
)
from rich.console import Console
from rich.table import Table

from gpu_worker.devices import Cpu
from gpu_worker.engine.core import Core
from gpu_worker.engine.run import Produced, Run
from gpu_worker.engine.settings import EngineSettings
from gpu_worker.files.cache import CachedModel
from gpu_worker.models import tiny, weights
from services.common.payloads import Generation
from tests.gpu_worker.driving import changed, txt2img_of
from tests.gpu_worker.reference import BETAS, pipeline_of

# By their names here, as diffusers has them.
SAMPLERS: dict[str, Callable[..., Any]] = {
    "Euler": EulerDiscreteScheduler,
    "Euler a": EulerAncestralDiscreteScheduler,
    "DPM++ 2M Karras": partial(DPMSolverMultistepScheduler, use_karras_sigmas=True),
    "DDIM": DDIMScheduler,
}
# Pixels of a side, jobs, and the ratio that the project wants.
CASES = ((64, 1, 0.0), (64, 2, 0.0), (64, 4, 0.0), (64, 8, 0.0), (64, 16, 3.5), (128, 8, 2.0))
# Jobs come in two lengths, so much faster than they can be done one by one.
MIXED_STEPS = (12, 24)
LOAD = 1.2
# What the project wants of the engine's mean latency, of that one by one.
LATENCY_RATIO = 0.3
console = Console(width=110)


class TimedCore(Core):
    """Knows how long ticks took, and the UNet in them."""

    tick_seconds = 0.0
    unet_seconds = 0.0
    num_ticks = 0

    def _tick(self) -> bool:
        began = time.perf_counter()
        has_ticked = super()._tick()
        self.tick_seconds += time.perf_counter() - began
        self.num_ticks += 1
        return has_ticked

    def watch(self, unet: Any) -> None:
        """Counts the time of a UNet."""
        forward = unet.forward

        def timed(*arguments: Any, **options: Any) -> Any:
            began = time.perf_counter()
            try:
                return forward(*arguments, **options)
            finally:
                self.unet_seconds += time.perf_counter() - began

        unet.forward = timed


def at_once(core: Core, model: CachedModel, requests: list[Generation]) -> float:
    """Seconds until the last of the jobs, which come together, has its pixels."""
    outcomes: list[Any] = []
    began = time.perf_counter()
    for index, request in enumerate(requests):
        core.add(Run(str(index), request, [model], lambda: None, lambda _: None, outcomes.append))
    while len(outcomes) < len(requests):
        core.work()
    seconds = time.perf_counter() - began
    failed = [outcome for outcome in outcomes if not isinstance(outcome, Produced)]
    if failed:
        raise failed[0]
    return seconds


def one_by_one(pipeline: Any, requests: list[Generation]) -> float:
    """Seconds of the same jobs in the pipeline."""
    began = time.perf_counter()
    for request in requests:
        draw(pipeline, request)
    return time.perf_counter() - began


def draw(pipeline: Any, request: Generation) -> None:
    """A job in the pipeline."""
    pipeline.scheduler = SAMPLERS[request.sampler_name](**BETAS)
    pipeline(
        request.prompt,
        negative_prompt=request.negative_prompt,
        num_inference_steps=request.steps,
        guidance_scale=request.cfg_scale,
        width=request.width,
        height=request.height,
        generator=torch.Generator().manual_seed(request.seed),
        output_type="np",
    )


def jobs(size: int, num_jobs: int, steps: int) -> list[Generation]:
    """Jobs that differ in prompt, seed and sampler."""
    base = txt2img_of(negative_prompt="blurry", steps=steps, width=size, height=size)
    return [
        changed(base, prompt=f"picture {index}", seed=index, sampler_name=list(SAMPLERS)[index % len(SAMPLERS)])
        for index in range(num_jobs)
    ]


def loaded_core(model: CachedModel) -> TimedCore:
    """A core that has the model in memory."""
    loaded = threading.Event()
    core = TimedCore(Cpu(), EngineSettings(), loaded.set)
    core.add(Run("first", jobs(64, 1, 1)[0], [model], lambda: None, lambda _: None, lambda _: None))
    core.work()
    loaded.wait()
    while not core.is_idle or not core.warm_models:
        core.work()
    return core


def throughput(core: Core, model: CachedModel, pipeline: Any, steps: int, repeats: int) -> Table:
    """The first table."""
    table = Table("pixels", "jobs", "one by one", "at once", "ratio", "target", title=f"Jobs of {steps} steps, guided")
    for size, num_jobs, target in CASES:
        requests = jobs(size, num_jobs, steps)
        pairs = [(one_by_one(pipeline, requests), at_once(core, model, requests)) for _ in range(repeats)]
        single, together = (statistics.median(column) for column in zip(*pairs, strict=True))
        ratio = statistics.median(one / other for one, other in pairs)
        table.add_row(
            f"{size}x{size}",
            str(num_jobs),
            f"{num_jobs / single:.2f} jobs/s",
            f"{num_jobs / together:.2f} jobs/s",
            f"{ratio:.2f}",
            f">= {target}" if target else "",
        )
    return table


def in_order_of_arrival(pipeline: Any, arrivals: list[tuple[float, Generation]]) -> list[float]:
    """Seconds of each job from its arrival to its pixels: first come, first served."""
    began, found = time.perf_counter(), []
    for arrival, request in arrivals:
        time.sleep(max(0.0, began + arrival - time.perf_counter()))
        draw(pipeline, request)
        found.append(time.perf_counter() - began - arrival)
    return found


def as_they_come(core: Core, model: CachedModel, arrivals: list[tuple[float, Generation]]) -> list[float]:
    """The same in the engine, where they join those that are there."""
    began, found, coming = time.perf_counter(), [], deque(arrivals)

    def come(arrival: float, request: Generation) -> None:
        def end(outcome: Any) -> None:
            if not isinstance(outcome, Produced):
                raise outcome
            found.append(time.perf_counter() - began - arrival)

        core.add(Run(f"at {arrival}", request, [model], lambda: None, lambda _: None, end))

    while len(found) < len(arrivals):
        if core.is_idle and coming and len(found) + len(coming) == len(arrivals):
            time.sleep(max(0.0, began + coming[0][0] - time.perf_counter()))
        while coming and began + coming[0][0] <= time.perf_counter():
            come(*coming.popleft())
        core.work()
    return found


def latency(core: Core, model: CachedModel, pipeline: Any, num_jobs: int) -> Table:
    """The second table. What one by one can do is measured first; jobs arrive as a Poisson process."""
    requests = [
        changed(request, steps=MIXED_STEPS[index // len(SAMPLERS) % 2])
        for index, request in enumerate(jobs(64, num_jobs, MIXED_STEPS[0]))
    ]
    seconds_each = one_by_one(pipeline, requests[:16]) / 16
    chance, arrival, arrivals = random.Random(0), 0.0, []
    for request in requests:
        arrivals.append((arrival, request))
        arrival += chance.expovariate(LOAD / seconds_each)
    single, together = in_order_of_arrival(pipeline, arrivals), as_they_come(core, model, arrivals)
    steps = " and ".join(map(str, MIXED_STEPS))
    title = f"{num_jobs} jobs of {steps} steps, 64x64, arriving at {LOAD} times what one by one can do"
    table = Table("seconds from arrival", "mean", "longest", "target", title=title)
    table.add_row("first come, first served", f"{statistics.mean(single):.2f}", f"{max(single):.2f}", "")
    table.add_row("in the engine", f"{statistics.mean(together):.2f}", f"{max(together):.2f}", "")
    ratio = statistics.mean(together) / statistics.mean(single)
    table.add_row("ratio", f"{ratio:.2f}", "", f"<= {LATENCY_RATIO}")
    return table


def overhead(core: TimedCore, model: CachedModel, steps: int) -> Table:
    """The last table."""
    table = Table("sampler", "tick", "outside the UNet", "share", "target", title="A tick of 8 guided jobs, 64x64")
    core.watch(core.here[0].models.unet)
    for sampler in ("Euler", "Euler a", "DPM++ 2M Karras", "UniPC"):
        core.tick_seconds = core.unet_seconds = core.num_ticks = 0
        at_once(core, model, [changed(request, sampler_name=sampler) for request in jobs(64, 8, steps)])
        outside = core.tick_seconds - core.unet_seconds
        table.add_row(
            sampler,
            f"{1e3 * core.tick_seconds / core.num_ticks:.1f} ms",
            f"{1e3 * outside / core.num_ticks:.2f} ms",
            f"{100 * outside / core.tick_seconds:.1f} %",
            "<= 10 %",
        )
    return table


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--arrivals", type=int, default=100, help="jobs whose latency is measured")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")  # of diffusers, about NumPy 2
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "tiny.safetensors"
        tiny.write(path)
        model = CachedModel("tiny", "Stable-diffusion", path.name, path, "")
        core = loaded_core(model)
        pipeline = pipeline_of(path, weights.tokenizer("<|endoftext|>"), Path(folder))
        one_by_one(pipeline, jobs(64, 1, 2))
        console.print(throughput(core, model, pipeline, arguments.steps, arguments.repeats))
        console.print(latency(core, model, pipeline, arguments.arrivals))
        console.print(overhead(core, model, arguments.steps))
        core.close()


if __name__ == "__main__":
    main()
