"""What else a payload may ask of SDXL: noise, samplers' settings, schedules, VAEs, a second pass, a refiner; and files
that are broken."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import EulerAncestralDiscreteScheduler, StableDiffusionXLImg2ImgPipeline, StableDiffusionXLPipeline
from PIL import Image
from safetensors.torch import load_file, save_file

from gpu_worker.engine.run import Produced
from gpu_worker.models import weights
from gpu_worker.pictures.canvas import Canvas
from gpu_worker.tasks import hires, stages, txt2img
from services.common.payloads import samplers
from tests.gpu_worker.conftest import as_cached
from tests.gpu_worker.driving import assert_close, changed, crew, drive, latents, txt2img_of
from tests.gpu_worker.models.test_lora import parts
from tests.gpu_worker.reference import BETAS, LINSPACE, Told, by_formula, pipeline_latents, scheduler_of
from tests.gpu_worker.tables import in_companies, slow
from tests.gpu_worker.test_broken_files import outcome
from tests.gpu_worker.tiny_sdxl import TinySdxl, make, read

pytestmark = pytest.mark.slow

REQUEST = txt2img_of(prompt="a red circle", steps=4, width=64, height=64, seed=3)
NAMES = [
    f"{sampler} {schedule}"
    for schedule in ("Exponential", "SGM Uniform", "Beta")
    for sampler in ("Euler a", "Heun", "DPM++ 2M", "LMS")
]
FIRST, *OTHERS = in_companies(NAMES)


@pytest.fixture(scope="module")
def sdxl(tmp_path_factory: pytest.TempPathFactory) -> TinySdxl:
    return make(tmp_path_factory.mktemp("sdxl") / "tiny-xl.safetensors")


@pytest.fixture(scope="module")
def refiner(tmp_path_factory: pytest.TempPathFactory) -> TinySdxl:
    return make(tmp_path_factory.mktemp("sdxl") / "refiner.safetensors", is_refiner=True, seed=1)


def randn(seed: int, height: int = 8, width: int = 8) -> torch.Tensor:
    return torch.randn(1, 4, height, width, generator=torch.Generator().manual_seed(seed))


def slerp(strength: float, low: torch.Tensor, high: torch.Tensor) -> torch.Tensor:
    """Spherical interpolation (Shoemake 1985) of every column, as A1111 has it, in double precision."""
    low, high = low.double(), high.double()
    angle = torch.acos(torch.nn.functional.cosine_similarity(low, high, dim=2)).unsqueeze(2)
    mixed = torch.sin((1 - strength) * angle) * low + torch.sin(strength * angle) * high
    return (mixed / torch.sin(angle)).float()


def test_noise_and_its_settings_in_one_company_are_those_of_the_formulas(sdxl: TinySdxl) -> None:
    subseed = changed(REQUEST, subseed=9, subseed_strength=0.3, batch_size=2)
    resized = changed(REQUEST, seed_resize_from_w=128, seed_resize_from_h=32, cfg_scale=4)
    eta = changed(REQUEST, sampler_name="Euler a", eta=0.5, negative_prompt="blurry", steps=5)
    without = changed(REQUEST, sampler_name="Euler a", eta=0.0, seed=6, cfg_scale=1)
    ddim = changed(REQUEST, sampler_name="DDIM", eta=0.7, seed=7)
    unguided = changed(REQUEST, s_min_uncond=2.0, steps=6, seed=8, negative_prompt="blurry")
    requests = [subseed, resized, eta, without, ddim, unguided]
    found = drive([(index % 3, latents(request, sdxl.models)) for index, request in enumerate(requests)], max_rows=5)
    positive, negative = read(sdxl.pipeline, "a red circle"), read(sdxl.pipeline, "blurry")
    told = Told(sdxl.parts["unet"], [(positive, 1)], negative)

    def with_noise(noise: torch.Tensor, request: Any) -> torch.Tensor:
        return pipeline_latents(
            sdxl.pipeline, "Euler", request, prompt=[request.prompt] * request.batch_size, latents=noise
        )

    varied = torch.cat([slerp(0.3, randn(3), randn(9 + row)) for row in range(2)])
    assert_close(found[0], with_noise(varied, subseed))
    pasted = randn(3)
    pasted[:, :, 2:6] = randn(3, 4, 16)[..., 4:12]
    assert_close(found[1], with_noise(pasted, resized))
    assert_close(found[2], by_formula(eta, lambda _: told, Ancestral(**BETAS, **LINSPACE)))
    assert_close(found[3], pipeline_latents(sdxl.pipeline, "Euler", without))
    assert_close(found[4], pipeline_latents(sdxl.pipeline, "DDIM", ddim))

    scheduler = scheduler_of("Euler", 0)
    scheduler.set_timesteps(6)
    skipped = [index for index, level in enumerate(scheduler.sigmas[:-1]) if index % 2 and level < 2.0]
    assert 0 < len(skipped) < 3
    alone = Told(told.unet, told.positives, None)
    assert_close(found[5], by_formula(unguided, lambda index: alone if index in skipped else told))


class Ancestral(EulerAncestralDiscreteScheduler):  # type: ignore[misc]
    """sample_euler_ancestral of k_diffusion/sampling.py with eta 0.5."""

    def step(self, model_output: Any, _: Any, sample: Any, generator: Any = None, **__: Any) -> Any:
        now, then = self.sigmas[self.step_index : self.step_index + 2]
        self._step_index += 1
        up = torch.minimum(then, 0.5 * (then**2 * (now**2 - then**2) / now**2).sqrt())
        down = (then**2 - up**2).sqrt()
        return (sample + (down - now) * model_output + up * torch.randn(sample.shape, generator=generator),)


@pytest.mark.parametrize("names", [FIRST, *slow(OTHERS)], ids=", ".join)
def test_every_schedule_is_that_of_the_diffusers_pipeline(sdxl: TinySdxl, names: list[str]) -> None:
    requests = [changed(REQUEST, sampler_name=name, seed=seed) for seed, name in enumerate(names)]
    sampler, schedule = samplers.parts(names[0])
    requests[0] = changed(requests[0], sampler_name=sampler, scheduler=schedule)
    tasks = [(seed % 2, latents(request, sdxl.models)) for seed, request in enumerate(requests)]
    for name, request, found in zip(names, requests, drive(tasks), strict=True):
        assert request.sampler_name == name
        assert_close(found, pipeline_latents(sdxl.pipeline, name, request))


def test_another_vae_draws_the_same_latents(sdxl: TinySdxl, refiner: TinySdxl) -> None:
    """It is that of another checkpoint's file."""
    models = weights.load(as_cached(sdxl.path), as_cached(refiner.path, "VAE"), "cpu")
    pipeline = StableDiffusionXLPipeline(**sdxl.components | {"vae": refiner.parts["vae"]})
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(REQUEST.seed)
    options: dict[str, Any] = {"num_inference_steps": 4, "guidance_scale": 7.0, "width": 64, "height": 64}
    expected = pipeline(REQUEST.prompt, **options, generator=generator, output_type="np").images[0]
    found, own = (
        drive([(0, txt2img.generate(REQUEST, Canvas(), crew(used), None, lambda _: None))])[0][0] / 255
        for used in (models, sdxl.models)
    )
    assert np.abs(found - expected).max() <= 0.5 / 255 + 1e-5
    assert np.abs(own - expected).max() > 0.1


def test_second_passes_have_their_own_sampler_prompt_and_pixels(sdxl: TinySdxl) -> None:
    fields: dict[str, Any] = {"enable_hr": True, "hr_scale": 1.5, "denoising_strength": 0.6}
    requests = [
        changed(REQUEST, **fields, hr_upscaler="Lanczos", hr_sampler_name="Heun", hr_prompt="a blue square"),
        changed(REQUEST, **fields, hr_upscaler="Nearest", hr_sampler_name="DDIM", hr_negative_prompt="dark", seed=5),
        changed(REQUEST, **fields, hr_upscaler="Latent (bicubic)", hr_prompt="a dog", hr_cfg=3, seed=6),
    ]
    models = sdxl.models

    def both(request: Any) -> Any:
        first = yield from latents(request, models)
        second = hires.begin(request, Canvas(), crew(models), crew(models))
        return (yield from hires.denoised(second, first, 0, lambda _: None))

    found = drive([(index, both(request)) for index, request in enumerate(requests)])
    resampling = [Image.Resampling.LANCZOS, Image.Resampling.NEAREST, None]
    for request, made, how in zip(requests, found, resampling, strict=True):
        first = pipeline_latents(sdxl.pipeline, "Euler", request)
        with torch.inference_mode():
            if how is None:
                scaled = torch.nn.functional.interpolate(first, (12, 12), mode="bicubic")
            else:
                picture = Image.fromarray(stages.pixels_of(models, first)).resize((96, 96), how)
                vae, pixels = sdxl.parts["vae"], np.asarray(picture, dtype=np.float32) / 127.5 - 1
                encoded = vae.encode(torch.from_numpy(pixels).permute(2, 0, 1)[None]).latent_dist.mean
                scaled = encoded * vae.config.scaling_factor
        second = request.second_pass
        pipeline = StableDiffusionXLImg2ImgPipeline(**sdxl.components)
        pipeline.scheduler = scheduler_of(second.sampler_name, [request.seed])
        pipeline.set_progress_bar_config(disable=True)
        expected = pipeline(
            second.prompt,
            negative_prompt=second.negative_prompt or None,
            image=scaled,
            strength=(second.num_steps + 0.5) / second.steps,
            num_inference_steps=second.steps,
            guidance_scale=second.cfg_scale,
            original_size=(96, 96),
            target_size=(96, 96),
            generator=[torch.Generator().manual_seed(request.seed)],
            output_type="latent",
        ).images
        assert_close(made, expected)


def test_jobs_in_company_go_on_with_sdxls_refiner_from_their_own_steps_on(sdxl: TinySdxl, refiner: TinySdxl) -> None:
    cases = [("Euler a", 5, 0.5, 3), ("DDIM", 4, 0.75, 3), ("Euler", 6, 0.2, 2)]
    requests = [
        changed(
            REQUEST,
            sampler_name=name,
            steps=steps,
            refiner_checkpoint="refiner",
            refiner_switch_at=switch,
            negative_prompt=("blurry", "")[seed % 2],
            seed=seed,
        )
        for seed, (name, steps, switch, _) in enumerate(cases)
    ]
    tasks = [(i, latents(request, sdxl.models, refiner=refiner.models)) for i, request in enumerate(requests)]
    alone = changed(REQUEST, seed=9)
    found = drive([*tasks, (0, latents(alone, sdxl.models)), (2, latents(alone, refiner.models))])
    second = StableDiffusionXLImg2ImgPipeline(**refiner.components)
    for request, made, (_, _, _, switch_step) in zip(requests, found, cases, strict=False):

        def told(index: int, request: Any = request, switch_step: int = switch_step) -> Told:
            away = [request.negative_prompt] if request.negative_prompt else []
            pipeline = sdxl.pipeline if index < switch_step else second
            texts = [(read(pipeline, request.prompt), 1.0)], read(pipeline, *away)
            if pipeline is second:
                return Told(refiner.parts["unet"], *texts, ([6.0], [2.5]))
            return Told(sdxl.parts["unet"], *texts)

        assert_close(made, by_formula(request, told))


@pytest.mark.parametrize("is_base", [True, False])
def test_a_file_that_is_truncated_fails_its_job_by_name(sdxl: TinySdxl, tmp_path: Path, is_base: bool) -> None:
    path = tmp_path / "x.safetensors"
    content = sdxl.path.read_bytes() if is_base else lora(tmp_path / "whole.safetensors").read_bytes()
    path.write_bytes(content[:-8])
    files = [as_cached(path)] if is_base else [as_cached(sdxl.path), as_cached(path, "Lora")]
    found = outcome(files, prompt="a cat" if is_base else "a cat <lora:x:1>")
    assert str(found) == "x.safetensors is damaged or truncated: it cannot be read as a checkpoint"


@pytest.mark.parametrize(
    "name",
    [
        "model.diffusion_model.label_emb.0.0.bias",
        "conditioner.embedders.0.transformer.text_model.encoder.layers.0.mlp.fc1.bias",
        "conditioner.embedders.1.model.text_projection",
        "first_stage_model.decoder.conv_out.bias",
    ],
)
def test_weights_of_nan_fail_the_job_with_that_word(sdxl: TinySdxl, tmp_path: Path, name: str) -> None:
    state = load_file(sdxl.path)
    state[name] = torch.full_like(state[name], float("nan"))
    path = tmp_path / "x.safetensors"
    save_file(state, path, metadata={"esd_config": json.dumps(sdxl.config)})
    assert "NaN (not a number)" in str(outcome([as_cached(path)]))


def test_a_lora_of_nan_fails_the_job_with_that_word(sdxl: TinySdxl, tmp_path: Path) -> None:
    for factor, is_sound in ((1.0, True), (float("nan"), False)):
        path = lora(tmp_path / "x.safetensors", factor)
        found = outcome([as_cached(sdxl.path), as_cached(path, "Lora")], prompt="a cat <lora:x:1>")
        assert isinstance(found, Produced) if is_sound else "NaN (not a number)" in str(found)


def lora(path: Path, factor: float = 1.0) -> Path:
    """A LoRA of the second text encoder."""
    tensors, _ = parts("lora", torch.Size((64, 48)), 0)
    layer = "lora_te2_text_model_encoder_layers_1_mlp_fc1"
    save_file({f"{layer}.{part}": tensor * factor for part, tensor in tensors.items()}, path)
    return path
