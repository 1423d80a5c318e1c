"""From a request, in the document's shape (A) or the WebUI client's (B), to what is trained with which keys, and to the
params that both kinds of clients can read (contract 7, 12.2).
"""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from importlib import resources
from typing import Any

import tomli_w

from services.common.errors import InvalidArgument
from services.common.payloads.training import Training, check_training, flattened
from services.common.structs import MAX_PARAMS_BYTES, check_params

SD15, SDXL = "sd_1_5", "sd_xl"
KOHYA = "kohya"
DEFAULT_INSTANCE_TYPE = "ml.g4dn.2xlarge"
_TEMPLATES = {SD15: "kohya_config_cloud.toml", SDXL: "kohya_config_cloud_xl.toml"}
_DOCUMENT_FIELDS = ("fm_type", "s3_model_path", "s3_data_path")
_CLIENT_FIELDS = ("training_instance_type", "model", "dataset", "fm_type")
_CLIENT_CONFIG = (
    ("saving_arguments", "output_name"),
    ("saving_arguments", "save_every_n_epochs"),
    ("training_arguments", "max_train_epochs"),
)
# What a trainer has of its own, whatever the keys say, and what is taken instead.
_INSTEAD = {
    "pretrained_model_name_or_path": "the base model is the one that training_params name",
    "train_data_dir": "the pictures are those of the dataset that training_params name",
    "output_dir": "the results are in the training's output_location",
    "logging_dir": "the curves are in the folder logs of the training's output_location",
}
_OWN = {*_INSTEAD, "reg_data_dir"}
# Of other services, which whoever sees the training would see. They are not kept.
_SECRETS = {"huggingface_token", "wandb_api_key"}
_MAX_VALUES = 1000  # of params: kohya has two hundred keys


@dataclass(frozen=True)
class Wish:
    """What a request asks for. The model and the dataset are named by S3 paths (A), or by a file's and a dataset's
    name (B), of which the others are empty."""

    training_params: dict[str, Any]
    config_params: dict[str, Any]
    s3_model_path: str = ""
    s3_data_path: str = ""
    model: str = ""
    dataset: str = ""

    @property
    def keys(self) -> dict[str, Any]:
        """kohya's keys, in one section. On the wire sections have no order: `training` comes first, so that those of
        the client's shape win over it, then the others by their names."""
        names = sorted(self.config_params, key=lambda name: (name != "training", name))
        return flattened({name: self.config_params[name] for name in names})

    @property
    def instance_type(self) -> str:
        """The resource profile."""
        return str(self.training_params.get("training_instance_type") or DEFAULT_INSTANCE_TYPE)

    @property
    def fm_type(self) -> str:
        """sd_1_5 or sd_xl.

        Raises:
            InvalidArgument: it is neither.
        """
        given = self.training_params["fm_type"]
        found = str(given).lower()
        if found not in _TEMPLATES:
            raise InvalidArgument(f"Invalid fm_type {given}, the valid values are {SD15} and {SDXL}")
        return found


def check_type(lora_train_type: str) -> None:
    """Refuses what is no kind of training.

    Raises:
        InvalidArgument.
    """
    if lora_train_type.lower() != KOHYA:
        raise InvalidArgument(f"Invalid lora train type: {lora_train_type}, the valid value is {KOHYA}.")


def read_wish(params: dict[str, Any]) -> Wish:
    """The wish in a request's params.

    Raises:
        InvalidArgument: something is missing, or of another type than it should have, or there is too much.
    """
    check_params(params, max_bytes=MAX_PARAMS_BYTES // 2, max_values=_MAX_VALUES)  # the keys are shown twice
    training_params = _section(params, "training_params")
    config_params = _section(params, "config_params")
    for name, section in config_params.items():
        if not isinstance(section, dict):
            raise InvalidArgument(f"config_params.{name} is no object with kohya's keys")
        config_params[name] = {key: value for key, value in section.items() if key not in _SECRETS}
    is_client = "model" in training_params or "dataset" in training_params
    is_client = is_client or (
        "saving_arguments" in config_params and not {"s3_model_path", "s3_data_path"} & training_params.keys()
    )
    if not is_client:
        if any(not training_params.get(name) for name in _DOCUMENT_FIELDS):
            raise InvalidArgument(
                "Missing train parameters, fm_type, s3_model_path and s3_data_path should be in training_params"
            )
        return Wish(
            training_params,
            config_params,
            s3_model_path=str(training_params["s3_model_path"]),
            s3_data_path=str(training_params["s3_data_path"]),
        )
    for name in _CLIENT_FIELDS:
        if not training_params.get(name):
            raise InvalidArgument(f"Missing training_params.{name}")
    for section, name in _CLIENT_CONFIG:
        if not config_params.get(section, {}).get(name):
            raise InvalidArgument(f"Missing config_params.{section}.{name}")
    return Wish(
        training_params, config_params, model=str(training_params["model"]), dataset=str(training_params["dataset"])
    )


def configured(wish: Wish) -> tuple[Training, str]:
    """The checked configuration, and the TOML file of it: the template of the base model with the request's keys.

    Raises:
        InvalidArgument: a key has a wrong value; the message names it.
    """
    name = _TEMPLATES[wish.fm_type]
    template = tomllib.loads((resources.files("services.training") / "templates" / name).read_text())["training"]
    keys = {key: value for key, value in wish.keys.items() if value not in (None, "")}  # as if they were not given
    if keys.get("vae"):
        raise InvalidArgument(f"vae {keys['vae']!r}: the VAE is the base model's own; leave it out")
    if "max_train_steps" in keys and "max_train_epochs" not in keys:
        del template["max_train_epochs"]  # which would win
    merged = template | keys
    checked = check_training({key: value for key, value in merged.items() if key not in _OWN})
    notes = [f"{key}: {_INSTEAD[key]}" for key in _INSTEAD if keys.get(key)]
    checked = checked.model_copy(update={"notes": [*checked.notes, *notes]})
    return checked, tomli_w.dumps({"training": _writable(merged)})


def template_name(fm_type: str) -> str:
    """The name of the TOML file."""
    return _TEMPLATES[fm_type]


def shown_params(
    wish: Wish, config: Training, s3_model_path: str, s3_data_path: str, s3_toml_path: str
) -> dict[str, Any]:
    """The params as they are shown, numbers as sent. Whatever the request's shape, `training` has all its keys, and
    `saving_arguments.output_name` is there, which the WebUI client reads of every training without asking."""
    kept = {name: value for name, value in wish.training_params.items() if name not in {"model", "dataset"}}
    paths = {"s3_model_path": s3_model_path, "s3_data_path": s3_data_path, "s3_toml_path": s3_toml_path}
    saving = {"output_name": config.output_name} | wish.config_params.get("saving_arguments", {})
    sections = wish.config_params | {"saving_arguments": saving, "training": wish.keys}
    return {
        "training_params": {"training_instance_type": wish.instance_type} | kept | paths,
        "config_params": sections,
        "training_type": KOHYA,
    }


def _section(params: dict[str, Any], name: str) -> dict[str, Any]:
    section = params.get(name)
    if section is None:
        return {}
    if not isinstance(section, dict):
        raise InvalidArgument(f"params.{name} is no object")
    return section


def _writable(value: Any) -> Any:
    """A JSON value as TOML can have it, which knows no null."""
    if isinstance(value, dict):
        return {key: _writable(inner) for key, inner in value.items() if inner is not None}
    if isinstance(value, list):
        return [_writable(inner) for inner in value if inner is not None]
    return value
