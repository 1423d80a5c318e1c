"""ControlNet against diffusers' own pipelines, alone and in the company of jobs with other units and with none."""

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    StableDiffusionControlNetImg2ImgPipeline,
    StableDiffusionControlNetInpaintPipeline,
    StableDiffusionControlNetPipeline,
    StableDiffusionXLControlNetPipeline,
)
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from safetensors.torch import load_file, save_file

from gpu_worker.job import JobError
from gpu_worker.models import controlnet, weights
from gpu_worker.models.adapters import Adapters
from gpu_worker.models.controlnet import ControlNet
from gpu_worker.pictures.canvas import Canvas
from gpu_worker.pictures.hints import prepared
from gpu_worker.tasks import hires, stages, steering
from services.common.payloads import Generation, Txt2Img
from services.common.payloads.controlnet import BALANCED, CONTROL, PROMPT
from services.common.payloads.prompts import NetworkTag
from tests.gpu_worker import tiny_controlnet
from tests.gpu_worker.conftest import as_cached
from tests.gpu_worker.driving import (
    assert_close,
    changed,
    crew,
    drive,
    img2img_latents,
    img2img_of,
    latents,
    txt2img_of,
)
from tests.gpu_worker.models.test_lora import ATTENTION, CONVOLUTION, TEXT, merged, write
from tests.gpu_worker.reference import pipeline_of, scheduler_of
from tests.gpu_worker.tiny_sdxl import make
from tests.pictures import encoded, mask, noise

FIELDS = {"prompt": "a red circle", "negative_prompt": "blurry", "steps": 4, "width": 64, "height": 64, "seed": 3}
PICTURES = [noise(seed=seed) for seed in (5, 6)]


def unit(index: int, **fields: Any) -> dict[str, Any]:
    """A unit with the net and the picture of that number."""
    return {"model": f"net{index}", "image": encoded(PICTURES[index]), "weight": 0.8} | fields


def request_of(*units: dict[str, Any], **fields: Any) -> Txt2Img:
    return txt2img_of(**FIELDS | fields, alwayson_scripts={"controlnet": {"args": list(units)}})


@pytest.fixture(scope="module")
def models(tiny_checkpoint: Path) -> weights.Models:
    return weights.load(as_cached(tiny_checkpoint), None, "cpu")


@pytest.fixture(scope="module")
def nets(models: weights.Models) -> list[ControlNet]:
    return [ControlNet(f"net{seed}", tiny_controlnet.make(models.unet, seed)) for seed in (0, 1)]


@pytest.fixture(scope="module")
def parts(tiny_checkpoint: Path, models: weights.Models, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("config")
    found: dict[str, Any] = pipeline_of(tiny_checkpoint, models.text_encoders[0].tokenizer, folder).components
    return found


def having(request: Generation, nets: list[ControlNet]) -> Adapters:
    return Adapters(controlnets=tuple(nets[int(unit.model[-1])] for unit in request.controlnet))


def looked_at(request: Generation) -> list[torch.Tensor]:
    pictures = [PICTURES[int(unit.model[-1])] for unit in request.controlnet]
    return [torch.from_numpy(np.asarray(image, dtype=np.float32) / 255).permute(2, 0, 1)[None] for image in pictures]


def as_in_mode(net: Any, mode: str, is_guided: bool) -> Any:
    """A copy of the net that says as much as the extension has it in that mode."""
    changed = copy.deepcopy(net)
    forward = changed.forward

    def shared(*arguments: Any, **options: Any) -> Any:
        down, middle = forward(*arguments, **options)
        outputs = [*down, middle]
        if mode != BALANCED:
            outputs = [output * 0.825 ** (12 - index) for index, output in enumerate(outputs)]
        if mode == CONTROL and is_guided:  # the first half is the negative prompt's
            for output in outputs:
                output[: len(output) // 2] = 0
        return tuple(outputs[:-1]), outputs[-1]

    changed.forward = shared
    return changed


def expected(kind: Any, parts: dict[str, Any], nets: list[ControlNet], request: Generation, **options: Any) -> Any:
    """The final latents of the request, made by diffusers' pipeline alone."""
    seeds = [request.seed + row for row in range(request.batch_size)]
    units = request.controlnet
    used = [as_in_mode(nets[int(one.model[-1])].model, one.control_mode, request.cfg_scale > 1) for one in units]
    pipeline = kind(**parts, controlnet=used)
    pipeline.scheduler = scheduler_of(request.sampler_name, seeds)
    pipeline.set_progress_bar_config(disable=True)
    given: dict[str, Any] = {"width": request.width, "height": request.height} if "image" not in options else {}
    name = "control_image" if "image" in options else "image"
    negative = [request.negative_prompt] * len(seeds) if request.negative_prompt else None
    # The extension's range takes in the step that its end falls on, diffusers' does not.
    ends = [(int(one.guidance_end * request.num_steps) + 1) / request.num_steps for one in units]
    return pipeline(
        [request.prompt] * len(seeds),
        negative_prompt=negative,
        num_inference_steps=request.steps,
        guidance_scale=request.cfg_scale,
        generator=[torch.Generator().manual_seed(seed) for seed in seeds],
        controlnet_conditioning_scale=[one.weight for one in units],
        control_guidance_start=[one.guidance_start for one in units],
        control_guidance_end=[min(end, 1.0) for end in ends],
        output_type="latent",
        **{name: looked_at(request)},
        **given,
        **options,
    ).images


@pytest.mark.slow
def test_jobs_in_company_have_the_latents_of_the_diffusers_pipeline(
    parts: dict[str, Any], models: weights.Models, nets: list[ControlNet]
) -> None:
    requests = [
        request_of(unit(0)),
        request_of(unit(0, weight=0.4), seed=4, steps=6, sampler_name="Euler a", cfg_scale=1, negative_prompt=""),
        request_of(unit(0, control_mode=PROMPT), sampler_name="DPM++ 2M Karras", batch_size=2),
        request_of(unit(0, control_mode=CONTROL), seed=5, prompt="a cat BREAK a dog", cfg_scale=4),
        request_of(unit(0), unit(1, weight=1.5), seed=6, sampler_name="Heun"),
        request_of(unit(0), unit(0, weight=0.3, control_mode=CONTROL), seed=7),
        request_of(unit(1, guidance_start=0.25, guidance_end=0.6), seed=8, steps=8),
        request_of(unit(0, guidance_end=0.3), unit(1, guidance_start=0.5), seed=9, sampler_name="DDIM"),
    ]
    plain = [changed(requests[0], controlnet=[], seed=seed) for seed in (3, 4)]
    tasks = [(i % 3, latents(request, models, having(request, nets))) for i, request in enumerate(requests + plain)]
    found = drive(tasks, max_rows=5)
    for request, latent in zip(requests, found, strict=False):
        if "BREAK" not in request.prompt:
            assert_close(latent, expected(StableDiffusionControlNetPipeline, parts, nets, request))
        assert_close(latent, drive([(0, latents(request, models, having(request, nets)))])[0])
    for request, latent in zip(plain, found[-2:], strict=True):
        assert_close(latent, drive([(0, latents(request, models))])[0])
    assert (found[0] - found[-2]).abs().max() > 0.01 * found[0].abs().max()


@pytest.mark.slow
def test_networks_and_nets_in_one_call_are_each_that_of_its_own_job(
    models: weights.Models, nets: list[ControlNet], tmp_path: Path
) -> None:
    """Prompts of one chunk and two, with guidance and without, in calls that cut a job's rows apart."""
    kinds = [{ATTENTION: "lora", CONVOLUTION: "loha", TEXT: "lora"}, {ATTENTION: "lokr"}]
    networks = [write(tmp_path / f"{index}.safetensors", models, kind, 10 * index) for index, kind in enumerate(kinds)]
    one, other = NetworkTag("0", 0.7, 0.9), NetworkTag("1", 1.0, -0.5)
    jobs: list[tuple[Txt2Img, list[tuple[int, NetworkTag]]]] = [
        (request_of(unit(0), batch_size=2), [(0, one)]),
        (request_of(unit(0, weight=0.4), seed=4, cfg_scale=1), []),
        (request_of(unit(0, control_mode=CONTROL), seed=5, prompt="a cat BREAK a dog"), [(1, other)]),
        (request_of(unit(0, control_mode=PROMPT), seed=6, sampler_name="Euler a"), [(1, one), (0, other)]),
    ]
    tasks = [
        (
            index % 2,
            latents(
                request,
                models,
                replace(having(request, nets), networks=tuple((networks[n][0], use) for n, use in uses)),
            ),
        )
        for index, (request, uses) in enumerate(jobs)
    ]
    for (request, uses), found in zip(jobs, drive(tasks, max_rows=3), strict=True):
        alone = merged(models, *((networks[n][1], use) for n, use in uses))
        assert_close(found, drive([(0, latents(request, alone, having(request, nets)))])[0])


@pytest.mark.slow
def test_img2img_and_inpainting_have_the_latents_of_the_diffusers_pipelines(
    parts: dict[str, Any], models: weights.Models, nets: list[ControlNet], monkeypatch: pytest.MonkeyPatch
) -> None:
    image = noise(seed=1)
    box = (16, 8, 48, 40)
    scripts = {"controlnet": {"args": [unit(0), unit(1, weight=0.5)]}}
    plain = img2img_of(**FIELDS | {"steps": 6}, denoising_strength=0.5, init_images=[encoded(image)])
    request = img2img_of(**plain.model_dump() | {"alwayson_scripts": scripts, "controlnet": None})
    masked = changed(request, mask=encoded(mask(box)), mask_blur_x=0, mask_blur_y=0, inpainting_fill=1)
    masked = changed(masked, inpaint_full_res=False, sampler_name="DDIM", seed=8)
    # The middle of what the encoder finds likely, instead of a draw that takes numbers from the noise.
    monkeypatch.setattr(DiagonalGaussianDistribution, "sample", lambda self, *_, **__: self.mode())
    options = {"image": image, "strength": (request.num_steps + 0.5) / 6}
    both = drive([(0, img2img_latents(one, models, having(one, nets))) for one in (request, masked)])
    assert_close(both[0], expected(StableDiffusionControlNetImg2ImgPipeline, parts, nets, request, **options))
    painted = torch.zeros(1, 1, 64, 64)
    painted[:, :, box[1] : box[3], box[0] : box[2]] = 1
    kind = StableDiffusionControlNetInpaintPipeline
    assert_close(both[1], expected(kind, parts, nets, masked, **options, mask_image=painted))


@pytest.mark.slow
def test_sdxl_has_the_latents_of_the_diffusers_pipeline(tmp_path: Path) -> None:
    sdxl = make(tmp_path / "xl.safetensors")
    nets = [ControlNet(f"net{seed}", tiny_controlnet.make(sdxl.models.unet, seed)) for seed in (0, 1)]
    requests = [
        request_of(unit(0), batch_size=2),
        request_of(unit(0, control_mode=PROMPT), unit(1, weight=0.5, control_mode=CONTROL), seed=5, steps=5),
        request_of(unit(1, guidance_end=0.4), sampler_name="Euler a", negative_prompt="", seed=6),
    ]
    tasks = [(i, latents(request, sdxl.models, having(request, nets))) for i, request in enumerate(requests)]
    for request, found in zip(requests, drive(tasks), strict=True):
        assert_close(found, expected(StableDiffusionXLControlNetPipeline, sdxl.components, nets, request))


def test_a_file_in_either_layout_is_the_same_net(
    models: weights.Models, nets: list[ControlNet], tmp_path: Path
) -> None:
    for is_original in (True, False):
        path = tiny_controlnet.save(nets[0].model, tmp_path / f"net_{is_original}.safetensors", is_original)
        found = controlnet.load(as_cached(path, "ControlNet"), models, "tiny").model
        expected = nets[0].model.state_dict()
        assert all(torch.equal(tensor, expected[key]) for key, tensor in found.state_dict().items())
        assert not found.config.global_pool_conditions
    path = tiny_controlnet.save(nets[0].model, tmp_path / "control_v11e_sd15_shuffle.safetensors")
    assert controlnet.load(as_cached(path, "ControlNet"), models, "tiny").is_pooled


def test_a_pooled_net_says_the_same_everywhere_and_nothing_to_the_negative_prompt(
    parts: dict[str, Any], models: weights.Models
) -> None:
    pooled = tiny_controlnet.make(models.unet, 0, global_pool_conditions=True)
    request = request_of(unit(0))
    found = drive([(0, latents(request, models, having(request, [ControlNet("net0", pooled)])))])[0]
    pipeline = StableDiffusionControlNetPipeline(**parts, controlnet=pooled)  # takes a pooled net in this way
    pipeline.scheduler = scheduler_of("Euler", 0)
    pipeline.set_progress_bar_config(disable=True)
    expected = pipeline(
        request.prompt,
        image=looked_at(request)[0],
        negative_prompt=request.negative_prompt,
        num_inference_steps=4,
        guidance_scale=7.0,
        generator=torch.Generator().manual_seed(3),
        controlnet_conditioning_scale=0.8,
        output_type="latent",
    ).images
    assert_close(found, expected)


def test_a_second_pass_looks_at_a_hint_of_its_size_softly_where_it_is_of_lines(
    models: weights.Models, nets: list[ControlNet]
) -> None:
    request = request_of(
        unit(0, module="canny", processor_res=64),
        unit(1, hr_option="High res only"),
        enable_hr=True,
        hr_scale=1.5,
        denoising_strength=0.5,
    )
    canvas = prepared(request)
    having_nets = crew(models, having(request, nets))
    with torch.inference_mode():
        first = steering.steps_of(request, having_nets, canvas)
        second = hires.begin(request, canvas, having_nets, having_nets).steps
    assert [control.net for control in first[0].controls] == [nets[0].model]
    assert first[0].controls[0].scales == (0.8,) * 9
    controls = {id(control.net): control for control in second[0].controls}
    assert controls[id(nets[0].model)].hint.shape == (1, 3, 96, 96)
    assert controls[id(nets[0].model)].scales[0] == pytest.approx(0.8 * 0.825**12)
    assert controls[id(nets[0].model)].scales[8] == pytest.approx(0.8 * 0.825**4)
    assert controls[id(nets[1].model)].scales == (0.8,) * 9


def test_what_inpaint_only_does_not_paint_stays(models: weights.Models, nets: list[ControlNet]) -> None:
    painted = encoded(mask((0, 0, 32, 64)))
    request = request_of(unit(0, module="inpaint_only", mask=painted, weight=1.0), sampler_name="Euler a")
    canvas = prepared(request)
    found = drive([(0, latents(request, models, having(request, nets)))])[0]
    with torch.inference_mode():
        original = stages.latents_of(models, stages.as_tensor(np.asarray(PICTURES[0])))
    assert_close(found[..., 5:], original[..., 5:])
    assert (found[..., :4] - original[..., :4]).abs().max() > 0.1
    pixels = np.zeros((64, 64, 3), np.uint8)
    finished = canvas.finished(pixels, 0)
    assert np.array_equal(finished[:, 40:], np.asarray(PICTURES[0])[:, 40:])
    assert not finished[:, :28].any()


def test_tile_colorfix_keeps_the_colours_of_the_picture(models: weights.Models, nets: list[ControlNet]) -> None:
    request = request_of(unit(0, module="tile_colorfix", threshold_a=3, weight=1.0))
    found = drive([(0, latents(request, models, having(request, nets)))])[0]
    without = drive([(0, latents(request_of(unit(0, weight=1.0)), models, having(request, nets)))])[0]
    with torch.inference_mode():
        original = stages.latents_of(models, stages.as_tensor(np.asarray(PICTURES[0])))
    average = torch.nn.AvgPool2d(7, 1)
    assert (average(found - original)).abs().mean() < 0.5 * (average(without - original)).abs().mean()


def test_a_refiner_of_the_same_family_is_controlled_too(models: weights.Models, nets: list[ControlNet]) -> None:
    request = request_of(unit(0), refiner_checkpoint="other", refiner_switch_at=0.5)
    having_nets = crew(models, having(request, nets), models)
    controlled = steering.Crew(having_nets.base, having_nets.base)
    with torch.inference_mode():
        for painters, expected in ((controlled, [1, 1, 1, 1]), (having_nets, [1, 1, 0, 0])):
            steps = steering.steps_of(request, painters, prepared(request))
            assert [len(step.controls) for step in steps] == expected


@pytest.mark.parametrize(
    ("names", "sentence"),
    [
        (
            ["lllite_unet_input_blocks_4.down.weight"],
            "is a ControlNet-LLLite, which cannot be run here; possible: Contr",
        ),
        (["lora_controlnet"], "is a Control-LoRA, which"),
        (["adapter.body.0.weight"], "is a T2I adapter, which"),
        (["ip_adapter.1.to_k_ip.weight", "image_proj.proj.weight"], "is an IP-Adapter, which"),
        (["unet.weight"], "x.safetensors is no ControlNet"),
    ],
)
def test_other_kinds_of_control_are_named(
    models: weights.Models, tmp_path: Path, names: list[str], sentence: str
) -> None:
    save_file({name: torch.zeros(2) for name in names}, tmp_path / "x.safetensors")
    with pytest.raises(JobError) as refused:
        controlnet.load(as_cached(tmp_path / "x.safetensors", "ControlNet"), models, "tiny")
    assert sentence in str(refused.value)


def test_a_net_for_another_architecture_is_refused_by_name(
    models: weights.Models, nets: list[ControlNet], tmp_path: Path
) -> None:
    path = tiny_controlnet.save(nets[0].model, tmp_path / "x.safetensors")
    state = load_file(path)
    state["control_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight"] = torch.zeros(16, 99)
    save_file(state, path)
    with pytest.raises(JobError) as refused:
        controlnet.load(as_cached(path, "ControlNet"), models, "tiny")
    assert str(refused.value) == "x.safetensors is a ControlNet for another architecture than tiny"


def test_nothing_is_looked_at_without_units(models: weights.Models) -> None:
    assert prepared(request_of()).hints == Canvas().hints == []
