"""What a model is, by the names and shapes of its tensors, in the layouts in which single files are passed around.

Sources: the original `model.diffusion_model.…` layout of Stable Diffusion; kohya's and LyCORIS's names of adapters;
A1111's textual inversions and hypernetworks; lllyasviel's ControlNets. Pickles are not opened, so of those only names
are known, and no shapes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

UNKNOWN = "unknown"
Shapes = Mapping[str, Sequence[int]]

_UNET = "model.diffusion_model."
_FIRST = _UNET + "input_blocks.0.0.weight"
_IN_CHANNELS = {9: "inpaint", 8: "instruct_pix2pix"}
# By what the name of a tensor begins with; the first that fits counts.
_BEGINNINGS = (
    ((_UNET,), "checkpoint"),
    (("control_model.", "input_hint_block.", "controlnet_cond_embedding.", "lora_controlnet"), "controlnet"),
    (("emb_params", "string_to_param", "clip_g", "clip_l"), "embedding"),
    (("lora_", "lycoris_", "unet.", "text_encoder.", "oft_"), "lora"),
    (("layer_structure", "activation_func"), "hypernetwork"),
    (("first_stage_model.", "encoder.down", "decoder.up", "decoder.mid"), "vae"),
    (("cond_stage_model.", "conditioner.embedders."), "checkpoint"),
)
# The width of the text that a UNet attends to tells whose UNet it is.
_CONTEXT = {768: "sd_1_5", 1024: "sd_2", 2048: "sd_xl"}
_CONTEXT_NAMES = ("attn2.to_k.weight", "attn2_to_k.lora_down.weight", "attn2_to_k.hada_w1_b", "attn2_to_k.lokr_w2_b")
_ADAPTERS = (
    ("lokr_w1", "lokr"),
    ("hada_w1", "loha"),
    ("oft_", "oft"),
    (".on_input", "ia3"),
    ("dora_scale", "dora"),
    ("lora_mid", "locon"),
    ("lora_down", "lora"),
    ("lora_A", "lora"),
    (".diff", "diff"),
)


def recognise(shapes: Shapes) -> tuple[str, str]:
    """Kind and architecture of the model with these tensors; a shape is empty where it is not known.

    Kinds: checkpoint, inpaint, instruct_pix2pix, vae, controlnet, embedding, hypernetwork, lora, locon, loha, lokr,
    dora, oft, ia3, diff, unknown. Architectures: sd_1_5, sd_2, sd_xl, unknown.
    """
    kind = _kind(shapes)
    return kind, _of_embedding(shapes) if kind == "embedding" else _architecture(shapes)


def _kind(shapes: Shapes) -> str:
    kind = next(
        (kind for beginnings, kind in _BEGINNINGS if any(name.startswith(beginnings) for name in shapes)), UNKNOWN
    )
    if kind == "checkpoint":
        first = shapes.get(_FIRST, ())
        return _IN_CHANNELS.get(first[1] if len(first) > 1 else 0, kind)
    return _adapter(shapes) if kind == "lora" else kind


def _adapter(shapes: Shapes) -> str:
    """The kind of LoRA. LoCon is LoRA of convolutions too: their halves have kernels larger than one pixel."""
    kind = next((kind for part, kind in _ADAPTERS if any(part in name for name in shapes)), "lora")
    is_locon = kind == "lora" and any("lora_down" in name and len(s) == 4 and s[-1] > 1 for name, s in shapes.items())
    return "locon" if is_locon else kind


def _architecture(shapes: Shapes) -> str:
    def has(*beginnings: str) -> bool:
        return any(name.startswith(beginnings) for name in shapes)

    if has("conditioner.embedders.", "lora_te1_", "lora_te2_"):
        return "sd_xl"
    if has("cond_stage_model.model."):
        return "sd_2"
    for name, shape in shapes.items():
        if name.endswith(_CONTEXT_NAMES) and len(shape) >= 2 and shape[1] in _CONTEXT:
            return _CONTEXT[shape[1]]
    return "sd_1_5" if has("cond_stage_model.transformer.", "lora_te_") else UNKNOWN


def _of_embedding(shapes: Shapes) -> str:
    if "clip_g" in shapes:
        return "sd_xl"
    width = next((shape[-1] for name, shape in shapes.items() if name == "emb_params" and shape), 0)
    return _CONTEXT.get(width, UNKNOWN)
