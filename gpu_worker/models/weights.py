"""From a checkpoint file to models in memory, without the network.

The state dict is read here, its architecture told from its names and shapes, and each component filled from it with
diffusers' converters; the configs come from this package, or from the file's own metadata (`esd_config`), because the
number of attention heads cannot be read from shapes.
"""

from __future__ import annotations

import gzip
import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

import structlog
import torch
from diffusers.loaders import single_file_utils
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from safetensors import SafetensorError, safe_open
from torch.overrides import TorchFunctionMode
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from gpu_worker import devices
from gpu_worker.files.cache import CachedModel
from gpu_worker.job import JobError
from gpu_worker.models import pickles
from gpu_worker.models.packed import Block

log = structlog.get_logger()

Weights = dict[str, torch.Tensor]
Config = dict[str, Any]

CONFIG_METADATA = "esd_config"
_UNET_IN = "model.diffusion_model.input_blocks.0.0.weight"
_CONTEXT = "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight"
_CLIP = "cond_stage_model.transformer."
_BIG_G = "conditioner.embedders.1.model."
_BIG_G_OF_REFINER = "conditioner.embedders.0.model."
# diffusers' converters from the original layout; they carry no types.
_convert: Any = single_file_utils
_PICKLE_STARTS = (b"PK", b"\x80")
_LENGTH_BYTES = 8
_PARTS = {"unet", "vae", "text_encoder", "text_encoder_2", "scheduler"}
_NUM_CONTEXT_SD2 = 1024
_NUM_CHANNELS_INPAINTING = 9


@dataclass(frozen=True)
class TextEncoder:
    """A CLIP text model with its tokenizer."""

    tokenizer: Any
    model: Any


@dataclass(frozen=True)
class Models:
    """A checkpoint in memory, for use on a device where `block` says that its weights are. SD1.5 has one text encoder,
    SDXL has two, of which SDXL's refiner has the second."""

    unet: Any
    vae: Any
    text_encoders: tuple[TextEncoder, ...]
    scheduler_config: Config
    device: torch.device
    dtype: torch.dtype
    # What moves between the host's memory and the device; nothing of models that were made where they are.
    block: Block = field(default_factory=lambda: Block((), torch.device("cpu"), moves=False))
    # Whether the job at hand wants a picture that can be laid beside itself.
    tiling: bool = False
    # A form of the VAE whose decoder is faster, for pictures of the size that the UNet was made for.
    fast_vae: Any = None

    def fast_vae_for(self, latents: torch.Tensor) -> Any:
        """That form, if it is there and these latents have the size."""
        size = self.unet.config.sample_size
        return self.fast_vae if tuple(latents.shape[2:]) == (size, size) else None

    def stay(self) -> None:
        """Brings the models to their device for good."""
        with devices.of(self.device.type).aside():
            self.block.enter()
        self.block.forget()

    @property
    def is_sdxl(self) -> bool:
        """Whether the UNet takes SDXL's pooled text and sizes."""
        return bool(self.unet.config.addition_embed_type == "text_time")

    @property
    def is_refiner(self) -> bool:
        """Whether the UNet takes an aesthetic score in the place of the picture's wanted size."""
        return self.is_sdxl and len(self.text_encoders) == 1

    @property
    def family(self) -> str:
        """What a LoRA, an embedding or a ControlNet must have been made for."""
        return ("sdxl_refiner" if self.is_refiner else "sdxl") if self.is_sdxl else "sd15"

    @property
    def is_inpainting(self) -> bool:
        """Whether the UNet also reads a mask and the latents of what stays."""
        return bool(self.unet.config.in_channels == _NUM_CHANNELS_INPAINTING)


def use_device(wanted: str, num_threads: int) -> tuple[str, str]:
    """The device for `auto`, `cpu` or `cuda` as torch's name and as a description; sets torch's threads.

    Raises:
        RuntimeError: CUDA was asked for and is not there.
    """
    if num_threads:
        torch.set_num_threads(num_threads)
    has_cuda = torch.cuda.is_available()
    if wanted == "cuda" and not has_cuda:
        raise RuntimeError("ESD_DEVICE=cuda, but torch finds no CUDA device on this machine")
    if wanted == "cpu" or not has_cuda:
        return "cpu", f"cpu: {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads"
    return "cuda", f"cuda: {torch.cuda.get_device_name()}"


def load(base: CachedModel, vae: CachedModel | None, device: str, dtype: torch.dtype | None = None) -> Models:
    """Reads a checkpoint, with the VAE of another file when one is given, into the host's memory. The type is that of
    the UNet and the text encoders; by default fp16 for CUDA, fp32 for the CPU.

    Raises:
        JobError: a file is damaged, or not of an architecture that this worker runs; the message names the file.
    """
    began = time.monotonic()
    weights, metadata = read(base.path, base.name)
    weights = _normalised(weights)
    config = _config(weights, metadata, base.name)
    dtype = dtype or dtype_of("auto", device)
    fill = _Filler(base.name, dtype)
    unet = fill(
        lambda: UNet2DConditionModel(**config["unet"]),
        "UNet",
        lambda: _convert.convert_ldm_unet_checkpoint(weights, config["unet"]),
    )
    decoder = _load_vae(weights, config, base, vae, vae_dtype(dtype, device))
    encoders = _load_text_encoders(weights, config, fill)
    models = assembled(unet, decoder, encoders, config["scheduler"], torch.device(device), dtype)
    log.info("model loaded", name=base.name, device=device, seconds=round(time.monotonic() - began, 2))
    return models


def assembled(
    unet: Any,
    vae: Any,
    text_encoders: tuple[TextEncoder, ...],
    scheduler_config: Config,
    device: torch.device,
    dtype: torch.dtype,
) -> Models:
    """Models of parts on the CPU, laid out as the device has it fastest."""
    if device.type == "cuda":
        # Not the VAE: a GPU's group norms copy large pictures to the other layout and back.
        unet.to(memory_format=torch.channels_last)
    block = Block([unet, vae, *(encoder.model for encoder in text_encoders)], device, moves=device.type != "cpu")
    return Models(unet, vae, text_encoders, scheduler_config, device, dtype, block)


def dtype_of(precision: str, device: str) -> torch.dtype:
    """The type of the UNet's weights."""
    if precision == "auto":
        precision = "float16" if device == "cuda" else "float32"
    found: torch.dtype = getattr(torch, precision)
    return found


def vae_dtype(dtype: torch.dtype, device: str) -> torch.dtype:
    """The type of a VAE's weights, never fp16: SDXL's overflows in it, as do some of SD1.5. bf16 has the range, and its
    rounding is below one of 255 levels."""
    # Below compute capability 8 it is emulated, which is slower than fp32.
    has_bf16 = device == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    is_half = dtype != torch.float32 and has_bf16
    return torch.bfloat16 if is_half else torch.float32


def read(path: Path, name: str) -> tuple[Weights, dict[str, str]]:
    """Tensors and metadata of a checkpoint file. Its bytes, not its name, say what format it has.

    Raises:
        JobError: the file is damaged or truncated.
    """
    with path.open("rb") as file:
        start = file.read(_LENGTH_BYTES + 1)
    # A safetensors file begins with the length of its JSON, whose bytes may be any, such as those of a pickle.
    if start[_LENGTH_BYTES:] != b"{" and start.startswith(_PICKLE_STARTS):
        return pickles.read(path, name), {}
    try:
        with safe_open(path, framework="pt") as tensors:
            return {key: tensors.get_tensor(key) for key in tensors.keys()}, tensors.metadata() or {}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError) as error:
        log.warning("checkpoint cannot be read", name=name, error=str(error))
        raise JobError(f"{name} is damaged or truncated: it cannot be read as a checkpoint") from None


def _normalised(weights: Weights) -> Weights:
    """Names as Stability's own files have them. NovelAI's CLIP lacks `text_model.`."""
    if f"{_CLIP}embeddings.token_embedding.weight" not in weights:
        return weights
    return {
        key.replace(_CLIP, f"{_CLIP}text_model.", 1) if key.startswith(_CLIP) else key: tensor
        for key, tensor in weights.items()
    }


def _config(weights: Weights, metadata: dict[str, str], name: str) -> Config:
    """The configuration for these weights: their own, or that of the family they belong to.

    Raises:
        JobError: the family is none that this worker runs.
    """
    if any(key.startswith(("lora_unet_", "lora_te")) for key in weights):
        raise JobError(f"{name} is a LoRA, not a Stable Diffusion checkpoint")
    if _UNET_IN not in weights:
        raise JobError(f"{name} has an architecture that is not known; possible: Stable Diffusion 1.5, SDXL")
    num_channels = weights[_UNET_IN].shape[1]
    if num_channels not in {4, _NUM_CHANNELS_INPAINTING}:
        raise JobError(
            f"{name} reads {num_channels} channels, as an editing checkpoint does; possible: 4 or inpainting's 9"
        )
    config = _family(weights, metadata, name)
    return config | {"unet": config["unet"] | {"in_channels": num_channels}}


def _family(weights: Weights, metadata: dict[str, str], name: str) -> Config:
    if CONFIG_METADATA in metadata:
        return _own_config(metadata[CONFIG_METADATA], name)
    if any(key.startswith(_BIG_G) for key in weights):
        return family_config("sdxl")
    if any(key.startswith(_BIG_G_OF_REFINER) for key in weights):
        shared = {part: config for part, config in family_config("sdxl").items() if part != "text_encoder"}
        return shared | family_config("sdxl_refiner")
    if _CONTEXT in weights and weights[_CONTEXT].shape[1] == _NUM_CONTEXT_SD2:
        raise JobError(f"{name} is a Stable Diffusion 2 checkpoint; possible: Stable Diffusion 1.5, SDXL")
    return family_config("sd15")


def _own_config(text: str, name: str) -> Config:
    try:
        config: Config = json.loads(text)
        text_encoder = "text_encoder" if "text_encoder" in config else "text_encoder_2"
        parts = {"unet", "vae", text_encoder, "scheduler"} | _PARTS & config.keys()
        is_sound = all(isinstance(config[part], dict) for part in parts)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        is_sound = False
    if not is_sound:
        raise JobError(f"{name} has metadata {CONFIG_METADATA} that cannot be read")
    if unknown := [part for part in sorted(parts) if not _is_known(part, config[part])]:
        raise JobError(
            f"{name} has metadata {CONFIG_METADATA} that is beyond what is known of its {unknown[0]}; possible: what "
            "Stable Diffusion 1.5 and SDXL have, or less of it"
        )
    return config


def _is_known(part: str, config: Any) -> bool:
    """Whether a part's configuration has only names that the families' have, and no number that is larger: with others
    the libraries build for hours, or fetch code."""
    families = [family_config(family).get(part, {}) for family in ("sd15", "sdxl", "sdxl_refiner")]
    for name, value in config.items():
        known = [_values(family[name]) for family in families if name in family]
        largest = max((number for values in known for number in values if isinstance(number, int | float)), default=0)
        given = _values(value)
        if not known or len(given) > max(map(len, known)):
            return False
        if not all(isinstance(one, str) or (isinstance(one, int | float) and 0 <= one <= largest) for one in given):
            return False
    return True


def _values(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


@cache
def family_config(family: str) -> Config:
    """The configuration of a family by its file's name: `sd15`, `sdxl` or `sdxl_refiner`."""
    config: Config = json.loads((resources.files("gpu_worker") / "configs" / f"{family}.json").read_text())
    return config


class Empty(TorchFunctionMode):
    """Within it weights of new models have a shape, but no memory; buffers have theirs. It is of its thread alone:
    accelerate's init_empty_weights exchanges a method of all modules, and what another thread made or filled meanwhile
    would be empty too."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}) | ({"device": "meta"} if func is torch.empty else {}))


@dataclass(frozen=True)
class _Filler:
    """Makes models and fills them with weights of one file."""

    name: str
    dtype: torch.dtype

    def __call__(self, create: Callable[[], Any], part: str, convert: Callable[[], Weights]) -> Any:
        """The model in evaluation mode, with the weights by its own names. `part` is its name in messages.

        Raises:
            JobError: weights are missing, or have shapes of another architecture.
        """
        try:
            # diffusers takes it for granted that where one weight is, others are; some of those that are not are None.
            weights = {key: tensor for key, tensor in convert().items() if tensor is not None}
        except KeyError as error:
            raise JobError(f"{self.name} lacks weights of its {part}, such as {error.args[0]}") from None
        try:
            with Empty():
                model = create()
        except (TypeError, ValueError) as error:
            raise JobError(f"{self.name} has metadata that describes no {part}: {error}") from None
        expected = model.state_dict()
        missing = [key for key in expected if key not in weights]
        if len(missing) == len(expected):
            raise JobError(f"{self.name} has no {part} in it")
        for key, tensor in expected.items():
            if key in weights and weights[key].shape != tensor.shape:
                raise JobError(
                    f"{self.name} is not of a size that is known: {key} of its {part} has shape "
                    f"{tuple(weights[key].shape)}, not {tuple(tensor.shape)}"
                )
        if missing:
            raise JobError(f"{self.name} lacks {len(missing)} weights of its {part}, such as {missing[0]}")
        model.load_state_dict({key: weights[key].to(self.dtype) for key in expected}, assign=True)
        return model.requires_grad_(False).eval()


def _load_vae(
    weights: Weights, config: Config, base: CachedModel, other: CachedModel | None, dtype: torch.dtype
) -> Any:
    name = base.name
    vae_config = config["vae"]
    if other is not None:
        name = other.name
        weights, metadata = read(other.path, other.name)
        if CONFIG_METADATA in metadata:
            vae_config = _own_config(metadata[CONFIG_METADATA], name)["vae"]
    elif not any(key.startswith(("first_stage_model.", "vae.")) for key in weights):
        raise JobError(f"{name} has no VAE in it; name one of type VAE in the job's models")
    fill = _Filler(name, dtype)
    return fill(
        lambda: AutoencoderKL(**vae_config), "VAE", lambda: _convert.convert_ldm_vae_checkpoint(weights, vae_config)
    )


def _load_text_encoders(weights: Weights, config: Config, fill: _Filler) -> tuple[TextEncoder, ...]:
    encoders = []
    if "text_encoder" in config:
        first = fill(
            lambda: CLIPTextModel(CLIPTextConfig(**config["text_encoder"])), "text encoder", lambda: _clip(weights)
        )
        encoders.append(TextEncoder(tokenizer("<|endoftext|>"), first))
    if "text_encoder_2" in config:
        prefix = _BIG_G if encoders else _BIG_G_OF_REFINER
        clip_config = CLIPTextConfig(**config["text_encoder_2"])
        with Empty():
            empty = CLIPTextModelWithProjection(clip_config)
        second = fill(
            lambda: CLIPTextModelWithProjection(clip_config),
            "second text encoder",
            lambda: _convert.convert_open_clip_checkpoint(empty, weights, prefix=prefix),
        )
        encoders.append(TextEncoder(tokenizer("!"), second))
    return tuple(encoders)


def _clip(weights: Weights) -> Weights:
    # transformers 5.6 took the wrapper `text_model` away from CLIPTextModel, but not from the one with projection.
    return {
        key.removeprefix("text_model."): tensor for key, tensor in _convert.convert_ldm_clip_checkpoint(weights).items()
    }


@cache
def tokenizer(pad_token: str) -> Any:
    """CLIP's tokenizer: 256 bytes, the same at a word's end, the merges, and the two marks."""
    packed = (resources.files("gpu_worker") / "configs" / "clip_merges.txt.gz").read_bytes()
    merges: Any = [tuple(line.split()) for line in gzip.decompress(packed).decode().splitlines()]
    letters = list(_byte_letters())
    words = [*letters, *(f"{letter}</w>" for letter in letters), *("".join(merge) for merge in merges)]
    vocabulary = {word: index for index, word in enumerate([*words, "<|startoftext|>", "<|endoftext|>"])}
    return CLIPTokenizer(vocab=vocabulary, merges=merges, pad_token=pad_token, model_max_length=77)


def _byte_letters() -> str:
    """A printable letter for each byte, in the order of CLIP's vocabulary (OpenAI's simple_tokenizer.py)."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = 256 - len(printable)
    return "".join(chr(code) for code in printable) + "".join(chr(256 + index) for index in range(others))
