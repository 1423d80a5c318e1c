"""What is measured: one function for each section, in the order of __main__.SECTIONS."""

from __future__ import annotations

import gc
import io
import json
import resource
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Generator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file

from gpu_worker import devices
from gpu_worker.engine.decoding import Decoded
from gpu_worker.engine.placed import Placed
from gpu_worker.engine.settings import EngineSettings
from gpu_worker.files.cache import CachedModel
from gpu_worker.models import ldm, prompt, weights
from gpu_worker.tasks import txt2img
from services.common.payloads import Generation
from tests.bench.gpu.child import Report
from tests.bench.gpu.driving import Clock, Driver, error, median_seconds
from tests.bench.gpu.models import file_of, models_of, parts_of, pipeline_of
from tests.bench.gpu.variants import measure_decoders, measure_unets
from tests.gpu_worker.driving import changed, txt2img_of
from tests.gpu_worker.reference import pipeline_latents

BATCHES = (1, 2, 4, 8, 16)
GB = 1e9


def sd15(report: Report) -> None:
    """SD1.5 at 512x512 in 50 steps, fp16."""
    plain = EngineSettings(precision="float16")
    forms = {"engine": (plain, (1, 8)), "compiled": (replace(plain, compiled=True), BATCHES)}
    speed(report, "sd15", 50, forms, pipeline_batches=(1, 8), target_seconds=0.6)


def sdxl(report: Report) -> None:
    """SDXL at 1024x1024 in 20 steps, bf16, beside the pipeline's fp16."""
    plain = EngineSettings(precision="bfloat16")
    compiled = replace(plain, compiled=True)
    forms = {
        "compiled": (compiled, BATCHES),
        "fp8": (replace(compiled, fp8=True), (1, 8, 16)),
        "engine": (plain, (1, 8)),
    }
    speed(report, "sdxl", 20, forms, pipeline_batches=(1, 4), target_rate=1.2)


def speed(
    report: Report,
    family: str,
    steps: int,
    forms: dict[str, tuple[EngineSettings, tuple[int, ...]]],
    pipeline_batches: tuple[int, ...],
    **targets: float,
) -> None:
    """Images a second and seconds of a job: the pipeline one by one and in batches of its own, and jobs at once in each
    form of the engine. `to_the_first` is how far a form's latents are from those of the first."""
    request = request_of(report, family, steps)
    alone = {}
    pipeline = pipeline_of(family, report.tiny, report.device, half(report))
    pipeline.vae.enable_slicing()
    pipelined(pipeline, request, 1, 2)
    for batch in pipeline_batches:
        seconds = min(pipelined(pipeline, request, batch, steps) for _ in range(2 if batch == 1 else 1))
        alone[batch] = seconds
        report.add(f"pipeline, {batch} at once", seconds=seconds, rate=batch / seconds)
    del pipeline
    clean(report)
    short = changed(request, steps=min(request.steps, 20))
    expected = None
    for form, (settings, batches) in forms.items():
        began = time.perf_counter()
        driver, model = driver_of(report, family, settings)
        ready = time.perf_counter() - began
        found = latents_of(driver, model, [short])[0]
        expected = found if expected is None else expected
        report.add(f"{form}, ready", seconds=ready, to_the_first=error(found, expected))
        for batch in batches:
            targeted = targets if batch in {1, 16} else {}
            measure = partial(at_once, driver, model, request, batch, alone, targeted)
            report.attempt(f"{form}, {batch} at once", measure, needs_seconds=10)
        for batch in (8, 1):
            report.attempt(f"{form}, a tick of {batch} jobs", partial(tick, driver, model, short, batch))
        report.add(f"{form}, graphs", num_graphs=len(driver.placed().graphs or ()), max_pixels=driver.core.max_pixels)
        driver.core.close()
        del driver
        clean(report)


def correct(report: Report) -> None:
    """The engine's latents beside the pipeline's, alone and in company, and bit for bit repeats."""
    torch.backends.cudnn.allow_tf32 = False
    samplers = ("Euler", "Euler a", "DPM++ 2M Karras", "UniPC", "DPM++ 2M SDE Karras", "Heun")
    request = changed(request_of(report, "sd15", 8), negative_prompt="blurry")
    requests = [changed(request, sampler_name=name, seed=seed) for seed, name in enumerate(samplers)]
    for precision, bound in (("float32", 1e-4), ("float16" if report.device == "cuda" else "float32", 3e-2)):
        dtype = weights.dtype_of(precision, report.device)
        pipeline = pipeline_of("sd15", report.tiny, report.device, dtype)
        expected = {
            name: pipeline_latents(pipeline, name, each)
            for name, each in zip(samplers, requests, strict=True)
            # In half precision the pipeline draws other noise than in fp32, in which the engine draws always.
            if dtype == torch.float32
        }
        del pipeline
        driver, model = driver_of(report, "sd15", EngineSettings(precision=precision))
        alone = {name: latents_of(driver, model, [each])[0] for name, each in zip(samplers, requests, strict=True)}
        again = dict(zip(samplers, latents_of(driver, model, requests), strict=True))
        for name in samplers:
            found = {"alone_to_pipeline": alone[name], "company_to_pipeline": again[name]} if name in expected else {}
            report.add(
                f"{precision} {name}",
                **{what: error(latents, expected[name]) for what, latents in found.items()},
                company_to_alone=error(again[name], alone[name]),
                bound=bound,
            )
        exclusive = changed(request, exclusive=True, sampler_name="Euler a", batch_size=2)
        first = latents_of(driver, model, [exclusive])
        latents_of(driver, model, requests)
        second = latents_of(driver, model, [exclusive, *requests])
        report.add(
            f"{precision} exclusive",
            repeats_bit_for_bit=bool(torch.equal(first[0], second[0]) and torch.equal(first[1], second[1])),
        )
        report.attempt(f"{precision} waits in ticks", partial(waits, driver, model, requests))
        driver.core.close()
        clean(report)


def memory(report: Report) -> None:
    """How many rows there is room for, and what happens where there is none."""
    driver, model = driver_of(report, "sd15", EngineSettings())
    placed = driver.placed()
    report.add("room", bytes_per_pixel=placed._bytes_per_pixel, max_pixels=placed.bound.pixels)
    if report.device != "cuda":
        return
    small = changed(request_of(report, "sd15", 6), n_iter=1)
    expected = driver.run([changed(small, seed=seed) for seed in range(8)], [model] * 8)[2]
    report.attempt("rows that do not fit", partial(short_of_memory, driver, model, small, 8, 0.8, expected))
    large = changed(small, width=1280, height=1280, steps=3)
    expected = driver.run([large], [model])[2]
    report.attempt("a decoder that does not fit", partial(short_of_memory, driver, model, large, 1, 3.5, expected))


def short_of_memory(
    driver: Driver, model: CachedModel, request: Generation, num_jobs: int, spare_gb: float, expected: list[Any]
) -> dict[str, Any]:
    """The same jobs with little memory beside what is there already."""
    driver.placed().graphs.clear()
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties().total_memory
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + spare_gb * GB) / total)
    before = driver.placed().bound.pixels
    try:
        produced = driver.run([changed(request, seed=seed) for seed in range(num_jobs)], [model] * num_jobs)[2]
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    pairs = zip(produced, expected, strict=True)
    differences = [np.abs(one.images[0].astype(int) - other.images[0]).mean() for one, other in pairs]
    return {
        "jobs_done": len(produced),
        "max_pixels_before": before,
        "max_pixels_after": driver.placed().bound.pixels,
        "mean_difference_of_255": float(max(differences)),
    }


def switches(report: Report) -> None:
    """50 switches between 3 checkpoints, of which the device has room for one."""
    seconds: list[float] = []
    enter = Placed.enter

    def timed(placed: Placed) -> None:
        began = time.perf_counter()
        enter(placed)
        seconds.append(time.perf_counter() - began)

    num_bytes = models_of("sd15", report.tiny, report.device, "auto").block.num_bytes
    # On the CPU a model that leaves is gone: there all three stay.
    room = int(num_bytes * (1.5 if report.device == "cuda" else 3.5))
    settings = EngineSettings(model_bytes=room, copy_bytes=4 * num_bytes if report.device == "cuda" else 0)
    driver = Driver(report.device, settings, lambda *_: models_of("sd15", report.tiny, report.device, "auto"))
    request = changed(request_of(report, "sd15", 3), width=64, height=64)
    with tempfile.TemporaryDirectory() as folder, mock.patch.object(Placed, "enter", timed):
        models = [file_of(Path(folder), f"{index}", num_bytes) for index in range(3)]
        for index in range(6):
            driver.run([request], [models[index % 3]])
        first = used(report)
        seconds.clear()
        for index in range(50):
            driver.run([request], [models[index % 3]])
        last = used(report)
    found = {"num_switches": 50, "model_gb": num_bytes / GB}
    if seconds:
        found |= {"enter_seconds_median": float(np.median(seconds)), "enter_seconds_max": max(seconds)}
        found |= {"gb_per_second": num_bytes / GB / float(np.median(seconds)), "num_entered": len(seconds)}
    report.add("switches", **found, **{f"{name}_growth": last[name] - first[name] for name in first})


def forms15(report: Report) -> None:
    """One call of SD1.5's UNet and decoder in every form."""
    measure_unets(report, "sd15", torch.float16, rows=(2, 16))
    measure_decoders(report, "sd15")


def formsxl(report: Report) -> None:
    """One call of SDXL's UNet and decoder in every form."""
    measure_unets(report, "sdxl", torch.bfloat16, rows=(2, 16))
    measure_decoders(report, "sdxl")


def profile(report: Report) -> None:
    """Where a job's time goes, by stages and by kinds of kernel."""
    for family, precision, compiled in (("sdxl", "bfloat16", True), ("sd15", "float16", False)):
        settings = EngineSettings(precision=precision, compiled=compiled)
        driver, model = driver_of(report, family, settings)
        name = f"{family}{', compiled' * compiled}"
        report.attempt(f"{name}: stages", partial(stages, driver, model, request_of(report, family, 10)))
        for num_rows in (2, 16):
            report.attempt(f"{name}: UNet, {num_rows} rows", partial(unet_kernels, driver, num_rows))
        report.attempt(f"{name}: decoder", partial(decoder_kernels, driver))
        driver.core.close()
        del driver
        clean(report)


def stages(driver: Driver, model: CachedModel, request: Generation) -> dict[str, Any]:
    """Milliseconds of the stages of one job."""
    models, device = driver.placed().models, driver.device
    found: dict[str, Any] = {}
    with torch.inference_mode():
        began = time.perf_counter()
        for _ in range(3):
            prompt.encode(models, request.prompt, 1)
            device.synchronize()
        found["text_ms"] = 1e3 * (time.perf_counter() - began) / 3
        latents = torch.randn(1, 4, request.height // 8, request.width // 8, device=models.device)
        found["decode_ms"] = 1e3 * median_seconds(
            device, lambda: Decoded(models.vae, latents, models.fast_vae_for(latents)).pixels(), 3, warm=1
        )
        pixels = Decoded(models.vae, latents, models.fast_vae_for(latents)).pixels()
    began = time.perf_counter()
    Image.fromarray(pixels).save(io.BytesIO(), "PNG")
    found["png_ms"] = 1e3 * (time.perf_counter() - began)
    return found | tick(driver, model, request, 1)


def unet_kernels(driver: Driver, num_rows: int) -> dict[str, float]:
    """Milliseconds of a UNet call by kind of kernel."""
    placed = driver.placed()
    inputs = placed._inputs(num_rows)
    forward = placed._forward(placed._fast or placed.models.unet)
    return kernels(lambda: forward(*inputs))


def decoder_kernels(driver: Driver) -> dict[str, float]:
    """Milliseconds of decoding a picture by kind of kernel."""
    models, side = driver.placed().models, driver.placed()._native_size()
    latents = torch.randn(1, 4, side, side, device=models.device)
    return kernels(lambda: Decoded(models.vae, latents, models.fast_vae_for(latents)))


def kernels(call: Callable[[], Any]) -> dict[str, float]:
    """Milliseconds of a call by kind of kernel, and of the longest kernels."""
    if not torch.cuda.is_available():
        return {}
    with torch.inference_mode():
        call()
        torch.cuda.synchronize()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
            call()
            torch.cuda.synchronize()
    kinds: Counter[str] = Counter()
    names: Counter[str] = Counter()
    for event in profiler.events():
        duration = float(getattr(event, "device_time", 0.0) or getattr(event, "cuda_time", 0.0)) / 1e3
        kinds[kind_of(event.name)] += duration
        names[event.name[:60]] += duration
        kinds["number"] += duration > 0
    return {kind: round(value, 3) for kind, value in (*kinds.most_common(), *names.most_common(12))}


def kind_of(name: str) -> str:
    """What a kernel does, by its name."""
    kinds = {
        "fused by the compiler": ("triton_",),
        "attention": ("flash", "fmha", "attention", "sdpa"),
        "convolution": ("fprop", "implicit_gemm", "winograd"),
        "matrix product": ("gemm", "cutlass", "nvjet", "splitk", "matmul"),
        "norm": ("norm", "rowwise", "moments"),
        "layout": ("nchw", "nhwc", "transpose", "copy", "memcpy", "cat"),
        "elementwise": ("elementwise", "vectorized", "gelu", "silu", "upsample"),
    }
    return next((kind for kind, parts in kinds.items() if any(part in name.lower() for part in parts)), "other")


def file(report: Report) -> None:
    """A checkpoint of full size, written to disk and read as a worker reads it."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "full.safetensors"
        parts = parts_of("sd15", report.tiny, report.device, half(report), half(report))
        named = ldm.checkpoint(parts.config, parts.unet, parts.vae, parts.text_encoders[0])
        metadata = {"esd_config": json.dumps(parts.config)} if report.tiny else None
        began = time.perf_counter()
        save_file(named, path, metadata=metadata)
        report.add("write", seconds=time.perf_counter() - began, gb=path.stat().st_size / GB)
        del parts, named
        clean(report)
        model = CachedModel("full", "Stable-diffusion", path.name, path, "")
        for attempt in ("first", "second"):
            began = time.perf_counter()
            models = weights.load(model, None, report.device)
            read = time.perf_counter()
            placed = Placed(models, devices.of(report.device), EngineSettings())
            placed.enter()
            entered = time.perf_counter()
            placed.settle()
            report.add(
                f"{attempt} load",
                read_seconds=read - began,
                enter_seconds=entered - read,
                settle_seconds=time.perf_counter() - entered,
            )
            placed.leave()
            placed.forget()
            del placed, models
            clean(report)
        driver = Driver(report.device, EngineSettings())
        request = request_of(report, "sd15", 20)
        report.add("first picture of a cold worker", seconds=driver.run([request], [model])[0])
        report.add("second picture", seconds=driver.run([request], [model])[0])
        driver.core.close()


def request_of(report: Report, family: str, steps: int) -> Generation:
    """A guided picture of the family's own size."""
    size = 64 if report.tiny else {"sd15": 512, "sdxl": 1024}[family]
    return txt2img_of(
        prompt="a photograph of an astronaut riding a horse on the moon, highly detailed",
        negative_prompt="blurry, low quality",
        steps=4 if report.tiny else steps,
        width=size,
        height=size,
        sampler_name="Euler",
        seed=1,
    )


def half(report: Report) -> torch.dtype:
    """The type of a pipeline's weights."""
    return torch.float16 if report.device == "cuda" else torch.float32


def driver_of(report: Report, family: str, settings: EngineSettings) -> tuple[Driver, CachedModel]:
    """An engine that has the family's models on the device and has made a picture."""
    if report.device == "cpu":
        settings = replace(settings, precision="bfloat16" if settings.fp8 else "float32")

    def load(*_: Any) -> weights.Models:
        return models_of(family, report.tiny, report.device, settings.precision)

    folder = Path(tempfile.mkdtemp())
    model = file_of(folder, family, 2 * 10**9)
    driver = Driver(report.device, replace(settings, model_bytes=10**12), load)
    driver.run([changed(request_of(report, family, 4), steps=4)], [model])
    return driver, model


def pipelined(pipeline: Any, request: Generation, batch: int, steps: int) -> float:
    """Seconds of a call of the pipeline, from prompts to pixels."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    began = time.perf_counter()
    pipeline(
        [request.prompt] * batch,
        negative_prompt=[request.negative_prompt] * batch,
        num_inference_steps=min(steps, request.steps),
        guidance_scale=request.cfg_scale,
        width=request.width,
        height=request.height,
        generator=[torch.Generator().manual_seed(seed) for seed in range(batch)],
        output_type="np",
    )
    return time.perf_counter() - began


def at_once(
    driver: Driver,
    model: CachedModel,
    request: Generation,
    batch: int,
    alone: dict[int, float],
    targets: dict[str, float] | None = None,
) -> dict[str, Any]:
    """So many jobs that come together, after a few steps of as many."""
    requests = [changed(request, seed=seed) for seed in range(batch)]
    driver.run([changed(each, steps=4) for each in requests], [model] * batch)
    tries = [driver.run(requests, [model] * batch)[:2] for _ in range(2 if batch < 4 else 1)]
    seconds, ends = min(tries, key=lambda found: found[0])
    found = {"seconds": seconds, "rate": batch / seconds, "mean_latency": float(np.mean(ends))}
    if 1 in alone:
        found["to_one_by_one"] = batch * alone[1] / seconds
    if batch in alone:
        found["to_a_batch"] = alone[batch] / seconds
    return found | (targets or {})


def tick(driver: Driver, model: CachedModel, request: Generation, batch: int) -> dict[str, Any]:
    """Milliseconds of a tick, of the UNet in it on the device, and of the thread's own work."""
    placed, core = driver.placed(), driver.core
    unet, ticks, host = Clock(driver.device), Clock(driver.device), Counter[str]()
    evaluate = core._evaluate

    def evaluated(runs: Any) -> None:
        began = time.perf_counter()
        evaluate(runs)
        host["seconds"] += time.perf_counter() - began
        host["ticks"] += 1

    requests, models = [changed(request, seed=seed) for seed in range(batch)], [model] * batch
    owner, name = (placed, "graphs") if placed.graphs is not None else (placed.models.unet, "forward")
    with (
        mock.patch.object(core, "_evaluate", ticks.around(evaluated)),
        mock.patch.object(owner, name, Counted(getattr(owner, name), unet)),
    ):
        began = time.perf_counter()
        driver.run(requests, models)
        seconds = time.perf_counter() - began
    inside, whole = unet.take(), ticks.take()
    return {
        "ticks": host["ticks"],
        "tick_ms": 1e3 * whole / host["ticks"],
        "unet_ms": 1e3 * inside / host["ticks"],
        "outside_unet_percent": 100 * (1 - inside / whole),
        "thread_ms": 1e3 * host["seconds"] / host["ticks"],
        "job_seconds": seconds,
        "ticks_percent_of_job": 100 * whole / seconds,
    }


class Counted:
    """Graphs, or a forward method, whose calls are counted."""

    def __init__(self, counted: Any, clock: Clock) -> None:
        self._counted = counted
        self._call = clock.around(counted)

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        return self._call(*arguments, **options)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._counted, name)


def latents_of(driver: Driver, model: CachedModel, requests: list[Generation]) -> list[torch.Tensor]:
    """The final latents of jobs at once, in the order of the jobs and their images."""
    found: dict[int, torch.Tensor] = {}
    denoised = txt2img.denoised

    def recorded(request: Any, *arguments: Any) -> Generator[Any, Any, torch.Tensor]:
        latents = yield from denoised(request, *arguments)
        found[id(request)] = latents.clone()
        return latents

    with mock.patch.object(txt2img, "denoised", recorded):
        driver.run(requests, [model] * len(requests))
    return [row for request in requests for row in torch.split(found[id(request)], 1)]


def waits(driver: Driver, model: CachedModel, requests: list[Generation]) -> dict[str, Any]:
    """How often the thread waits for the device within ticks that were captured before."""
    if not torch.cuda.is_available():
        return {}
    driver.run(requests, [model] * len(requests))
    evaluate = driver.core._evaluate
    found: Counter[str] = Counter()

    def evaluated(runs: Any) -> None:
        if any(run.wish is None for run in runs):
            return evaluate(runs)
        torch.cuda.set_sync_debug_mode("warn")
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            evaluate(runs)
        torch.cuda.set_sync_debug_mode("default")
        found["ticks"] += 1
        for warning in caught:
            if "synchronizing" in str(warning.message):
                found["waits"] += 1
                found[f"{Path(warning.filename).name}:{warning.lineno}"] += 1
        return None

    with mock.patch.object(driver.core, "_evaluate", evaluated):
        driver.run(requests, [model] * len(requests))
    return {"ticks": found["ticks"], "waits": found["waits"], "where": dict(found.most_common(6))}


def used(report: Report) -> dict[str, float]:
    """Memory in GB."""
    gc.collect()
    found = {"host_gb": float(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / GB}
    if report.device == "cuda":
        torch.cuda.synchronize()
        found |= {"allocated_gb": torch.cuda.memory_allocated() / GB, "reserved_gb": torch.cuda.memory_reserved() / GB}
        free, total = torch.cuda.mem_get_info()
        found["used_gb"] = (total - free) / GB
    return found


def clean(report: Report) -> None:
    """Gives memory back between measurements."""
    gc.collect()
    if report.device == "cuda":
        torch.cuda.empty_cache()
