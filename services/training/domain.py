"""The users' side of trainings: who may do what with which, on what they are trained, and with which keys."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any
from uuid import uuid4

from services.common.blobs import Blobs
from services.common.errors import EsdError, InvalidArgument, NotFound, PermissionDenied
from services.common.ids import parse_id
from services.common.paging import KeyNames, make_key, parse_key, parse_limit
from services.common.payloads.models import BASE
from services.common.structs import num_values
from services.common.validation import shortened
from services.common.viewer import Viewer
from services.training.configuration import Wish, check_type, configured, read_wish, shown_params, template_name
from services.training.peers import Model, Models
from services.training.reconcile import ControlLoop
from services.training.rows import STOPPED, Metric, Training
from services.training.store import TrainingStore

STOPPED_BY = "stopped by {}"
_KEY_NAMES = KeyNames("id", "created")
_DEFAULT_POINTS, _MAX_POINTS = 1000, 10_000
_MAX_PAGE_VALUES = 50_000  # of the params in a list, about a second's work
_MODEL_PATH = re.compile(rf"(?P<folder>{BASE}/checkpoint/custom/[^/]+)/(?P<name>[^/]+)")
_DATA_PATH = re.compile(r"dataset/(?P<name>[A-Za-z][A-Za-z0-9_-]{0,19})/?")


@dataclass(frozen=True)
class Inputs:
    """What a training is made from."""

    model: Model
    s3_model_path: str
    dataset_prefix: str
    s3_data_path: str
    regularisation_prefix: str


class Trainings:
    """Trainings as their users see them. `max_seconds` is the most that one may take, `max_per_user` how many of one
    user may wait or run; 0: any."""

    def __init__(
        self,
        store: TrainingStore,
        blobs: Blobs,
        models: Models,
        control: ControlLoop,
        max_seconds: int = 0,
        max_per_user: int = 0,
    ) -> None:
        self._store = store
        self._blobs = blobs
        self._models = models
        self._control = control
        self._max_seconds = max_seconds
        self._max_per_user = max_per_user

    def input_location(self, training: Training) -> str:
        """The folder of the configuration, `s3://…`."""
        return self._blobs.url(training.input_prefix.rstrip("/"))

    def output_location(self, training: Training) -> str:
        """The folder of the results, `s3://…`."""
        return self._blobs.url(training.output_prefix.rstrip("/"))

    def picture_url(self, training: Training, name: str) -> str:
        """A URL of a preview, for an hour."""
        return self._blobs.presign_get(training.output_prefix + name)

    async def create_job(
        self, lora_train_type: str, params: dict[str, Any], deadline_seconds: int | None, user: Viewer
    ) -> Training:
        """Begins a training: its name is taken, its configuration written, its task asked for.

        Raises:
            InvalidArgument: something of the request is wrong. FailedPrecondition: the name is in use.
            ResourceExhausted: the user has too many. Unavailable: another service does not answer. Nothing is left
            then, once the others answer again.
        """
        check_type(lora_train_type)
        wish = read_wish(params)
        inputs = await self._inputs(wish, user)
        fm_type = wish.fm_type
        config, toml = configured(wish)
        training_id = uuid4()
        training = Training(
            id=training_id,
            owner=user.name,
            params={},
            config=config.model_dump(mode="json"),
            fm_type=fm_type,
            instance_type=wish.instance_type,
            deadline_seconds=self._deadline(deadline_seconds),
            base=inputs.model.as_dict(),
            dataset_prefix=inputs.dataset_prefix,
            regularisation_prefix=inputs.regularisation_prefix,
        )
        toml_key = training.input_prefix + template_name(fm_type)
        training.params = shown_params(
            wish, config, inputs.s3_model_path, inputs.s3_data_path, self._blobs.url(toml_key)
        )
        await self._store.add(training, self._max_per_user)
        try:
            await self._models.create_checkpoint(str(training_id), training.last_file, user)
            await self._blobs.put(toml_key, toml.encode())
            await self._store.begin(training_id)
            await self._control.start(training)
        except EsdError:
            await self._control.discard(training)
            raise
        return training

    async def get_job(self, job_id: str, user: Viewer) -> Training:
        """The training.

        Raises:
            NotFound, PermissionDenied.
        """
        training = await self._find(job_id)
        if training is None:
            raise NotFound(f"Job with id {job_id} not found")
        _check_owner(training, user)
        return training

    async def list_jobs(self, limit: str, start_key: str, user: Viewer) -> tuple[list[Training], str | None]:
        """A page of trainings, newest first, and the key of the next one.

        Raises:
            InvalidArgument: a bad limit or key.
        """
        num = parse_limit(limit)
        after = parse_key(_KEY_NAMES, start_key)
        owner = None if user.sees_everything else user.name
        found = await self._store.page(owner, num + 1, after)
        shown = _fitting(found[:num])
        more = len(found) > len(shown)
        return shown, make_key(_KEY_NAMES, shown[-1].id, shown[-1].create_time) if more else None

    async def get_metrics(self, job_id: str, max_points: str, user: Viewer) -> tuple[list[Metric], int]:
        """The loss curve of a training, and how many steps are done.

        Raises:
            NotFound, PermissionDenied. InvalidArgument: a bad number of points.
        """
        training = await self.get_job(job_id, user)
        num = int(max_points) if re.fullmatch(r"[0-9]{1,9}", max_points) else 0
        if not max_points:
            num = _DEFAULT_POINTS
        if not 1 <= num <= _MAX_POINTS:
            raise InvalidArgument(f'max_points "{shortened(max_points)}" is not a whole number from 1 to {_MAX_POINTS}')
        return await self._store.curve(training.id, num)

    async def stop_job(self, job_id: str, user: Viewer) -> None:
        """Stops a training; one that has ended stays as it is. What it saved stays.

        Raises:
            NotFound, PermissionDenied.
        """
        training = await self._find(job_id)
        if training is None:
            raise NotFound(f"no such train job with id({job_id})")
        _check_owner(training, user)
        await self._store.end(training.id, STOPPED, STOPPED_BY.format(user.name))

    async def delete_jobs(self, job_ids: list[str], user: Viewer) -> None:
        """Stops and deletes trainings; unknown ids are skipped. What they saved stays where a checkpoint has it.

        Raises:
            PermissionDenied: one of them is somebody else's; none is deleted then.
        """
        found = [training for job_id in job_ids if (training := await self._find(job_id)) is not None]
        for training in found:
            _check_owner(training, user)
        for training in found:
            await self._control.delete(training)

    async def _find(self, job_id: str) -> Training | None:
        parsed = parse_id(job_id)
        return None if parsed is None else await self._store.get(parsed)

    def _deadline(self, wanted: int | None) -> int | None:
        """The stricter of what is wanted and of what is allowed."""
        bounds = [bound for bound in (wanted, self._max_seconds) if bound]
        return min(bounds) if bounds else None

    # --- what is trained on ---

    async def _inputs(self, wish: Wish, user: Viewer) -> Inputs:
        """Finds the model and the datasets; what the user may not see is not there.

        Raises:
            InvalidArgument.
        """
        if wish.model:
            model = await self._models.find_model(BASE, wish.model, user)
            if model is None:
                raise InvalidArgument("Model not found")
            prefix = await self._models.find_dataset(wish.dataset, user)
            if prefix is None:
                raise InvalidArgument("Dataset not found")
        else:
            model = await self._model_at(wish.s3_model_path, user)
            prefix = await self._dataset_at("s3_data_path", wish.s3_data_path, user)
        return Inputs(
            model=model,
            s3_model_path=wish.s3_model_path or f"{model.s3_location}/{model.name}",
            dataset_prefix=prefix,
            s3_data_path=wish.s3_data_path or self._blobs.url(prefix.rstrip("/")),
            regularisation_prefix=await self._regularisation(wish, user),
        )

    async def _model_at(self, path: str, user: Viewer) -> Model:
        match = _MODEL_PATH.fullmatch(path.removeprefix(self._blobs.url("")))
        model = None if match is None else await self._models.find_model(BASE, match["name"], user)
        if match is None or model is None or model.s3_location != self._blobs.url(match["folder"]):
            possible = self._blobs.url(f"{BASE}/checkpoint/custom/<id>/<file>")
            raise InvalidArgument(
                f'Model not found: s3_model_path "{path}" names no active checkpoint that you may use; possible: '
                f"{possible}"
            )
        return model

    async def _dataset_at(self, name: str, path: str, user: Viewer) -> str:
        match = _DATA_PATH.fullmatch(path.removeprefix(self._blobs.url("")))
        prefix = None if match is None else await self._models.find_dataset(match["name"], user)
        if prefix is None:
            possible = self._blobs.url("dataset/<name>")
            raise InvalidArgument(
                f'Dataset not found: {name} "{path}" names no dataset that you may use; possible: {possible}'
            )
        return prefix

    async def _regularisation(self, wish: Wish, user: Viewer) -> str:
        """The dataset of regularisation pictures, where the configuration names one."""
        path = wish.keys.get("reg_data_dir")
        return await self._dataset_at("reg_data_dir", str(path), user) if path else ""


def _fitting(trainings: list[Training]) -> list[Training]:
    """As many of the first ones as a page has room for; one in any case."""
    number = 0
    for index, training in enumerate(trainings):
        number += num_values(training.params)
        if index and number > _MAX_PAGE_VALUES:
            return trainings[:index]
    return trainings


def _check_owner(training: Training, user: Viewer) -> None:
    if training.owner != user.name and not user.sees_everything:
        raise PermissionDenied(f"training {training.id} belongs to another user than {user.name}")
