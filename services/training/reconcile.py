"""What nobody waits for: looks after tasks, and does what follows the end of a training.

Everything here may be done twice, or by two replicas at once, or be cut short and done again.
"""

from __future__ import annotations

from datetime import timedelta

import structlog

from services.common.blobs import Blobs
from services.common.errors import EsdError, Unavailable
from services.common.leftovers import LeftoverStore, Sweeper
from services.common.notifications import Notifications
from services.common.tasks import heard
from services.training import rows
from services.training.channels import TRAININGS_DUE
from services.training.peers import Models, Task, Tasks, TaskState
from services.training.rows import Training, now
from services.training.store import TrainingStore
from services.training.trainer_store import TrainerStore

log = structlog.get_logger()

ATTEMPTS = 3
_ROUND_SECONDS = 3.0
_MAX_PREPARATION = timedelta(minutes=2)  # that a request may take from its row to the beginning
_MAX_LEAVING = timedelta(minutes=1)  # that a trainer may take after a stop to upload what it had saved
_SWEEP_ROUNDS = 20  # rounds between two looks at old objects
_CUT_SHORT = "a deletion stopped it, but could not be finished; delete it again"
_LEFT = "the trainer left without having told how the training ended"


class ControlLoop:
    """The control loop of trainings."""

    def __init__(
        self,
        store: TrainingStore,
        trainers: TrainerStore,
        leftovers: LeftoverStore,
        blobs: Blobs,
        models: Models,
        tasks: Tasks,
        notifications: Notifications,
    ) -> None:
        self._store = store
        self._trainers = trainers
        self._blobs = blobs
        self._models = models
        self._tasks = tasks
        self._notifications = notifications
        self._sweeper = Sweeper(leftovers, blobs)

    async def run(self) -> None:
        """Looks at all trainings that are not settled, whenever one is due and every few seconds, until cancelled."""
        with self._notifications.subscribed((TRAININGS_DUE, "")) as due:
            number = 0
            while True:
                try:
                    for training in await self._trainers.unsettled():
                        await self._reconcile(training)
                    if number % _SWEEP_ROUNDS == 0:
                        await self._sweeper.sweep()
                except Unavailable as error:
                    log.warning("trainings wait", reason=str(error))
                number += 1
                await heard(due, _ROUND_SECONDS)

    async def start(self, training: Training) -> Task:
        """Asks for the training's task; one that was asked for before stays as it is.

        Raises:
            Unavailable: the endpoints service does not answer.
        """
        seconds = training.deadline_seconds or 0
        return await self._tasks.start(str(training.id), training.instance_type, ATTEMPTS, seconds)

    async def delete(self, training: Training) -> None:
        """Deletes a training: its task leaves, its configuration goes, and what it saved unless a checkpoint has it.

        Raises:
            Unavailable: another service does not answer; the training is still there, though it may be stopped.
        """
        await self._tasks.stop(str(training.id))
        if not training.is_settled and training.files:
            await self._settle_checkpoint(training)
        was_kept = await self._models.delete_checkpoint(str(training.id))
        prefixes = [training.input_prefix, training.work_prefix, *([] if was_kept else [training.output_prefix])]
        await self._store.delete(training.id, prefixes)
        await self._sweeper.remove(prefixes)

    async def discard(self, training: Training) -> None:
        """Removes what there is of a training that could not begin; what cannot be removed now is later."""
        try:
            await self._store.withdraw(training.id)
            await self.delete(training)
        except EsdError as error:
            log.warning("a training that did not begin leaves something", training=str(training.id), reason=str(error))

    async def _reconcile(self, training: Training) -> None:
        """Does what is due for one training; what fails is tried again in the next round."""
        try:
            if not training.is_begun:
                if now() - training.create_time > _MAX_PREPARATION:
                    await self.delete(training)
            elif not training.is_ended:
                await self._follow(training)
            elif not await self._is_awaited(training):
                await self._settle(training)
        except EsdError as error:
            log.warning("a training waits", training=str(training.id), reason=str(error))

    async def _follow(self, training: Training) -> None:
        """Learns from the task what the trainer cannot tell."""
        training_id = str(training.id)
        task = await self._tasks.get(training_id)
        if task is None:
            task = await self.start(training)
        match task.state:
            case TaskState.WAITING:
                await self._trainers.wait(training.id, task.reason)
            case TaskState.RUNNING:
                await self._trainers.wait(training.id, "")
            case TaskState.FAILED:
                await self._store.end(training.id, rows.FAILED, f"the trainer failed: {task.reason}")
            case TaskState.STOPPED:  # by a deletion, which another service has kept from its end
                await self._store.end(training.id, rows.STOPPED, _CUT_SHORT)
            case TaskState.SUCCEEDED:
                await self._store.end(training.id, rows.FAILED, _LEFT)

    async def _is_awaited(self, training: Training) -> bool:
        """Whether a trainer that was told to stop is about to tell of what it had saved before."""
        if not training.is_leaving or training.end_time is None or now() - training.end_time > _MAX_LEAVING:
            return False
        task = await self._tasks.get(str(training.id))
        return task is not None and task.state == TaskState.RUNNING

    async def _settle(self, training: Training) -> None:
        """Fills the checkpoint, lets the task go, removes what only trainers need; then the end may be shown."""
        outcome, reason = await self._settle_checkpoint(training)
        await self._tasks.stop(str(training.id))
        await self._sweeper.discard([training.work_prefix])
        await self._trainers.settle(training.id, outcome, reason)
        log.info("a training has ended", training=str(training.id), outcome=outcome, reason=reason)

    async def _settle_checkpoint(self, training: Training) -> tuple[str, str]:
        """Fills the checkpoint with what was saved; answers how the training has ended after all."""
        files = [(file["name"], file["sha256"]) for file in training.networks]
        why = training.reason or "the training left no file"
        names, refusal = await self._models.finish_checkpoint(str(training.id), files, why)
        if training.outcome == rows.COMPLETED and not names and refusal:
            return rows.FAILED, refusal
        return training.outcome or rows.STOPPED, training.reason
