"""img2img and inpainting against diffusers' own pipelines, given the same latents and noise."""

from functools import wraps
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import PNDMScheduler, StableDiffusionImg2ImgPipeline, StableDiffusionInpaintPipeline

from gpu_worker.models import weights
from gpu_worker.pictures.canvas import Canvas, prepared
from gpu_worker.tasks import img2img
from services.common.payloads import Img2Img, samplers
from tests.gpu_worker.conftest import as_cached
from tests.gpu_worker.driving import assert_close, changed, crew, drive, img2img_latents, img2img_of, steps_of
from tests.gpu_worker.reference import BETAS, pipeline_of, scheduler_of
from tests.gpu_worker.tables import in_companies, slow
from tests.pictures import encoded, mask, noise

REQUEST = img2img_of(
    prompt="a red circle",
    negative_prompt="blurry",
    steps=6,
    width=64,
    height=64,
    seed=3,
    denoising_strength=0.6,
    init_images=[encoded(noise())],
)
BOX = (16, 8, 48, 40)
PAINTED = torch.zeros(8, 8, dtype=torch.bool)  # of the latents
PAINTED[BOX[1] // 8 : BOX[3] // 8, BOX[0] // 8 : BOX[2] // 8] = True
MASKED = changed(
    REQUEST, mask=encoded(mask(BOX)), mask_blur_x=0, mask_blur_y=0, inpainting_fill=1, inpaint_full_res=False
)
# Its pipeline begins PLMS in the middle of a step; there is a formula for it below.
NAMES = [name for name in (*samplers.SAMPLERS, "DPM++ 2M Karras", "DPM++ SDE Karras") if name != "PLMS"]
FIRST, *OTHERS = in_companies(NAMES)
COMPANIES = [FIRST, *slow(OTHERS)]


@pytest.fixture(scope="module")
def models(tiny_checkpoint: Path) -> weights.Models:
    return weights.load(as_cached(tiny_checkpoint), None, "cpu")


@pytest.fixture(scope="module")
def inpainting(inpainting_checkpoint: Path) -> weights.Models:
    return weights.load(as_cached(inpainting_checkpoint), None, "cpu")


@pytest.fixture(scope="module")
def parts(tiny_checkpoint: Path, models: weights.Models, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("config")
    parts: dict[str, Any] = pipeline_of(tiny_checkpoint, models.text_encoders[0].tokenizer, folder).components
    return parts


def original(vae: Any, image: Any = None, keep: Any = 1) -> torch.Tensor:
    """The latents of the request's picture, as a formula."""
    pixels = np.asarray(noise() if image is None else image, dtype=np.float32) / 255 * 2 - 1
    x = torch.from_numpy(pixels).permute(2, 0, 1)[None] * keep
    with torch.inference_mode():
        found: torch.Tensor = vae.encode(x).latent_dist.mean * vae.config.scaling_factor
    return found


def of_pipeline(
    kind: Any, parts: dict[str, Any], request: Img2Img, kept: torch.Tensor | None = None, **options: Any
) -> torch.Tensor:
    """The final latents of the request, made by diffusers' pipeline alone, or with what A1111 keeps."""
    seeds = [request.seed + row for row in range(request.batch_size)]
    extra = {"image_encoder": None} if kind is StableDiffusionImg2ImgPipeline else {}
    pipeline = kind(**parts | extra, requires_safety_checker=False)
    pipeline.scheduler = scheduler_of(request.sampler_name, seeds)
    if kept is not None:
        put_back(pipeline.scheduler, kept)
    pipeline.set_progress_bar_config(disable=True)
    found: torch.Tensor = pipeline(
        prompt=[request.prompt] * len(seeds),
        negative_prompt=[request.negative_prompt] * len(seeds),
        image=original(parts["vae"]).repeat(len(seeds), 1, 1, 1),
        # diffusers makes one step less than A1111.
        strength=min(1.0, (request.num_steps + 0.5) / request.steps),
        num_inference_steps=request.steps,
        guidance_scale=request.cfg_scale,
        generator=[torch.Generator().manual_seed(seed) for seed in seeds],
        output_type="latent",
        **options,
    ).images
    return found if kept is None else torch.where(PAINTED, found, kept)


def put_back(scheduler: Any, clean: torch.Tensor) -> None:
    """Has the scheduler believe that the UNet sees these latents under the noise where nothing is painted, as A1111's
    CFGDenoiser does."""
    step = scheduler.step

    @wraps(step)
    def told(prediction: torch.Tensor, time: torch.Tensor, x: torch.Tensor, **options: Any) -> Any:
        at, zeros, ones = time.reshape(1), torch.zeros_like(x), torch.ones_like(x)
        signal, noise = scheduler.add_noise(ones, zeros, at), scheduler.add_noise(zeros, ones, at)
        return step(torch.where(PAINTED, prediction, (x - signal * clean) / noise), time, x, **options)

    scheduler.step = told


def of_inpainting(parts: dict[str, Any], request: Img2Img, **options: Any) -> torch.Tensor:
    painted = torch.zeros(1, 1, 64, 64)
    painted[:, :, BOX[1] : BOX[3], BOX[0] : BOX[2]] = 1
    given = {"mask_image": painted, "masked_image_latents": torch.zeros(1, 4, 8, 8)}
    return of_pipeline(StableDiffusionInpaintPipeline, parts, request, **given | options)


@pytest.mark.parametrize("names", COMPANIES, ids=", ".join)
def test_jobs_in_company_have_the_latents_of_the_img2img_pipeline(
    parts: dict[str, Any], models: weights.Models, names: list[str]
) -> None:
    requests = [
        changed(
            REQUEST,
            sampler_name=name,
            seed=index,
            steps=4 + index % 3,
            cfg_scale=(7.0, 1.0, 4.5)[index % 3],
            denoising_strength=(0.3, 0.6, 1.0, 0.0)[index % 4],
            batch_size=1 + (index == 2),
        )
        for index, name in enumerate(names)
    ]
    tasks = [(2 * index % 5, img2img_latents(request, models)) for index, request in enumerate(requests)]
    for request, found in zip(requests, drive(tasks), strict=True):
        assert_close(found, of_pipeline(StableDiffusionImg2ImgPipeline, parts, request))


@pytest.mark.parametrize("names", COMPANIES, ids=", ".join)
def test_inpainting_jobs_in_company_keep_what_is_not_painted_in_the_samplers_noise(
    parts: dict[str, Any], models: weights.Models, names: list[str]
) -> None:
    requests = [
        changed(MASKED, sampler_name=name, seed=index, steps=4 + index % 3, denoising_strength=(0.3, 0.6)[index % 2])
        for index, name in enumerate(names)
    ]
    tasks = [(2 * index % 5, img2img_latents(request, models)) for index, request in enumerate(requests)]
    for request, found in zip(requests, drive(tasks), strict=True):
        expected = of_pipeline(StableDiffusionImg2ImgPipeline, parts, request, kept=original(parts["vae"]))
        assert_close(found, expected, least=1)


def test_plms_begins_with_its_two_evaluations_wherever_it_begins(models: weights.Models) -> None:
    """Pseudo linear multistep (Liu et al. 2022, equations 9, 12 and 13) from a step in the middle."""
    request = changed(REQUEST, sampler_name="PLMS", steps=8, denoising_strength=0.7, cfg_scale=1)
    scheduler = PNDMScheduler(**BETAS, skip_prk_steps=True, timestep_spacing="leading")
    alphas = scheduler.alphas_cumprod
    times = [1 + 125 * step for step in range(8)][::-1][request.first_step :]
    positive = steps_of(request, models)[0].guidance.positives[0][0]

    def epsilon(x: torch.Tensor, time: int) -> torch.Tensor:
        return models.unet(x, time, positive.text, return_dict=False)[0]

    def transferred(x: torch.Tensor, eps: torch.Tensor, time: int) -> torch.Tensor:
        now, then = alphas[time], alphas[time - 125] if time >= 125 else alphas[0]
        return then.sqrt() * (x - (1 - now).sqrt() * eps) / now.sqrt() + (1 - then).sqrt() * eps

    with torch.inference_mode():
        drawn = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(request.seed))
        x = alphas[times[0]].sqrt() * original(models.vae) + (1 - alphas[times[0]]).sqrt() * drawn
        history = [epsilon(x, times[0])]
        ahead = epsilon(transferred(x, history[0], times[0]), times[1])
        x = transferred(x, (history[0] + ahead) / 2, times[0])
        for time in times[1:]:
            history.append(epsilon(x, time))
            combined = {
                2: lambda h: (3 * h[-1] - h[-2]) / 2,
                3: lambda h: (23 * h[-1] - 16 * h[-2] + 5 * h[-3]) / 12,
            }.get(len(history), lambda h: (55 * h[-1] - 59 * h[-2] + 37 * h[-3] - 9 * h[-4]) / 24)(history)
            x = transferred(x, combined, time)
    assert_close(drive([(0, img2img_latents(request, models))])[0], x)


@pytest.mark.parametrize(("strength", "num_steps"), [(0.0, 1), (0.5, 11), (0.75, 16), (1.0, 20), (0.049, 1)])
def test_as_many_steps_are_made_as_in_a1111(models: weights.Models, strength: float, num_steps: int) -> None:
    request = changed(REQUEST, steps=20, denoising_strength=strength)
    progress: list[int] = []
    drive([(0, img2img.generate(request, prepared(request), crew(models), progress.append))])
    assert progress == list(range(1, num_steps + 1))


@pytest.mark.parametrize(("strength", "first_step"), [(0.5, 4), (0.75, 1), (1.0, 0)])
def test_all_steps_are_made_where_the_setting_says_so(
    parts: dict[str, Any], models: weights.Models, strength: float, first_step: int
) -> None:
    request = changed(REQUEST, fix_steps=True, steps=4, denoising_strength=strength)
    assert (request.num_steps, request.first_step) == (4, first_step)
    stretched = changed(request, fix_steps=False, steps=4 + first_step, denoising_strength=3.5 / (4 + first_step))
    assert_close(
        drive([(0, img2img_latents(request, models))])[0],
        of_pipeline(StableDiffusionImg2ImgPipeline, parts, stretched),
    )


def test_an_inpainting_unet_reads_the_mask_and_what_stays(parts: dict[str, Any], inpainting: weights.Models) -> None:
    stays = 1 - torch.from_numpy(np.asarray(mask(BOX), dtype=np.float32) / 255)
    known = original(parts["vae"], keep=stays)
    with_unet = parts | {"unet": inpainting.unet}
    requests = [changed(MASKED, seed=seed, sampler_name=name) for seed, name in enumerate(("Euler a", "DDIM"))]
    tasks = [(index, img2img_latents(request, inpainting)) for index, request in enumerate(requests)]
    for request, found in zip(requests, drive(tasks), strict=True):
        kept = original(parts["vae"])
        assert_close(found, of_inpainting(with_unet, request, masked_image_latents=known, kept=kept), least=1)
        stays = found[..., ~PAINTED]
        assert_close(stays, original(parts["vae"])[..., ~PAINTED])


def test_without_a_mask_an_inpainting_unet_paints_all_on_grey(inpainting: weights.Models) -> None:
    task = img2img_latents(REQUEST, inpainting)
    with torch.inference_mode():
        wish = next(task)
        assert wish.step.context is not None
        grey = inpainting.vae.encode(torch.zeros(1, 3, 64, 64)).latent_dist.mean * inpainting.vae.config.scaling_factor
        assert torch.equal(wish.step.context[:, :1], torch.ones(1, 1, 8, 8))
        assert_close(wish.step.context[:, 1:], grey)


def pixels(request: Img2Img, models: weights.Models) -> tuple[Canvas, list[np.ndarray]]:
    canvas = prepared(request)
    found = drive([(0, img2img.generate(request, canvas, crew(models), lambda _: None))])[0]
    return canvas, [canvas.finished(image, row) for row, image in enumerate(found)]


@pytest.mark.parametrize("fill", [0, 1, 2, 3])
@pytest.mark.parametrize("only_masked", [False, True])
def test_inpainting_keeps_the_rest_pixel_for_pixel(models: weights.Models, fill: int, only_masked: bool) -> None:
    image = noise(96, 80, seed=5)
    request = changed(
        REQUEST,
        width=96,
        height=80,
        init_images=[encoded(image)],
        mask=encoded(mask((32, 16, 64, 48), 96, 80)),
        mask_blur_x=0,
        mask_blur_y=0,
        inpainting_fill=fill,
        inpaint_full_res=only_masked,
        inpaint_full_res_padding=8,
    )
    found = pixels(request, models)[1][0]
    changed_pixels = (found != np.asarray(image)).any(-1)
    assert found.shape == (80, 96, 3)
    assert changed_pixels[16:48, 32:64].mean() > 0.9
    changed_pixels[16:48, 32:64] = False
    assert not changed_pixels.any()


def test_fills_differ_in_what_the_masked_part_begins_as(models: weights.Models) -> None:
    """Seen in the first noised latents: the noise alone, the original, or what flows in from around. That flows in
    beneath noise and nothing too."""
    first = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(3))
    starts = {}
    for fill in range(4):
        request = changed(MASKED, inpainting_fill=fill, sampler_name="DDIM", denoising_strength=0.3)
        with torch.inference_mode():
            starts[fill] = next(img2img_latents(request, models)).x
    clean, filled = original(models.vae), original(models.vae, prepared(changed(MASKED, inpainting_fill=0)).pictures[0])
    scheduler = scheduler_of("DDIM", 0)
    scheduler.set_timesteps(6)
    time = scheduler.timesteps[request.first_step : request.first_step + 1]
    inside = torch.zeros(8, 8, dtype=torch.bool)
    inside[1:5, 2:6] = True
    expected = {
        0: scheduler.add_noise(filled, first, time),
        1: scheduler.add_noise(clean, first, time),
        2: scheduler.add_noise(torch.where(inside, first, filled), first, time),
        3: scheduler.add_noise(torch.where(inside, 0.0, filled), first, time),
    }
    for fill, latent in expected.items():
        assert_close(starts[fill], latent)
    assert not torch.allclose(starts[0][..., inside], starts[1][..., inside], atol=1e-3)


@pytest.mark.parametrize("fill", [0, 2, 3])
def test_what_is_painted_over_leaves_no_trace_around(models: weights.Models, fill: int) -> None:
    other = noise()
    other.paste("white", BOX)
    pictures = [changed(MASKED, inpainting_fill=fill, init_images=[encoded(image)]) for image in (noise(), other)]
    one, two = (img2img.encoded(request, prepared(request), models) for request in pictures)
    assert torch.equal(one[..., ~PAINTED], two[..., ~PAINTED])


def test_several_pictures_are_a_batch_of_one_each(models: weights.Models) -> None:
    images = [encoded(noise(seed=seed)) for seed in (1, 2)]
    together = pixels(changed(REQUEST, init_images=images), models)[1]
    for index, image in enumerate(images):
        alone = pixels(changed(REQUEST, init_images=[image], seed=REQUEST.seed + index), models)[1][0]
        assert np.abs(alone.astype(int) - together[index]).max() <= 1


def test_a_picture_of_another_size_is_scaled_as_latents_when_asked(models: weights.Models) -> None:
    image = noise(128, 96)
    request = changed(REQUEST, init_images=[encoded(image)], resize_mode=3)
    with torch.inference_mode():
        found = img2img.encoded(request, prepared(request), models)
    expected = torch.nn.functional.interpolate(original(models.vae, image), (8, 8), mode="bilinear")
    assert_close(found, expected)


def test_the_noise_can_be_multiplied(models: weights.Models) -> None:
    with torch.inference_mode():
        one = next(img2img_latents(REQUEST, models)).x
        none = next(img2img_latents(changed(REQUEST, initial_noise_multiplier=0), models)).x
    assert not torch.allclose(one, none)
    scheduler = scheduler_of("Euler", 0)
    scheduler.set_timesteps(6)
    sigma = scheduler.sigmas[REQUEST.first_step]
    assert_close(none, original(models.vae) / (sigma**2 + 1) ** 0.5)
