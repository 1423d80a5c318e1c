"""Speed and memory of training, beside a plain loop of diffusers and peft in the same run.

    python -m tests.bench.training [--device cuda [--tiny]] [--out DIR] [--seconds-budget N]

On the CPU with tiny models. On a GPU models have the full size of Stable Diffusion 1.5 and SDXL, and random weights:
nothing comes from the network. With `--tiny` the parts for a GPU run to their ends with tiny models on the CPU. Each
part is guarded by itself, and DIR/training.json is written after each measurement: whatever ends the program, or the
time, leaves what was measured before. It needs the worker's own packages.
"""

from __future__ import annotations

import argparse
import gc
import json
import platform
import statistics
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import accumulate
from operator import itemgetter, truediv
from pathlib import Path
from typing import Any

import torch

from tests.bench.training_loops import Step, batch_of, models_of, ours, plain
from tests.bench.training_whole import rate_of_whole, whole

_NUM_RUNS = 5
_WARM_STEPS = 3


class Report:
    """The figures, in a file after each of them."""

    def __init__(self, out: Path | None, seconds_budget: float) -> None:
        if out is not None:
            out.mkdir(parents=True, exist_ok=True)
        self._path = out / "training.json" if out is not None else None
        self.ends_at = time.monotonic() + seconds_budget
        self._rows: list[dict[str, Any]] = []

    @property
    def seconds_left(self) -> float:
        """Of the budget."""
        return self.ends_at - time.monotonic()

    def attempt(self, what: str, needs_seconds: float, measure: Callable[[], Iterable[dict[str, Any]]]) -> None:
        """Adds the figures of a part, of which `measure` yields better and better ones; the last before the time is up
        stay. One that fails, or has no time, costs its own figures only."""
        began = time.monotonic()
        row: dict[str, Any] = {"what": what}
        self._rows.append(row)
        try:
            if self.seconds_left < needs_seconds:
                row["skipped"] = f"{self.seconds_left:.0f} s were left"
            else:
                for found in measure():
                    row |= {"seconds": round(time.monotonic() - began, 1), **found}
                    self._tell(row)
                    if self.seconds_left <= 0:
                        break
        except Exception as error:
            traceback.print_exc()
            row["failed"] = f"{type(error).__name__}: {error}"[:300]
        if row.keys() & {"skipped", "failed"}:
            self._tell(row)
        free()

    def _tell(self, row: dict[str, Any]) -> None:
        print(json.dumps(row), flush=True)
        if self._path is not None:
            self._path.write_text(json.dumps({"machine": machine(), "rows": self._rows}, indent=1))


def machine() -> dict[str, str]:
    """What the figures were measured on."""
    import diffusers
    import peft
    import transformers

    name = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or platform.machine()
    modules = {"torch": torch, "diffusers": diffusers, "transformers": transformers, "peft": peft}
    return {
        "device": name,
        "python": platform.python_version(),
        **{key: str(module.__version__) for key, module in modules.items()},
    }


def free() -> None:
    """Gives the device's memory back."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def wait() -> None:
    """For the device."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def rate(step: Step, num_steps: int) -> float:
    """Steps per second."""
    wait()
    began = time.perf_counter()
    for _ in range(num_steps):
        step()
    wait()
    return num_steps / (time.perf_counter() - began)


def compare(
    family: str, side: int, batch_size: int, dtype: torch.dtype, num_steps: int, device: str, num_runs: int = _NUM_RUNS
) -> Iterator[dict[str, Any]]:
    """Both loops with models of their own, in turn: what is known after each turn."""
    steps: dict[str, Step] = {}
    peaks: dict[str, int] = {}
    rates: dict[str, list[float]] = {"ours": [], "plain": []}

    def warm(make: Callable[..., Step]) -> Step:
        models = models_of(family, device, dtype)
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()  # they are made in fp32, which may take more than a step does
        step = make(models, batch_of(models, side, batch_size))
        for _ in range(_WARM_STEPS):
            step()
        return step

    measure = cuda_peak if device == "cuda" else cpu_peak
    for name, make in (("ours", ours), ("plain", plain)):
        free()
        steps[name], peaks[name] = measure(partial(warm, make))
        if name == "ours":  # whatever becomes of the other one
            yield {"steps_per_second": {name: round(rate(steps[name], num_steps), 3)}, "peak_bytes": peaks}
    for _ in range(num_runs):
        for name, step in steps.items():
            rates[name].append(rate(step, num_steps))
        yield compared(rates) | {
            "images_per_second": round(statistics.median(rates["ours"]) * batch_size, 2),
            "peak_bytes": peaks,
            "memory_ratio": round(peaks["ours"] / peaks["plain"], 3),
        }


def cuda_peak(make: Callable[[], Step]) -> tuple[Step, int]:
    """What `make` answers, and the most bytes that its tensors took, as the GPU's allocator counts them."""
    before = torch.cuda.memory_allocated()
    made = make()
    wait()
    return made, torch.cuda.max_memory_allocated() - before


def cpu_peak(make: Callable[[], Step]) -> tuple[Step, int]:
    """The same as torch's profiler counts them: it sees each tensor come and go."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        made = make()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(trace))
        events = [event for event in json.loads(trace.read_text())["traceEvents"] if event["name"] == "[memory]"]
    changes = [event["args"]["Bytes"] for event in sorted(events, key=itemgetter("ts"))]
    return made, max(accumulate(changes))


def alone(
    family: str, side: int, batch_size: int, dtype: torch.dtype, num_steps: int, device: str, **keys: Any
) -> Iterator[dict[str, Any]]:
    """The trainer's loop alone, with other keys."""
    models = models_of(family, device, dtype)
    step = ours(models, batch_of(models, side, batch_size), **keys)
    for _ in range(_WARM_STEPS):
        step()
    found = [rate(step, num_steps) for _ in range(3)]
    peak = torch.cuda.max_memory_allocated() if device == "cuda" else 0
    yield {"steps_per_second": round(statistics.median(found), 3), "peak_bytes": peak}


def learns(family: str, side: int, dtype: torch.dtype, device: str, num_steps: int = 100) -> Iterator[dict[str, Any]]:
    """Whether a batch that is seen again and again is learned: the mean loss of the first and of the last 20 steps."""
    models = models_of(family, device, dtype)
    step = ours(models, batch_of(models, side, 2), unet_lr=1e-3, text_encoder_lr=1e-4, min_timestep=300)
    losses = [step() for _ in range(num_steps)][1:]
    first, last = statistics.mean(losses[:20]), statistics.mean(losses[-20:])
    yield {"first": round(first, 4), "last": round(last, 4), "falls": last < first}


def compare_whole(num_steps: int) -> Iterator[dict[str, Any]]:
    """Whole trainings of a tiny checkpoint on the CPU, curves for TensorBoard included, in turn with as many steps of
    the plain loop."""
    models = models_of("tiny", "cpu", torch.float32)
    step = plain(models, batch_of(models, 64, 4))
    rate(step, _WARM_STEPS)
    rates: dict[str, list[float]] = {"ours": [], "plain": []}
    for _ in range(_NUM_RUNS):
        rates["plain"].append(rate(step, num_steps))
        rates["ours"].append(rate_of_whole(_WARM_STEPS, num_steps))
        yield compared(rates)


def compared(rates: dict[str, list[float]]) -> dict[str, Any]:
    """Medians of steps per second. The ratio is of runs that followed each other: what else a machine does changes
    both."""
    return {
        "steps_per_second": {name: round(statistics.median(found), 3) for name, found in rates.items()},
        "ratio": round(statistics.median(map(truediv, rates["ours"], rates["plain"])), 3),
        "all": {name: [round(value, 3) for value in found] for name, found in rates.items()},
    }


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--tiny", action="store_true", help="the parts for a GPU, with tiny models on the CPU")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--seconds-budget", type=float, default=240)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    report = Report(options.out, options.seconds_budget)
    if options.tiny or options.device == "cpu":
        torch.set_num_threads(1)  # with tiny models more gain nothing, and wait for cores that somebody else has
    if options.device == "cuda":
        on_gpu(report, options.tiny)
    else:
        on_cpu(report)


def on_cpu(report: Report) -> None:
    """Tiny models."""
    report.attempt("tiny SD1.5 64x64 batch 4", 60, lambda: compare("tiny", 64, 4, torch.float32, 20, "cpu"))
    report.attempt("tiny SD1.5 64x64 batch 4, whole trainings", 60, lambda: compare_whole(20))
    report.attempt("a whole tiny training", 20, lambda: [whole("cpu", "no")])


def on_gpu(report: Report, tiny: bool) -> None:
    """Models of full size; or tiny ones in their place, which show no more than that each part runs to its end."""
    device = "cpu" if tiny else "cuda"
    num_runs, num_learned = (2, 3) if tiny else (_NUM_RUNS, 100)
    half, bfloat = (torch.float32, torch.float32) if tiny else (torch.float16, torch.bfloat16)
    loha = {"network_module": "lycoris.kohya", "network_args": ["algo=loha", "preset=attn-mlp"], "network_dim": 4}
    checkpointing, small_optimizer = {"gradient_checkpointing": True}, {"optimizer_type": "AdamW8bit"}

    def size(family: str, side: int) -> tuple[str, int]:
        return ("tiny", 64) if tiny else (family, side)

    parts: list[tuple[str, float, Callable[[], Iterable[dict[str, Any]]]]] = [
        ("SDXL 1024x1024 batch 1, fp16", 30, lambda: compare(*size("sdxl", 1024), 1, half, 3, device, num_runs)),
        ("SD1.5 512x512 batch 4, fp16", 25, lambda: compare(*size("sd15", 512), 4, half, 8, device, num_runs)),
        ("a whole tiny training, fp16", 15, lambda: [whole(device, "fp16")]),
        (
            "SDXL 1024x1024 batch 1, bf16, checkpointing",
            20,
            lambda: alone(*size("sdxl", 1024), 1, bfloat, 6, device, **checkpointing),
        ),
        (
            "SD1.5 512x512 batch 4, fp16, AdamW8bit",
            15,
            lambda: alone(*size("sd15", 512), 4, half, 8, device, **small_optimizer),
        ),
        ("SD1.5 256x256 learns, fp16", 15, lambda: learns(*size("sd15", 256), half, device, num_learned)),
        ("a whole tiny training, bf16, LoHa", 10, lambda: [whole(device, "bf16", **loha)]),
    ]
    for what, needs_seconds, measure in parts:
        report.attempt(what, needs_seconds, measure)


if __name__ == "__main__":
    main()
