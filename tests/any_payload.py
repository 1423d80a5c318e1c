"""Owns payloads as Hypothesis draws them: whatever clients write, in all combinations, of jobs that take a moment.

They name the models `first`, `second` and `inpainting`, the VAE `vae`, the LoRA `style`, the ControlNet `control`, the
embedding `amypt`, and the upscaler `4x-tiny`.
"""

from typing import Any

from hypothesis import strategies as st
from PIL import Image

from services.common.payloads import samplers
from services.common.payloads.controlnet import PREPROCESSORS
from services.common.payloads.upscalers import LATENT_UPSCALERS, PIXEL_UPSCALERS
from tests.pictures import encoded, mask, noise

one_of = st.sampled_from
CHECKPOINTS = one_of(["first", "second", "inpainting"])
PICTURES = one_of([encoded(noise(width, height, seed=width)) for width, height in ((64, 64), (100, 50), (40, 64))])
MASKS = one_of([
    encoded(picture)
    for picture in (
        *(mask(box) for box in ((0, 0, 32, 64), (10, 10, 50, 50), (0, 0, 1, 1), (0, 0, 0, 0), (0, 0, 64, 64))),
        Image.new("L", (32, 20), 255),
    )
])  # fmt: skip
WORDS = one_of([
    "a cat", "(a dog:1.3)", "[red:blue:0.5]", "[cow|horse]", "BREAK a tree", "((sky))", "amypt", "long " * 90, "[a::1]",
    r"\(x\)", "日本", "<lora:style:0.5>", "<lora:style:1:-0.3>", "AND a hill :0.6",
])  # fmt: skip
TEXTS = st.lists(WORDS, max_size=4, unique=True).map(" ".join)
SAMPLERS = one_of(samplers.names())
SCHEDULES = one_of(["Automatic", "Karras", "Uniform"])
PART = one_of([0, 0.3, 0.5, 1])
STRENGTHS = one_of([0.1, 0.3, 0.75, 1])

UNITS = st.fixed_dictionaries(
    {"model": st.just("control"), "module": one_of(list(PREPROCESSORS)), "image": PICTURES},
    optional={
        "mask": MASKS,
        "weight": one_of([0, 0.5, 2]),
        "guidance_start": PART,
        "guidance_end": PART,
        "control_mode": one_of([0, 1, 2]),
        "resize_mode": one_of([0, 1, 2]),
        "pixel_perfect": st.booleans(),
        "processor_res": one_of([0, 64, 512]),
        "save_detected_map": st.booleans(),
        "hr_option": one_of(["Both", "Low res only", "High res only"]),
    },
)
SETTINGS = st.fixed_dictionaries(
    {},
    optional={
        "CLIP_stop_at_last_layers": one_of([1, 2, 12]),
        "eta_noise_seed_delta": st.just(31337),
        "randn_source": one_of(["CPU", "GPU", "NV"]),
        "eta_ancestral": PART,
        "sd_vae": one_of(["vae", "None", "Automatic"]),
        "sd_model_checkpoint": CHECKPOINTS,
        "hires_fix_refiner_pass": one_of(["first pass", "second pass", "both passes"]),
        "img2img_fix_steps": st.booleans(),
        "initial_noise_multiplier": one_of([0, 0.8, 1.5]),
    },
)
PLOTS = st.sampled_from([
    ["Steps", "1,3", [], "Sampler", "Euler,DDIM", [], 0, "", []],
    ["Checkpoint name", "first,second", [], "CFG Scale", "1-7 [2]", [], 0, "", [], True, True],
    ["Seed", "7,8", [], 0, "", [], "Clip skip", "1,2", [], True, False, True],
])  # fmt: skip
SIZES = {"width": one_of([64, 64, 64, 72]), "height": one_of([64, 64, 64, 96])}
COMMON: dict[str, Any] = {
    "negative_prompt": TEXTS,
    "scheduler": SCHEDULES,
    "cfg_scale": one_of([0, 1, 1.5, 7, 30]),
    "batch_size": one_of([1, 2, 3]),
    "n_iter": one_of([1, 2]),
    "subseed_strength": PART,
    "seed_resize_from_w": one_of([-1, 64, 128]),
    "seed_resize_from_h": one_of([0, 64, 96]),
    "tiling": st.booleans(),
    "eta": PART,
    "s_min_uncond": one_of([0.5, 20]),
    "refiner_checkpoint": CHECKPOINTS,
    "refiner_switch_at": PART,
    "override_settings": SETTINGS,
    "alwayson_scripts": st.lists(UNITS, max_size=2).map(lambda units: {"controlnet": {"args": units}}),
    "exclusive": st.booleans(),
}
NEEDED = SIZES | {
    "prompt": TEXTS,
    "sampler_name": SAMPLERS,
    "steps": one_of([1, 3, 8, 12]),
    "seed": one_of([0, 7, 2**40]),
    "subseed": st.just(5),
}
SECOND_PASS = {
    "enable_hr": st.just(True),
    "hr_scale": one_of([1, 1.5, 2]),
    "denoising_strength": STRENGTHS,
    "hr_upscaler": one_of([*LATENT_UPSCALERS, *PIXEL_UPSCALERS, "4x-tiny"]),
    "hr_resize_x": one_of([0, 96]),
    "hr_resize_y": one_of([0, 128]),
    "hr_second_pass_steps": one_of([0, 2]),
    "hr_sampler_name": SAMPLERS,
    "hr_scheduler": SCHEDULES,
    "hr_checkpoint_name": CHECKPOINTS,
    "hr_prompt": TEXTS,
    "hr_negative_prompt": TEXTS,
}
PAINTING = {
    "denoising_strength": STRENGTHS,
    "resize_mode": one_of([0, 1, 2, 3]),
    "mask": MASKS,
    "mask_blur": one_of([0, 4, 20]),
    "inpainting_fill": one_of([0, 1, 2, 3]),
    "inpaint_full_res": st.booleans(),
    "inpaint_full_res_padding": one_of([0, 8, 200]),
    "inpainting_mask_invert": st.booleans(),
}


def _scripted(payload: dict[str, Any]) -> st.SearchStrategy[dict[str, Any]]:
    """One in eight as a plot."""
    plots = PLOTS.map(lambda axes: payload | {"script_name": "X/Y/Z plot", "script_args": axes})
    return st.integers(0, 7).flatmap(lambda number: plots if number == 0 else st.just(payload))


TXT2IMG = st.fixed_dictionaries(NEEDED, optional=COMMON | SECOND_PASS).flatmap(_scripted)
IMG2IMG = st.fixed_dictionaries(
    NEEDED | {"init_images": st.lists(PICTURES, min_size=1, max_size=2)}, optional=COMMON | PAINTING
).flatmap(_scripted)
# The task's type and its payload.
GENERATIONS = st.one_of(
    st.tuples(st.just("txt2img"), TXT2IMG),
    st.tuples(st.just("img2img"), IMG2IMG),
)
EDITS = st.one_of(
    st.tuples(
        st.just("extra-single-image"),
        st.fixed_dictionaries(
            {"image": PICTURES, "upscaler_1": one_of([*PIXEL_UPSCALERS, "4x-tiny"])},
            optional={
                "upscaler_2": one_of([*PIXEL_UPSCALERS, "4x-tiny"]),
                "extras_upscaler_2_visibility": PART,
                "resize_mode": one_of([0, 1]),
                "upscaling_resize": one_of([1, 2, 3.3]),
                "upscaling_resize_w": one_of([1, 100]),
                "upscaling_resize_h": one_of([50, 128]),
                "upscaling_crop": st.booleans(),
            },
        ),
    ),
    st.tuples(
        st.just("rembg"),
        st.fixed_dictionaries({"input_image": PICTURES}, optional={"return_mask": st.booleans()}),
    ),
)
