"""A training from its first epoch to its last: in which order pictures come, and what is written when.

Each epoch has a seed of its own, so a training that goes on from an epoch's end equals one that never stopped.
"""

from __future__ import annotations

import hashlib
import math
import random
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from gpu_worker.devices import on_device
from gpu_worker.files.cache import CachedModel
from gpu_worker.job import JobError
from gpu_worker.models.weights import Models
from gpu_worker.trainer import captions, networks, saving, state
from gpu_worker.trainer.board import Board
from gpu_worker.trainer.buckets import batches
from gpu_worker.trainer.dataset import Dataset, Picture
from gpu_worker.trainer.latents import Latents
from gpu_worker.trainer.listening import Listener, Plan, Progress, Stopped
from gpu_worker.trainer.previews import Previews
from gpu_worker.trainer.steps import Batch, Outcome, Steps
from services.common.payloads.training import Training

STATE = "state.pt"
NO_MEMORY = (
    "the GPU has not enough memory for this training; a smaller train_batch_size or resolution, or "
    "gradient_checkpointing=true, need less"
)
_MAX_SKIPPED_STEPS = 20  # in a row; in fp16 a few are usual until the loss scale fits


@contextmanager
def within_memory() -> Iterator[None]:
    """Within it, from the loading of the models on, a GPU that is too small ends a training with a sentence.

    Raises:
        JobError: there was not enough memory.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise JobError(NO_MEMORY) from error


@dataclass(frozen=True, eq=False)
class _Told:
    """A step that is under way on the device."""

    step: int
    epoch: int
    outcome: Outcome
    rates: dict[str, float]


class Loop:
    """One training. The models are its own: the network is put into them."""

    def __init__(
        self, config: Training, models: Models, base: CachedModel, dataset: Dataset, folder: Path, listener: Listener
    ) -> None:
        _check(models, base.name)
        for line in _notes(models, config):
            listener.log(line)
        if config.v_parameterization:  # for the previews too
            models = replace(models, scheduler_config=models.scheduler_config | {"prediction_type": "v_prediction"})
        self._config = config
        self._models = models
        self._dataset = dataset
        self._folder = folder
        self._listener = listener
        self._epoch_pictures = dataset.epoch
        found = self._batches(random.Random(0))  # noqa: S311 - only counted
        self._steps_per_epoch = len(_groups(found, config))
        self._num_epochs, self._num_steps = self._length()
        self._is_cuda = models.device.type == "cuda"
        torch.manual_seed(config.seed)
        self._network = networks.create(models, config)
        self._steps = Steps(models, self._network, config, self._num_steps, listener.log)
        self._latents = Latents(models, cached=config.cache_latents, flips=config.flip_aug)
        self._losses: deque[float] = deque(maxlen=self._steps_per_epoch)
        self._num_skipped = 0
        self._told: _Told | None = None
        self._previews = Previews(config, models, dataset, folder, listener)
        now = time.time()
        self._origin = saving.Origin(
            config, dataset, base.name, base.sha256, models.is_sdxl, self._steps.is_velocity, self._num_epochs,
            self._num_steps, len(found), random.SystemRandom().randint(0, 2**32), now,
        )  # fmt: skip

    def run(self, resumed: Path | None = None, is_own: bool = False) -> None:
        """Trains to the end, from the state in a file if there is one. `is_own`: it is known to be of this training.

        Raises:
            Stopped: the listener wanted it; what was saved stays.
            JobError: the training cannot go on; the message says why.
            torch.OutOfMemoryError: see `within_memory`.
        """
        config, listener = self._config, self._listener
        first_epoch, step = self._resume(resumed, is_own)
        self._folder.mkdir(parents=True, exist_ok=True)
        self._encode()
        listener.begun(Plan(len(self._dataset.pictures), self._num_epochs, self._num_steps, step))
        board = Board(config.logging_dir, config.log_prefix)
        self._began, self._first_step = time.monotonic(), step
        try:
            self._epochs(first_epoch, step, board)
        finally:
            board.close()
        (self._folder / STATE).unlink(missing_ok=True)

    def _epochs(self, first_epoch: int, step: int, board: Board) -> None:
        for epoch in range(first_epoch + 1, self._num_epochs + 1):
            step = self._epoch(epoch, step, board)
            self._tell(board)
            self._check_weights(step)
            board.flush()
            is_last = epoch == self._num_epochs
            is_saved = is_last or (self._every is not None and epoch % self._every == 0)
            if is_saved:
                self._save_epoch(epoch, step, is_last=is_last)
            self._previews.draw(epoch, is_saved=is_saved, is_last=is_last)
            if not is_last:
                self._keep(epoch, step)

    def _length(self) -> tuple[int, int]:
        """Epochs and steps: as many epochs as are asked for, else steps."""
        config, per_epoch = self._config, self._steps_per_epoch
        if config.max_train_epochs is not None:
            return config.max_train_epochs, config.max_train_epochs * per_epoch
        return math.ceil(config.max_train_steps / per_epoch), config.max_train_steps

    def _resume(self, resumed: Path | None, is_own: bool) -> tuple[int, int]:
        if resumed is None:
            return 0, 0
        found = state.read(resumed, None if is_own else self._config)
        try:
            self._network.load(found.network)
            self._steps.load(found.steps)
        except (KeyError, RuntimeError, ValueError) as error:
            raise JobError(f"the state {resumed.name} does not fit the base model") from error
        self._listener.log(f"going on after epoch {found.epoch} of {self._num_epochs}, step {found.step}")
        return found.epoch, found.step

    def _encode(self) -> None:
        """Makes latents of all pictures, where they are cached."""
        pictures = self._dataset.pictures

        def on_picture(number: int) -> None:
            if self._listener.wants_stop:
                raise Stopped
            self._listener.encoded(number, len(pictures))

        self._latents.prepare(pictures, torch.Generator().manual_seed(self._config.seed), on_picture)

    def _epoch(self, epoch: int, step: int, board: Board) -> int:
        """Trains on every picture, and answers how many steps are done."""
        seed = _seed_of(self._config.seed, epoch)
        torch.manual_seed(seed)  # of dropout in the network
        generator = torch.Generator(self._models.device).manual_seed(seed)
        chance = random.Random(seed)  # noqa: S311 - it shall repeat
        for group in _groups(self._batches(chance), self._config):
            if step == self._num_steps:
                break
            if self._listener.wants_stop:
                self._tell(board)
                raise Stopped
            rates = self._steps.rates
            found = [self._batch(pictures, epoch, chance, generator) for pictures in group]
            outcome = self._steps.step(found, generator)
            step += 1
            self._tell(board)
            self._told = _Told(step, epoch, outcome, rates)
            if not self._is_cuda:
                self._tell(board)
            if self._config.save_every_n_steps and step % self._config.save_every_n_steps == 0:
                self._tell(board)
                self._check_weights(step)
                self._save_step(epoch, step, self._config.save_every_n_steps)
        return step

    def _tell(self, board: Board) -> None:
        """Tells of the step before. On CUDA the next one is under way by then, so that the device never waits."""
        told, self._told = self._told, None
        if told is None:
            return
        loss, is_skipped = told.outcome.loss, told.outcome.is_skipped
        is_number = all(map(math.isfinite, (loss, *told.rates.values())))
        self._num_skipped = self._num_skipped + 1 if is_skipped else 0
        if self._num_skipped >= _MAX_SKIPPED_STEPS or not (is_number or is_skipped):
            raise _diverged("the gradient of the loss" if is_number else "the loss", told.step)
        if not is_number:
            return  # the weights are as they were: there is nothing to tell
        self._losses.append(loss)
        average = sum(self._losses) / len(self._losses)
        per_step = (time.monotonic() - self._began) / (told.step - self._first_step)
        left = per_step * (self._num_steps - told.step)
        progress = Progress(told.step, told.epoch, loss, average, told.rates, left)
        board.stepped(progress)
        self._listener.stepped(progress)

    def _check_weights(self, step: int) -> None:
        """Refuses to keep what is of no use to anybody. A loss tells of it only with the next step."""
        if not all(bool(torch.isfinite(tensor).all()) for tensor in self._network.tensors().values()):
            raise _diverged("a weight of the network", step)

    def _batches(self, chance: random.Random) -> list[list[Picture]]:
        return batches(self._epoch_pictures, self._config.train_batch_size, chance)

    def _batch(
        self, pictures: Sequence[Picture], epoch: int, chance: random.Random, generator: torch.Generator
    ) -> Batch:
        config, device = self._config, self._models.device
        flipped = [config.flip_aug and chance.random() < 0.5 for _ in pictures]
        weights = sizes = None
        if any(picture.is_regularisation for picture in pictures):
            counts = [config.prior_loss_weight if picture.is_regularisation else 1.0 for picture in pictures]
            weights = on_device(torch.tensor(counts), device)
        if self._models.is_sdxl:
            listed = [_sizes(picture, flip) for picture, flip in zip(pictures, flipped, strict=True)]
            sizes = on_device(torch.tensor(listed, dtype=torch.float32), device)  # in bf16, 1001 would be 1000
        texts = [captions.varied(picture.caption, config, epoch, chance) for picture in pictures]
        return Batch(self._latents.batch(pictures, flipped, generator), texts, weights, sizes)

    # --- what is written ---

    @property
    def _every(self) -> int | None:
        """How many epochs lie between two files."""
        ratio = self._config.save_n_epoch_ratio
        return max(1, self._num_epochs // ratio) if ratio else self._config.save_every_n_epochs

    def _save_epoch(self, epoch: int, step: int, *, is_last: bool) -> None:
        self._save(saving.file_name(self._config, None if is_last else epoch), epoch, step)
        if self._every and self._config.save_last_n_epochs and not is_last:
            oldest = epoch - self._every * self._config.save_last_n_epochs
            if oldest > 0:
                self._remove(saving.file_name(self._config, oldest))

    def _save_step(self, epoch: int, step: int, every: int) -> None:
        self._save(saving.step_file_name(self._config, step), epoch, step)
        if self._config.save_last_n_steps:
            oldest = (step - self._config.save_last_n_steps - 1) // every * every
            if oldest > 0:
                self._remove(saving.step_file_name(self._config, oldest))

    def _save(self, name: str, epoch: int, step: int) -> None:
        path = self._folder / name
        saving.write(path, self._network.tensors(), self._origin, epoch, step)
        self._listener.saved(path, epoch, step)

    def _remove(self, name: str) -> None:
        path = self._folder / name
        path.unlink(missing_ok=True)  # that of an earlier process may lie elsewhere
        self._listener.removed(path)

    def _keep(self, epoch: int, step: int) -> None:
        path = self._folder / STATE
        kept = state.State(epoch, step, self._network.tensors(), self._steps.state())
        state.write(path, kept, self._config)
        self._listener.kept(path, epoch)


def _check(models: Models, name: str) -> None:
    """Refuses what is no base model of a training."""
    if models.is_inpainting or models.is_refiner:
        kind = "an SDXL refiner" if models.is_refiner else "an inpainting checkpoint"
        raise JobError(f"{name} is {kind}, which cannot be trained on; possible: Stable Diffusion 1.5, SDXL")


def _diverged(what: str, step: int) -> JobError:
    advice = "a lower learning rate, or mixed_precision bf16 or no, may help"
    return JobError(f"{what} is not a number any more, at step {step}; {advice}")


def _notes(models: Models, config: Training) -> Iterator[str]:
    """What the configuration says in vain, for these models on this device."""
    if config.mixed_precision != "no" and models.dtype == torch.float32:
        yield f"mixed_precision: it is CUDA's; here everything is computed in fp32, not in {config.mixed_precision}"
    if config.clip_skip > 1 and models.is_sdxl:
        yield "clip_skip: of SDXL's text encoders the last layer but one is read, whatever this says"


def _groups(found: list[list[Picture]], config: Training) -> list[list[list[Picture]]]:
    """Batches by step."""
    size = config.gradient_accumulation_steps
    return [found[start : start + size] for start in range(0, len(found), size)]


def _seed_of(seed: int, epoch: int) -> int:
    """An epoch's seed, unlike that of any other epoch of any other seed."""
    return int.from_bytes(hashlib.sha256(f"{seed} {epoch}".encode()).digest()[:4], "big")


def _sizes(picture: Picture, flip: bool) -> list[int]:
    """What SDXL is told of a picture (Podell et al. 2023, 2.2): its size, where it was cropped, the size that is
    trained; each height first."""
    left, top = picture.crop
    if flip:
        left = picture.scaled[0] - picture.bucket[0] - left
    return [picture.size[1], picture.size[0], top, left, picture.bucket[1], picture.bucket[0]]
