"""A training's keys, as kohya's sd-scripts names them, as one typed object that checks itself (contract 12.2).

What is not given has kohya's own default. Sections of a TOML file only group keys: they are flattened, later ones win.
Each key is honoured, or mapped to what comes closest (`notes` says how), or refused by name; what nobody here knows is
listed in `unknown`.
"""

from __future__ import annotations

import tomllib
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from services.common.errors import InvalidArgument
from services.common.payloads import network_args, samplers
from services.common.payloads.showing import sentence, shown

LORA_MODULE = "networks.lora"
OPTIMIZERS = ("AdamW", "AdamW8bit", "Adafactor", "Lion", "Prodigy")
SCHEDULERS = (
    "constant", "constant_with_warmup", "cosine", "cosine_with_restarts", "linear", "piecewise_constant", "polynomial",
)  # fmt: skip
# kohya's names of samplers, with A1111's.
_SAMPLERS = {
    "ddim": "DDIM", "pndm": "PLMS", "lms": "LMS", "euler": "Euler", "euler_a": "Euler a", "heun": "Heun",
    "dpm_2": "DPM2", "dpm_2_a": "DPM2 a", "dpmsolver": "DPM++ 2M", "dpmsolver++": "DPM++ 2M", "dpmsingle": "DPM++ 2M",
}  # fmt: skip
_TOKENS = (75, 150, 225)
_WITHOUT_WARMUP = {"constant", "piecewise_constant"}
_OFF = {"false", "0", "0.0", "no", "none", "off", ""}  # where clients send truths and numbers as text
_MAX_PIXELS = 2048 * 2048
_MAX_NAME_BYTES = 200  # systems take 255, of which an epoch's number and endings need some
_PROMPT_FILES = (".txt", ".toml", ".json")  # of kohya; only by hand there are files, and those of lines are read before
_ALIASES = {
    "caption_extention": "caption_extension",  # kohya spelled it so once
    "lr_restart_cycles": "lr_scheduler_num_cycles",
}
_SUBSETS = (
    "what it says belongs into this configuration, batch_size as train_batch_size, and each subset is a folder "
    "<num_repeats>_<class_tokens> of train_data_dir or, with is_reg, of reg_data_dir"
)
# What would change the result and cannot be had, when it is on, and what is possible instead.
_REFUSED = {
    "v2": "Stable Diffusion 2 is not known here; possible base models: Stable Diffusion 1.5, SDXL",
    "color_aug": "colours are not augmented; set it to false",
    "random_crop": "pictures are cropped at their centre; set it to false",
    "face_crop_aug_range": "faces are not looked for; leave it out",
    "in_json": "captions are in files beside the pictures; leave it out",
    "dataset_config": _SUBSETS,
    "datasets": _SUBSETS,
    "network_weights": "a training begins with a fresh network; leave it out",
    "weighted_captions": "captions are plain text; set it to false",
    "zero_terminal_snr": "the noise schedule is the base model's own; set it to false",
    "ip_noise_gamma": "it is not supported; leave it out",
    "debiased_estimation_loss": "it is not supported; leave it out",
    "masked_loss": "pictures are trained whole; set it to false",
    "token_warmup_step": "captions have all their tags from the first step on; set it to 0",
    "scale_v_pred_loss_like_noise_pred": "it is not supported; leave it out",
    "v_pred_like_loss": "it is not supported; leave it out",
    "loraplus_lr_ratio": "both factors of a layer have one learning rate; leave it out",
    "loraplus_unet_lr_ratio": "both factors of a layer have one learning rate; leave it out",
    "loraplus_text_encoder_lr_ratio": "both factors of a layer have one learning rate; leave it out",
    "deepspeed": "a training runs on one device; set it to false",
    "base_weights": "a training begins with the base model as it is; leave it out",
    "resume": "a training goes on by itself, or by hand with the option --resume; leave it out",
    "caption_prefix": "captions are what their files say; leave it out",
    "caption_suffix": "captions are what their files say; leave it out",
    "enable_wildcard": "captions are what their files say; set it to false",
    "keep_tokens_separator": "keep_tokens says how many tags stay in front; leave it out",
    "secondary_separator": "tags have one separator, caption_separator; leave it out",
    "alpha_mask": "pictures are trained whole; set it to false",
    "noise_offset_random_strength": "noise_offset is the same at every step; set it to false",
    "lr_scheduler_type": "possible are the schedules of lr_scheduler; leave it out",
    "use_8bit_adam": "leave it out and set optimizer_type to AdamW8bit",
    "use_lion_optimizer": "leave it out and set optimizer_type to Lion",
}
# What only says how kohya's own process does its work, or its GUI, or how that does which is refused here.
_WITHOUT_EFFECT = {
    "async_upload", "base_weights_multiplier", "cache_latents_to_disk", "cache_text_encoder_outputs",
    "cache_text_encoder_outputs_to_disk", "console_log_file", "console_log_level", "console_log_simple",
    "cpu_offload_checkpointing", "dataset_repeats", "ddp_gradient_as_bucket_view", "ddp_static_graph", "ddp_timeout",
    "debug_dataset", "dim_from_weights", "disable_mmap_load_safetensors", "dynamo_backend", "epoch", "fp8_base",
    "fp8_base_unet", "full_bf16", "full_fp16", "fused_backward_pass", "highvram", "huber_c", "huber_scale",
    "huber_schedule", "huggingface_path_in_repo", "huggingface_repo_id", "huggingface_repo_type",
    "huggingface_repo_visibility", "huggingface_token", "ip_noise_gamma_random_strength", "log_config",
    "log_tracker_config", "log_tracker_name", "log_with", "lowvram", "max_data_loader_n_workers", "noise_offset_type",
    "persistent_data_loader_workers", "resume_from_huggingface", "save_last_n_epochs_state",
    "save_last_n_steps_state", "save_state_on_train_end", "save_state_to_huggingface", "sdpa", "sdxl",
    "skip_cache_check", "stop_text_encoder_training", "token_warmup_min", "tokenizer_cache_dir", "torch_compile",
    "vae_batch_size", "wandb_api_key", "wandb_run_name",
}  # fmt: skip
_ABOUT_KOHYA = "said to kohya's own process or GUI, and without effect here"
_NOTES = {
    "xformers": "xformers: attention is computed by torch's scaled_dot_product_attention, which needs no xformers",
    "mem_eff_attn": "mem_eff_attn: attention is computed by torch's scaled_dot_product_attention",
    "lowram": "lowram: the model is read straight to the device, so there is nothing to save",
    "save_state": "save_state: what a training needs to go on is kept after every epoch, whatever this says",
    "no_metadata": "no_metadata: a file always says how it was made, whatever this says",
    "sample_every_n_steps": "sample_every_n_steps: previews are drawn after epochs; sample_every_n_epochs says which",
    "sample_at_first": "sample_at_first: previews are drawn after epochs; sample_every_n_epochs says which",
    "network_dropout": "network_dropout: it is applied to the input of a layer, not between its two factors",
}


class Training(BaseModel):
    """One training. Times are in epochs and steps, sizes in pixels; a step is one change of the weights."""

    model_config = ConfigDict(frozen=True, extra="ignore", allow_inf_nan=False, protected_namespaces=())

    # Keys that nobody here knows.
    unknown: list[str] = []
    # Sentences on keys that are mapped to something else.
    notes: list[str] = []

    # --- files and folders; a training of the service has its own ---
    pretrained_model_name_or_path: str = ""
    vae: str = ""
    train_data_dir: str = ""
    reg_data_dir: str = ""
    output_dir: str = "output"
    output_name: str = Field("last", min_length=1, max_length=100)
    logging_dir: str = ""
    log_prefix: str = Field("", max_length=100)

    # --- the pictures and their captions ---
    resolution: tuple[int, int] = (512, 512)  # width, height
    enable_bucket: bool = False
    min_bucket_reso: int = Field(256, ge=8, le=4096)
    max_bucket_reso: int = Field(1024, ge=8, le=4096)
    bucket_reso_steps: int = Field(64, ge=8, le=1024, multiple_of=8)
    bucket_no_upscale: bool = False
    flip_aug: bool = False
    cache_latents: bool = False
    no_half_vae: bool = False
    prior_loss_weight: float = Field(1.0, ge=0, le=100)
    caption_extension: str = Field(".caption", max_length=100)
    caption_separator: str = Field(",", min_length=1, max_length=10)
    shuffle_caption: bool = False
    keep_tokens: int = Field(0, ge=0, le=1000)
    caption_dropout_rate: float = Field(0.0, ge=0, le=1)
    caption_dropout_every_n_epochs: int = Field(0, ge=0, le=1_000_000)
    caption_tag_dropout_rate: float = Field(0.0, ge=0, le=1)
    # Tokens of a caption that are read, in chunks of 75.
    max_token_length: Literal[75, 150, 225] = 75
    clip_skip: int = Field(1, ge=1, le=12)

    # --- the network ---
    network_module: Literal["networks.lora", "lycoris.kohya"] = "networks.lora"
    network_dim: int = Field(4, ge=1, le=network_args.MAX_DIM)
    network_alpha: float = Field(1.0, ge=0, le=4096)  # 0: as network_dim
    network_dropout: float = Field(0.0, ge=0, lt=1)
    network_args: dict[str, str] = {}
    network_train_unet_only: bool = False
    network_train_text_encoder_only: bool = False

    # --- optimizing ---
    seed: int = Field(0, ge=0, le=2**32 - 1)
    train_batch_size: int = Field(1, ge=1, le=256)
    gradient_accumulation_steps: int = Field(1, ge=1, le=10_000)
    gradient_checkpointing: bool = False
    max_grad_norm: float = Field(1.0, ge=0, le=1e6)  # 0: any
    scale_weight_norms: float = Field(0.0, ge=0, le=1e6)  # the largest norm of what is added to a layer; 0: any
    max_train_epochs: int | None = Field(None, ge=1, le=1_000_000)
    max_train_steps: int = Field(1600, ge=1, le=100_000_000)  # where no epochs are given
    optimizer_type: str = "AdamW"
    optimizer_args: dict[str, str] = {}
    learning_rate: float = Field(2e-6, ge=0, le=100)
    unet_lr: float | None = Field(None, ge=0, le=100)
    text_encoder_lr: float | None = Field(None, ge=0, le=100)
    lr_scheduler: str = "constant"
    lr_warmup_steps: float = Field(0, ge=0, le=100_000_000)  # below 1: a part of all steps
    lr_scheduler_num_cycles: int = Field(1, ge=1, le=10_000)
    lr_scheduler_power: float = Field(1.0, ge=0, le=100)
    lr_scheduler_args: dict[str, str] = {}
    mixed_precision: Literal["no", "fp16", "bf16"] = "no"

    # --- the loss ---
    v_parameterization: bool = False
    noise_offset: float = Field(0.0, ge=0, le=10)
    adaptive_noise_scale: float = Field(0.0, ge=-10, le=10)  # of noise_offset: how much the latents' means add to it
    multires_noise_iterations: int = Field(0, ge=0, le=100)  # how many coarser noises are added
    multires_noise_discount: float = Field(0.3, ge=0, le=10)  # what each of them counts of the one before
    loss_type: Literal["l2"] = "l2"
    min_snr_gamma: float | None = Field(None, ge=0, le=1000)  # 0: none
    min_timestep: int = Field(0, ge=0, le=999)
    max_timestep: int = Field(1000, ge=1, le=1000)

    # --- what is written ---
    save_every_n_epochs: int | None = Field(None, ge=1)
    save_n_epoch_ratio: int | None = Field(None, ge=0)
    save_last_n_epochs: int | None = Field(None, ge=1)
    save_every_n_steps: int | None = Field(None, ge=0)  # beside those of epochs; 0: none
    save_last_n_steps: int | None = Field(None, ge=0)  # files of steps that long ago are removed; 0: none
    save_precision: Literal["float", "fp16", "bf16"] = "float"
    save_model_as: str = "safetensors"
    training_comment: str = Field("", max_length=10_000)
    metadata_title: str = Field("", max_length=1000)
    metadata_author: str = Field("", max_length=1000)
    metadata_description: str = Field("", max_length=10_000)
    metadata_license: str = Field("", max_length=1000)
    metadata_tags: str = Field("", max_length=10_000)
    sample_every_n_epochs: int | None = Field(None, ge=0)
    sample_prompts: list[str] = []
    sample_sampler: str = "DDIM"

    @model_validator(mode="before")
    @classmethod
    def _one_spelling(cls, fields: dict[str, Any]) -> dict[str, Any]:
        texts = {name for name, field in cls.model_fields.items() if isinstance(field.default, str)}
        given = {  # kohya's GUI has an empty text where there is no number
            name: value for name, value in fields.items() if value is not None and (value != "" or name in texts)
        }
        refused = [name for name in _REFUSED if _is_on(given.get(name))]
        if refused:
            raise ValueError("; ".join(f"{name} {shown(given[name])}: {_REFUSED[name]}" for name in refused))
        for name, known in _ALIASES.items():
            if name in given:
                given.setdefault(known, given.pop(name))
        unknown = [
            name for name in given if name not in cls.model_fields and name not in _REFUSED.keys() | _NOTES.keys()
        ]
        given.setdefault("unknown", sorted(name for name in unknown if name not in _WITHOUT_EFFECT))
        notes = [note for name, note in _NOTES.items() if _is_on(given.get(name))]
        if {"learning_rate", "unet_lr", "text_encoder_lr"} <= given.keys():
            rates = f"unet_lr {shown(given['unet_lr'])} and text_encoder_lr {shown(given['text_encoder_lr'])}"
            notes.append(f"learning_rate: it does nothing beside {rates}; set those")
        schedule = str(given.get("lr_scheduler", "constant")).lower()
        if schedule in _WITHOUT_WARMUP and _is_on(given.get("lr_warmup_steps")):
            notes.append(f"lr_warmup_steps: lr_scheduler {schedule} has no warmup; constant_with_warmup has")
        if for_kohya := sorted(name for name in _WITHOUT_EFFECT if _is_on(given.get(name))):
            notes.append(f"{', '.join(for_kohya)}: {_ABOUT_KOHYA}")
        given.setdefault("notes", notes)
        if given.get("save_precision") == "fp32":
            given["save_precision"] = "float"
        return given

    @field_validator("resolution", mode="before")
    @classmethod
    def _two_sides(cls, value: Any) -> Any:
        sides = value.split(",") if isinstance(value, str) else value if isinstance(value, list | tuple) else [value]
        try:
            numbers = [int(side) for side in sides]
        except (TypeError, ValueError, OverflowError):
            numbers = []
        if len(numbers) == 1:
            numbers *= 2
        if len(numbers) != 2 or min(numbers) < 64 or numbers[0] * numbers[1] > _MAX_PIXELS:
            raise ValueError(
                f'resolution {shown(value)} is none; possible: one side, or "width,height", each at least 64 and '
                f"together at most {_MAX_PIXELS} pixels"
            )
        return tuple(numbers)

    @field_validator("max_token_length", mode="before")
    @classmethod
    def _tokens(cls, value: Any) -> Any:
        """The number, which may be text as any other may."""
        return next((known for known in _TOKENS if str(known) == value), value)

    @field_validator("text_encoder_lr", mode="before")
    @classmethod
    def _one_rate(cls, value: Any) -> Any:
        """kohya's GUI writes one for each text encoder."""
        if not isinstance(value, list):
            return value
        if len(set(map(str, value))) > 1:
            raise ValueError(
                f"text_encoder_lr {shown(value)}: all text encoders have one learning rate; give one number"
            )
        return value[0] if value else None

    @field_validator("network_args", "optimizer_args", "lr_scheduler_args", mode="before")
    @classmethod
    def _pairs(cls, value: Any, info: Any) -> Any:
        """kohya's list of `name=value`."""
        if isinstance(value, dict):
            return {name: str(inner) for name, inner in value.items()}
        listed = value.split() if isinstance(value, str) else value
        if not isinstance(listed, list) or not all(isinstance(pair, str) and "=" in pair for pair in listed):
            raise ValueError(f'{info.field_name} {shown(value)} is not a list of "name=value"')
        return {name.strip(): inner.strip() for name, _, inner in (pair.partition("=") for pair in listed)}

    @field_validator("network_args")
    @classmethod
    def _arguments(cls, arguments: dict[str, str]) -> dict[str, str]:
        return network_args.checked(arguments)

    @field_validator("lr_scheduler_args")
    @classmethod
    def _rules(cls, arguments: dict[str, str]) -> dict[str, str]:
        if others := sorted(arguments.keys() - {"step_rules"}):
            raise ValueError(f"lr_scheduler_args {', '.join(others)} is not possible; possible: step_rules")
        return arguments

    @field_validator("sample_prompts", mode="before")
    @classmethod
    def _lines(cls, value: Any) -> Any:
        listed = value.splitlines() if isinstance(value, str) else value
        if isinstance(value, str) and len(listed) == 1 and value.rstrip().lower().endswith(_PROMPT_FILES):
            raise ValueError(
                f"sample_prompts {shown(value)} is no prompt; possible: prompts, one a line, or by hand the path of a "
                ".txt file with them"
            )
        if not isinstance(listed, list) or not all(isinstance(line, str) for line in listed):
            raise ValueError(
                f"sample_prompts {shown(value)} is neither a text with a prompt in each line nor a list of prompts"
            )
        return [line.strip() for line in listed if line.strip() and not line.strip().startswith("#")]

    @field_validator("output_name", "log_prefix")
    @classmethod
    def _file_name(cls, name: str, info: Any) -> str:
        if not _is_file_name(name):
            raise ValueError(f"{info.field_name} {shown(name)} cannot be the name of a file")
        return name

    @field_validator("caption_extension")
    @classmethod
    def _ending(cls, extension: str) -> str:
        """With its dot, without which no caption would be found."""
        ending = extension.removeprefix(".")
        if not ending or not _is_file_name(ending):
            raise ValueError(f"caption_extension {shown(extension)} cannot be the end of a file's name")
        return f".{ending}"

    @field_validator("sample_sampler")
    @classmethod
    def _sampler(cls, name: str) -> str:
        return samplers.find(sampler_name(name), None, "sample_sampler")

    @field_validator("optimizer_type", "lr_scheduler", "save_model_as")
    @classmethod
    def _possible(cls, name: str, info: Any) -> str:
        possible = {
            "optimizer_type": OPTIMIZERS,
            "lr_scheduler": SCHEDULERS,
            "save_model_as": ("safetensors",),
        }[info.field_name]
        found = next((known for known in possible if known.lower() == name.lower()), None)
        if found is None:
            raise ValueError(f"{info.field_name} {shown(name)} is not possible; possible: {', '.join(possible)}")
        return found

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.network_train_unet_only and self.network_train_text_encoder_only:
            raise ValueError(
                "network_train_unet_only and network_train_text_encoder_only are both true: nothing would be trained"
            )
        if self.min_timestep >= self.max_timestep:
            raise ValueError(f"min_timestep {self.min_timestep} is not below max_timestep {self.max_timestep}")
        if self.adaptive_noise_scale and not self.noise_offset:
            raise ValueError(
                f"adaptive_noise_scale {self.adaptive_noise_scale} changes noise_offset, which is 0; give both or none"
            )
        if self.min_bucket_reso > self.max_bucket_reso:
            raise ValueError(
                f"min_bucket_reso {self.min_bucket_reso} is larger than max_bucket_reso {self.max_bucket_reso}"
            )
        largest = -(-self.max_bucket_reso // self.bucket_reso_steps) * self.bucket_reso_steps
        if self.enable_bucket and not self.bucket_no_upscale and largest < max(self.resolution):
            width, height = self.resolution
            raise ValueError(
                f"max_bucket_reso {self.max_bucket_reso} is smaller than a side of the resolution {width}x{height}; "
                f"possible: {max(self.resolution)} or more"
            )
        if (
            self.optimizer_type == "Prodigy"
            and self.trains_unet
            and self.trains_text
            and len({self.unet_rate, self.text_rate} - {0.0}) > 1
        ):
            raise ValueError(
                f"optimizer_type Prodigy finds the learning rate itself: unet_lr {self.unet_rate} and text_encoder_lr "
                f"{self.text_rate} must be the same, or one of them 0; 1.0 is usual"
            )
        if self.optimizer_type == "Adafactor" and _is_on(self.optimizer_args.get("relative_step", "True")):
            raise ValueError(
                "optimizer_type Adafactor is possible with relative_step=False in optimizer_args, without which it "
                "heeds no learning rate; scale_parameter=False relative_step=False warmup_init=False is usual"
            )
        if self.network_module == LORA_MODULE and self.network_args.keys() - {"conv_dim", "conv_alpha"}:
            raise ValueError(
                "network_args of networks.lora are conv_dim and conv_alpha; others need network_module lycoris.kohya"
            )
        network_args.check_dropout(self.network_dropout, self.algorithm)
        network_args.check_dim(self.network_dim, self.network_args)
        return self

    @property
    def algorithm(self) -> str:
        """The kind of network."""
        return network_args.kind_of(self.network_args)

    @property
    def unet_rate(self) -> float:
        """The learning rate of the UNet's part of the network."""
        return self.learning_rate if self.unet_lr is None else self.unet_lr

    @property
    def text_rate(self) -> float:
        """The learning rate of the text encoders' part."""
        return self.learning_rate if self.text_encoder_lr is None else self.text_encoder_lr

    @property
    def trains_unet(self) -> bool:
        """Whether the network has a part for the UNet."""
        return not self.network_train_text_encoder_only

    @property
    def trains_text(self) -> bool:
        """Whether the network has a part for the text encoders."""
        return not self.network_train_unet_only


def _is_on(value: Any) -> bool:
    """Whether a key asks for something."""
    return value.strip().lower() not in _OFF if isinstance(value, str) else bool(value)


def _is_file_name(text: str) -> bool:
    """Whether it can be the name of a file, or a part of it, in every system."""
    is_short = len(text.encode()) <= _MAX_NAME_BYTES
    return (
        is_short and not text.startswith(".") and not any(letter in '/\\:*?"<>|' or ord(letter) < 32 for letter in text)
    )


def sampler_name(name: str) -> str:
    """A1111's name for one of kohya's samplers; another name stays as it is."""
    return _SAMPLERS.get(name.lower().removeprefix("k_"), name)


def flattened(sections: dict[str, Any]) -> dict[str, Any]:
    """The keys of all sections in one; later ones win, as in kohya."""
    flat: dict[str, Any] = {}
    for name, value in sections.items():
        flat |= value if isinstance(value, dict) else {name: value}
    return flat


def check_training(fields: dict[str, Any]) -> Training:
    """The training of flat keys.

    Raises:
        InvalidArgument: the message names each wrong key with its value and what is possible.
    """
    try:
        return Training.model_validate(fields)
    except ValidationError as error:
        raise InvalidArgument("; ".join(sentence(problem, Training) for problem in error.errors())) from None


def parse_toml(content: str) -> dict[str, Any]:
    """The flat keys of a TOML file.

    Raises:
        InvalidArgument: it is no TOML; the message says where.
    """
    try:
        return flattened(tomllib.loads(content))
    except tomllib.TOMLDecodeError as error:
        raise InvalidArgument(f"the configuration is not valid TOML: {error}") from None
