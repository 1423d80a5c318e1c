"""`python -m gpu_worker train config.toml`: a training by hand, without any service, with a progress bar."""

from __future__ import annotations

import argparse
import hashlib
import os
import signal
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from gpu_worker.engine.importing import uncollected
from gpu_worker.files.cache import CachedModel
from gpu_worker.job import JobError
from gpu_worker.trainer import dataset, listening
from services.common.errors import InvalidArgument
from services.common.payloads.training import Training, check_training, parse_toml

EXIT_FAILED, EXIT_STOPPED = 1, 130


class Bar:
    """Shows a training in the terminal. Ctrl-C ends it after the step under way."""

    def __init__(self, console: Console, bar: Progress) -> None:
        self._console = console
        self._bar = bar
        self._task = bar.add_task("reading pictures", total=None, loss="")
        self.wants_stop = False

    def log(self, line: str) -> None:
        """See Listener."""
        self._console.print(line, markup=False, highlight=False, soft_wrap=True)

    def fail(self, reason: str) -> None:
        """Says why the training ends; how far it was is of no use to anybody then."""
        self._bar.remove_task(self._task)
        self.log(f"error: {reason}")

    def encoded(self, number: int, num_pictures: int) -> None:
        """See Listener."""
        self._bar.update(self._task, description="encoding", completed=number, total=num_pictures)

    def begun(self, plan: listening.Plan) -> None:
        """See Listener."""
        self.log(f"{plan.num_pictures} pictures, {plan.num_epochs} epochs, {plan.num_steps} steps")
        self._bar.update(self._task, description="training", completed=plan.first_step, total=plan.num_steps)

    def stepped(self, progress: listening.Progress) -> None:
        """See Listener."""
        loss = f"epoch {progress.epoch}  loss {progress.average_loss:.4f}"
        self._bar.update(self._task, completed=progress.step, loss=loss)

    def saved(self, path: Path, epoch: int, step: int) -> None:
        """See Listener."""
        self.log(f"saved {path}, epoch {epoch}, step {step}")

    def removed(self, path: Path) -> None:
        """See Listener."""
        self.log(f"removed {path}")

    def drawn(self, path: Path, epoch: int, prompt: str) -> None:
        """See Listener."""
        self.log(f"preview {path}")

    def kept(self, path: Path, epoch: int) -> None:
        """See Listener."""


def main(arguments: list[str]) -> int:
    """Trains as the file says, and answers the exit code."""
    parser = argparse.ArgumentParser(prog="python -m gpu_worker train", description=__doc__)
    parser.add_argument("config", type=Path, help="a TOML file with kohya's keys")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--resume", action="store_true", help="go on after the last epoch that was finished")
    options = parser.parse_args(arguments)
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, TimeRemainingColumn(), TextColumn("{task.fields[loss]}"), console=console) as bar:
        shown = Bar(console, bar)
        before = signal.signal(signal.SIGINT, lambda *_: setattr(shown, "wants_stop", True))
        try:
            _train(options.config, options.device, options.resume, shown)
        except listening.Stopped:
            shown.log("stopped; what was saved stays")
            return EXIT_STOPPED
        except OSError as error:  # of a file that the user named, or of a disk that is full
            shown.fail(": ".join(str(part) for part in (error.filename, error.strerror) if part) or str(error))
            return EXIT_FAILED
        except (JobError, InvalidArgument, RuntimeError) as error:
            shown.fail(str(error))
            return EXIT_FAILED
        finally:
            signal.signal(signal.SIGINT, before)
    return 0


def _train(path: Path, wanted_device: str, resume: bool, shown: Bar) -> None:
    config = _read(path)
    for note in config.notes:
        shown.log(f"note: {note}")
    for name in config.unknown:
        shown.log(f"warning: the key {name} is not known here and does nothing")
    pictures = dataset.read(config, shown.log)
    base, vae = _file(config.pretrained_model_name_or_path, "pretrained_model_name_or_path"), None
    if config.vae:
        vae = _file(config.vae, "vae")
    with uncollected():  # torch takes seconds, for which nobody waits who is only told of a mistake
        from gpu_worker.models import weights  # noqa: PLC0415
        from gpu_worker.trainer import loop, steps  # noqa: PLC0415
    state = Path(config.output_dir) / loop.STATE
    if resume and not state.is_file():
        raise JobError(f"there is nothing to go on from: {state} is not there")
    device, description = weights.use_device(wanted_device, 0)
    shown.log(f"loading {base.path.name} for {description}")
    with loop.within_memory():
        models = weights.load(base, vae, device, steps.precision(config, device))
        models.stay()
        if config.no_half_vae:
            models.vae.float()
        training = loop.Loop(config, models, base, pictures, Path(config.output_dir), shown)
        training.run(state if resume else None)


def _read(path: Path) -> Training:
    fields = parse_toml(_text(path))
    prompts = fields.get("sample_prompts")
    # Not Path.is_file, which fails where a prompt is longer than a name may be. Files of tables are refused by name.
    if isinstance(prompts, str) and os.path.isfile(prompts) and not prompts.lower().endswith((".toml", ".json")):
        fields["sample_prompts"] = _text(Path(prompts))
    return check_training(fields)


def _text(path: Path) -> str:
    """A file's text, without the mark that Windows puts before it."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise JobError(f"{path} is not UTF-8: {error}") from None


def _file(path: str, key: str) -> CachedModel:
    """A model by its path, with its SHA-256."""
    found = Path(path)
    if not found.is_file():
        raise JobError(f"{key} {path!r} is no file; possible: a .safetensors or .ckpt file")
    with found.open("rb") as content:
        digest = hashlib.file_digest(content, "sha256")
    return CachedModel(str(found), key, found.name, found, digest.hexdigest())
