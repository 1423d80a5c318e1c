"""GpuWorkerService over a real server, with real uploads: results, failures, cancellation, callers."""

import asyncio
import hashlib
import io
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import cv2
import grpc
import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel
from PIL import Image
from safetensors.torch import save

from esd.worker.v1 import worker_pb2, worker_pb2_grpc
from gpu_worker.models import tiny
from gpu_worker.servicer import GpuWorkerServicer
from gpu_worker.worker import Worker
from services.common.payloads import check
from services.common.structs import plain
from tests.gpu_worker import tiny_controlnet, tiny_esrgan, tiny_hypernetwork, tiny_lora, tiny_onnx
from tests.gpu_worker.conftest import ObjectStore
from tests.pictures import encoded, mask, noise
from tests.serving import Tokens


@pytest.fixture(scope="module")
def tokens() -> Tokens:
    return Tokens()


@pytest.fixture
async def stub(worker: Worker, tokens: Tokens) -> AsyncIterator[Any]:
    server = grpc.aio.server()
    worker_pb2_grpc.add_GpuWorkerServiceServicer_to_server(GpuWorkerServicer(worker, tokens.verifier()), server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        yield worker_pb2_grpc.GpuWorkerServiceStub(channel)
    await server.stop(None)


@pytest.fixture
def generate(stub: Any, tokens: Tokens) -> Any:
    async def call(spec: worker_pb2.JobSpec) -> list[worker_pb2.JobEvent]:
        request = worker_pb2.GenerateRequest(spec=spec)
        return [response.event async for response in stub.Generate(request, metadata=tokens.service("inference"))]

    return call


async def test_a_job_leaves_pictures_and_its_parameters_in_the_store(
    generate: Any, store: ObjectStore, make_spec: Any
) -> None:
    settings = {"eta_noise_seed_delta": 31337}
    asked = {"negative_prompt": "dull", "sampler_name": "Euler a", "batch_size": 2, "cfg_scale": 7.5}
    spec = make_spec(**asked, s_min_uncond=1.5, override_settings=settings)
    events = await generate(spec)
    kinds = [event.WhichOneof("event") for event in events]
    assert kinds[0] == "started"
    assert kinds[-1] == "done"
    assert events[-2].progress == worker_pb2.JobProgress(step=4, num_steps=4)
    done = events[-1].done
    assert [result.name for result in done.images] == ["image_0.png", "image_1.png"]
    for result in (*done.images, done.param):
        content = store.objects[f"{spec.job_id}/{result.name}"]
        assert (len(content), hashlib.sha256(content).hexdigest()) == (result.size_bytes, result.sha256)
    image = Image.open(io.BytesIO(store.objects[f"{spec.job_id}/image_1.png"]))
    model_hash = spec.models[0].sha256[:10]
    assert image.size == (64, 64)
    assert image.text["parameters"].startswith("a cat\nNegative prompt: dull\nSteps: 2, Sampler: Euler a, ")
    assert f"CFG scale: 7.5, Seed: 8, Size: 64x64, Model hash: {model_hash}, Model: tiny" in image.text["parameters"]
    assert "ENSD: 31337, RNG: CPU, NGMS: 1.5" in image.text["parameters"]
    param = json.loads(store.objects[f"{spec.job_id}/{spec.job_id}_param.json"])
    assert param.keys() == {"parameters", "info", "endpoint_name", "inference_id"}
    assert param["parameters"] == check("txt2img", plain(spec.payload), spec.job_id).model_dump()
    info = json.loads(param["info"])
    assert info["infotexts"][1] == image.text["parameters"]
    assert info["all_seeds"] == [7, 8]
    making = json.loads(image.text["esd"])
    assert (making["job"], making["image"], making["task_type"]) == (spec.job_id, 1, "txt2img")
    assert making["models"] == [
        {"type": "Stable-diffusion", "name": "tiny.safetensors", "sha256": spec.models[0].sha256}
    ]
    assert making["request"] == param["parameters"]
    assert making["engine"] == info["engine"]
    assert info["engine"].keys() == {"esd", "torch", "diffusers", "device"}
    assert info["hashes"] == {"model": spec.models[0].sha256}
    for part in ("fetch", "load", "pipeline", "encode", "upload"):
        assert getattr(done.timings, f"{part}_seconds") > 0


async def test_the_same_job_gives_the_same_picture_and_fetches_its_model_once(
    generate: Any, store: ObjectStore, make_spec: Any
) -> None:
    spec, files = make_spec(), []
    for _ in range(2):
        await generate(spec)
        files.append(store.objects.pop(f"{spec.job_id}/image_0.png"))
    assert files[0] == files[1]
    assert store.requests.count(("GET", "tiny.safetensors")) == 1


async def test_a_large_payload_is_read_from_its_url(generate: Any, store: ObjectStore, make_spec: Any) -> None:
    content = b'{"prompt": "from the store", "steps": 1, "width": 64, "height": 64, "s_tmax": Infinity}'
    spec = make_spec()
    spec.ClearField("payload")
    spec.payload_url = store.put("payload.json", content)
    spec.payload_sha256 = hashlib.sha256(content).hexdigest()
    assert (await generate(spec))[-1].HasField("done")
    param = json.loads(store.objects[f"{spec.job_id}/{spec.job_id}_param.json"])
    assert param["parameters"]["prompt"] == "from the store"
    spec.payload_sha256 = "0" * 64
    assert "SHA-256 of the payload" in (await generate(spec))[-1].failed.reason


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"task_type": "deepbooru"}, "task type deepbooru is not known; possible: txt2img, img2img, "),
        ({"sampler_name": "DPM adaptive"}, 'sampler_name "DPM adaptive" cannot be run here'),
        ({"restore_faces": True}, "restore_faces true: face restoration needs weights that this service does not have"),
        ({"width": 32}, "width 32 is out of range: 64 to 4096 is possible"),
        ({"n_iter": 3}, "the job makes 3 images"),
    ],
)
async def test_a_job_that_cannot_be_done_fails_with_one_sentence(
    generate: Any, make_spec: Any, change: dict[str, Any], reason: str
) -> None:
    failed = (await generate(make_spec(**change)))[-1].failed
    assert reason in failed.reason
    assert not failed.cancelled
    assert failed.nothing_uploaded


async def test_a_job_that_fails_while_it_uploads_says_that_there_is_something_to_clean_up(
    generate: Any, make_spec: Any
) -> None:
    spec = make_spec()
    spec.param_upload.url = "http://127.0.0.1:1/nobody"
    failed = (await generate(spec))[-1].failed
    assert failed.reason
    assert not failed.nothing_uploaded


def add_model(spec: worker_pb2.JobSpec, store: ObjectStore, kind: str, name: str, state: dict[str, Any]) -> str:
    """Gives the job another model file; answers its SHA-256."""
    return add_file(spec, store, kind, name, save(state))


def add_file(spec: worker_pb2.JobSpec, store: ObjectStore, kind: str, name: str, content: bytes) -> str:
    """Gives the job another file; answers its SHA-256."""
    sha256 = hashlib.sha256(content).hexdigest()
    url = store.put(name, content)
    spec.models.add(type=kind, name=name, url=url, size_bytes=len(content), cache_key=sha256, sha256=sha256)
    return sha256


async def test_a_job_has_the_networks_that_its_prompt_names(generate: Any, store: ObjectStore, make_spec: Any) -> None:
    state = tiny_lora.state()
    plain, spec = make_spec(prompt="a cat amypt "), make_spec(prompt="a cat amypt <lora:style.v2:0.5><hypernet:mood:1>")
    hashes = {"model": spec.models[0].sha256}
    hashes["lora:style.v2"] = add_model(spec, store, "Lora", "style.v2.safetensors", state)
    hashes["hypernet:mood"] = add_file(spec, store, "hypernetworks", "mood.pt", tiny_hypernetwork.content())
    hashes["embed:amypt"] = add_model(spec, store, "embeddings", "amypt.safetensors", {"emb_params": torch.ones(2, 32)})
    add_model(spec, store, "Lora", "unused.safetensors", state)
    for each in (plain, spec):
        assert (await generate(each))[-1].HasField("done")
    one, other = (Image.open(io.BytesIO(store.objects[f"{each.job_id}/image_0.png"])) for each in (plain, spec))
    assert one.tobytes() != other.tobytes()
    assert f"Hashes: {json.dumps(hashes)}, Version: esd " in other.text["parameters"]
    assert ("GET", "unused.safetensors") not in store.requests
    param = json.loads(store.objects[f"{spec.job_id}/{spec.job_id}_param.json"])
    assert json.loads(param["info"])["hashes"] == hashes
    assert json.loads(param["info"])["ignored"] == []
    spec.models[1].name = "other.safetensors"
    reason = (await generate(spec))[-1].failed.reason
    assert reason.startswith(
        "<lora:style.v2> names style.v2, which is not among the job's models of type Lora; there: other"
    )
    spec = make_spec(prompt="<lora:wrong>")
    wrong = {"lora_te2_text_model_encoder_layers_0_mlp_fc1.lora_down.weight": torch.ones(2, 32)}
    add_model(spec, store, "Lora", "wrong.safetensors", wrong)
    reason = (await generate(spec))[-1].failed.reason
    assert reason.startswith("wrong.safetensors is a LoRA for another architecture than tiny.safetensors")


async def test_a_network_counts_though_an_embedding_has_its_name(
    generate: Any, store: ObjectStore, make_spec: Any
) -> None:
    """Clients send all embeddings there are."""
    spec, plain = make_spec(prompt="a cat style<lora:style:1>"), make_spec(prompt="a cat style")
    add_model(spec, store, "Lora", "style.safetensors", tiny_lora.state())
    for each in (spec, plain):
        add_model(each, store, "embeddings", "style.pt", {"emb_params": torch.ones(2, 32)})
        assert (await generate(each))[-1].HasField("done")
    one, other = (Image.open(io.BytesIO(store.objects[f"{each.job_id}/image_0.png"])) for each in (spec, plain))
    assert one.tobytes() != other.tobytes()


async def test_an_embedding_for_another_architecture_is_a_word_like_others_and_is_named(
    generate: Any, store: ObjectStore, make_spec: Any
) -> None:
    spec, plain = make_spec(prompt="a cat style"), make_spec(prompt="a cat style")
    add_model(spec, store, "embeddings", "style.pt", {"emb_params": torch.ones(2, 768)})
    for each in (spec, plain):
        assert (await generate(each))[-1].HasField("done")
    one, other = (Image.open(io.BytesIO(store.objects[f"{each.job_id}/image_0.png"])) for each in (spec, plain))
    assert one.tobytes() == other.tobytes()
    assert one.text["parameters"] == other.text["parameters"]
    info = json.loads(json.loads(store.objects[f"{spec.job_id}/{spec.job_id}_param.json"])["info"])
    assert info["ignored"] == ["embedding style.pt, made for another architecture"]
    assert info["hashes"] == {"model": spec.models[0].sha256}


async def test_a_reason_that_quotes_a_hostile_file_can_be_told(
    generate: Any, store: ObjectStore, make_spec: Any
) -> None:
    spec, content = make_spec(prompt="<lora:wrong>"), io.BytesIO()
    torch.save({"lora_unet_\0\ud800" + "x" * 100_000 + ".lora_down.weight": torch.ones(2, 32)}, content)
    add_file(spec, store, "Lora", "wrong.pt", content.getvalue())
    reason = (await generate(spec))[-1].failed.reason
    assert "has no layer lora_unet_\\x00\\ud800xxx" in reason
    assert len(reason) == 4000


@pytest.mark.slow
async def test_every_checkpoint_and_the_vae_of_a_job_are_told_by_hash(
    generate: Any, store: ObjectStore, make_spec: Any, tmp_path: Path
) -> None:
    spec = make_spec(refiner_checkpoint="refiner", refiner_switch_at=0.5, enable_hr=True, hr_checkpoint_name="second")
    hashes = {"model": spec.models[0].sha256}
    for seed, (name, kind, key) in enumerate(
        [
            ("refiner.safetensors", "Stable-diffusion", "model:refiner"),
            ("second.safetensors", "Stable-diffusion", "model:second"),
            ("vae.safetensors", "VAE", "vae"),
        ],
        start=2,
    ):
        tiny.write(tmp_path / name, seed=seed)
        hashes[key] = add_file(spec, store, kind, name, (tmp_path / name).read_bytes())
    assert (await generate(spec))[-1].HasField("done")
    picture = Image.open(io.BytesIO(store.objects[f"{spec.job_id}/image_0.png"]))
    assert all(f'"{key}": "{sha256}"' in picture.text["parameters"] for key, sha256 in hashes.items())
    param = json.loads(store.objects[f"{spec.job_id}/{spec.job_id}_param.json"])
    assert json.loads(param["info"])["hashes"] == hashes


async def test_what_a_controlnet_looked_at_is_a_picture_of_the_result(
    generate: Any, store: ObjectStore, make_spec: Any
) -> None:
    image = noise(seed=4)
    unit = {"model": "canny", "module": "canny", "image": encoded(image), "processor_res": 64, "weight": 0.5}
    spec = make_spec(alwayson_scripts={"controlnet": {"args": [unit]}})
    state = tiny_controlnet.make(UNet2DConditionModel(**tiny.config()["unet"]), 0).state_dict()
    sha256 = add_model(spec, store, "ControlNet", "canny.safetensors", state)
    plain = make_spec()
    done = [(await generate(each))[-1].done for each in (spec, plain)]
    assert [image.name for image in done[0].images] == ["image_0.png", "image_1.png"]
    controlled, seen = (Image.open(io.BytesIO(store.objects[f"{spec.job_id}/image_{i}.png"])) for i in (0, 1))
    other = Image.open(io.BytesIO(store.objects[f"{plain.job_id}/image_0.png"]))
    assert controlled.tobytes() != other.tobytes()
    assert np.array_equal(np.asarray(seen)[..., 0], cv2.Canny(np.asarray(image), 100, 200))
    text = f'ControlNet 0: "Module: canny, Model: canny [{sha256[:8]}], Weight: 0.5, '
    assert text in controlled.text["parameters"]
    param = json.loads(store.objects[f"{spec.job_id}/{spec.job_id}_param.json"])
    info = json.loads(param["info"])
    assert info["hashes"]["controlnet:canny"] == sha256
    assert len(info["infotexts"]) == 1
    assert param["parameters"]["controlnet"][0]["image"] is None


async def test_a_plot_is_a_grid_of_its_pictures_and_those_if_asked_for(
    generate: Any, store: ObjectStore, make_spec: Any
) -> None:
    plain = [make_spec(steps=steps, seed=seed, exclusive=True) for seed in (7, 8) for steps in (2, 3)]
    axes = [4, "2,3", [], 1, "7,8", [], 0, "", []]
    script = {"script_name": "x/y/z plot", "script_args": [*axes, True, True, False, False]}
    spec = make_spec(num_uploads=5, exclusive=True, **script)
    *_, events = [await generate(each) for each in (*plain, spec)]
    assert [event.WhichOneof("event") for event in events].count("started") == 1
    assert events[-2].progress == worker_pb2.JobProgress(step=10, num_steps=10)
    assert len(events[-1].done.images) == 5
    images = [Image.open(io.BytesIO(store.objects[f"{spec.job_id}/image_{i}.png"])) for i in range(5)]
    assert images[0].width > 128
    assert {image.size for image in images[1:]} == {(64, 64)}
    for each, image in zip(plain, images[1:], strict=True):
        alone = Image.open(io.BytesIO(store.objects[f"{each.job_id}/image_0.png"]))
        assert alone.tobytes() == image.tobytes()
    text = 'Script: X/Y/Z plot, X Type: Steps, X Values: "2, 3", Y Type: Seed, Y Values: "7, 8", '
    assert text in images[0].text["parameters"]
    assert text not in images[1].text["parameters"]
    param = json.loads(store.objects[f"{spec.job_id}/{spec.job_id}_param.json"])
    info = json.loads(param["info"])
    assert info["all_seeds"] == [7, 7, 7, 8, 8]
    assert info["index_of_first_image"] == 1
    assert [image.text["parameters"] for image in images] == info["infotexts"]
    broken = make_spec(num_uploads=5, script_name="x/y/z plot", script_args=[*axes[:3], 11, "gone", [], 0, "", []])
    assert "names gone, which is not among the job's models" in (await generate(broken))[-1].failed.reason


async def test_a_second_pass_makes_a_larger_picture(generate: Any, store: ObjectStore, make_spec: Any) -> None:
    spec = make_spec(enable_hr=True, hr_scale=1.5, denoising_strength=0.5, hr_upscaler="Lanczos", hr_prompt="a dog")
    events = await generate(spec)
    assert events[-2].progress == worker_pb2.JobProgress(step=4, num_steps=4)
    image = Image.open(io.BytesIO(store.objects[f"{spec.job_id}/image_0.png"]))
    assert image.size == (96, 96)
    assert "Denoising strength: 0.5, RNG: CPU, " in image.text["parameters"]
    text = "Hires upscale: 1.5, Hires upscaler: Lanczos, Hires prompt: a dog, "
    assert text in image.text["parameters"]


async def test_pictures_are_enlarged_and_cut_out_without_a_model(
    generate: Any, store: ObjectStore, make_spec: Any
) -> None:
    image = encoded(noise())
    for task_type, payload, size, mode in (
        ("extra-single-image", {"image": image, "upscaler_1": "Lanczos", "upscaling_resize": 2}, (128, 128), "RGB"),
        ("rembg", {"input_image": image, "model": "u2net"}, (64, 64), "RGBA"),
        (
            "extra-batch-images",
            {"imageList": [{"data": image, "name": "a"}], "upscaler_1": "Nearest"},
            (128, 128),
            "RGB",
        ),
    ):
        spec = make_spec(task_type, num_uploads=1, **payload)
        del spec.models[:]
        events = await generate(spec)
        assert [event.WhichOneof("event") for event in events] == ["started", "done"]
        found = Image.open(io.BytesIO(store.objects[f"{spec.job_id}/image_0.png"]))
        assert (found.size, found.mode) == (size, mode)
        param = json.loads(store.objects[f"{spec.job_id}/{spec.job_id}_param.json"])
        assert param.keys() == {"parameters", "html_info", "info", "endpoint_name", "inference_id"}
        assert json.loads(found.text["esd"])["engine"] == json.loads(param["info"])["engine"]
        assert ("GrabCut" in param["html_info"]) == (task_type == "rembg")
        assert image not in json.dumps(param)


async def test_uploaded_upscalers_make_pictures_larger_in_extras_and_in_the_second_pass(
    generate: Any, store: ObjectStore, make_spec: Any, tmp_path: Path
) -> None:
    tiny_esrgan.write(tmp_path / "x.pth")
    content = (tmp_path / "x.pth").read_bytes()
    image = noise(48, 32)
    image.putalpha(Image.linear_gradient("L").resize(image.size))
    payload = {"image": encoded(image), "upscaler_1": "4x-tiny", "upscaler_2": "Lanczos", "upscaling_resize": 2}
    spec = make_spec("extra-single-image", num_uploads=1, **payload, extras_upscaler_2_visibility=0.5)
    del spec.models[:]
    second = make_spec(enable_hr=True, hr_scale=2, denoising_strength=0.5, hr_upscaler="4x-tiny")
    sha256s = [add_file(each, store, "ESRGAN", "4x-tiny.pth", content) for each in (spec, second)]
    events = await generate(spec)
    assert [event.WhichOneof("event") for event in events] == ["started", "progress", "done"]
    found = Image.open(io.BytesIO(store.objects[f"{spec.job_id}/image_0.png"]))
    assert (found.size, found.mode) == ((96, 64), "RGBA")
    param = json.loads(store.objects[f"{spec.job_id}/{spec.job_id}_param.json"])
    assert json.loads(param["info"])["hashes"] == {"upscaler:4x-tiny": sha256s[0]}
    assert (await generate(second))[-1].HasField("done")
    larger = Image.open(io.BytesIO(store.objects[f"{second.job_id}/image_0.png"]))
    assert larger.size == (128, 128)
    assert "Hires upscaler: 4x-tiny" in larger.text["parameters"]
    assert sha256s[1] in larger.text["parameters"]


async def test_an_uploaded_model_removes_the_background(generate: Any, store: ObjectStore, make_spec: Any) -> None:
    image = Image.new("RGB", (64, 48))
    image.paste((255, 255, 255), (16, 12, 48, 36))
    spec = make_spec("rembg", num_uploads=1, input_image=encoded(image), model="bright", return_mask=True)
    del spec.models[:]
    sha256 = add_file(spec, store, "rembg", "bright.onnx", tiny_onnx.brightness())
    assert (await generate(spec))[-1].HasField("done")
    found = Image.open(io.BytesIO(store.objects[f"{spec.job_id}/image_0.png"]))
    assert found.getpixel((32, 24)) == 255
    assert found.getpixel((2, 2)) == 0
    param = json.loads(store.objects[f"{spec.job_id}/{spec.job_id}_param.json"])
    assert param["html_info"] == "<p>The background was removed by bright.onnx.</p>"
    assert json.loads(param["info"])["hashes"] == {"rembg:bright": sha256}


async def test_an_img2img_job_keeps_what_is_not_masked(generate: Any, store: ObjectStore, make_spec: Any) -> None:
    image = noise()
    spec = make_spec(
        "img2img",
        init_images=[encoded(image)],
        mask=encoded(mask((0, 0, 32, 64))),
        mask_blur=0,
        steps=4,
        denoising_strength=0.5,
        inpaint_full_res=False,
    )
    events = await generate(spec)
    assert events[-2].progress == worker_pb2.JobProgress(step=3, num_steps=3)
    found = Image.open(io.BytesIO(store.objects[f"{spec.job_id}/image_0.png"]))
    assert np.array_equal(np.asarray(found)[:, 32:], np.asarray(image)[:, 32:])
    assert not np.array_equal(np.asarray(found)[:, :32], np.asarray(image)[:, :32])
    assert ", Denoising strength: 0.5, RNG: CPU, Masked content: fill, Mask blur: 0, " in found.text["parameters"]
    param = json.loads(store.objects[f"{spec.job_id}/{spec.job_id}_param.json"])
    assert param["parameters"]["init_images"] is None
    info = json.loads(param["info"])
    assert (info["denoising_strength"], info["is_using_inpainting_conditioning"]) == (0.5, False)


async def test_an_inpainting_job_says_how_it_was_made(
    generate: Any, store: ObjectStore, make_spec: Any, inpainting_checkpoint: Path
) -> None:
    spec = make_spec(
        "img2img",
        init_images=[encoded(noise())],
        mask=encoded(mask((0, 0, 32, 64))),
        inpainting_mask_invert=1,
        inpainting_fill=2,
        sampler_name="Euler a",
        override_settings={"eta_ancestral": 0.5, "initial_noise_multiplier": 0.9},
    )
    del spec.models[:]
    content = await asyncio.to_thread(inpainting_checkpoint.read_bytes)
    add_file(spec, store, "Stable-diffusion", "inpainting.safetensors", content)
    await generate(spec)
    text = Image.open(io.BytesIO(store.objects[f"{spec.job_id}/image_0.png"])).text["parameters"]
    assert (
        ", Denoising strength: 0.75, RNG: CPU, Eta: 0.5, Noise multiplier: 0.9, Mask mode: Inpaint not masked" in text
    )
    assert ", Masked content: latent noise, Mask blur: 4, Inpaint area: Only masked" in text
    info = json.loads(json.loads(store.objects[f"{spec.job_id}/{spec.job_id}_param.json"])["info"])
    assert info["is_using_inpainting_conditioning"] is True


async def test_a_damaged_or_missing_checkpoint_fails_by_name(generate: Any, store: ObjectStore, make_spec: Any) -> None:
    spec = make_spec()
    content = store.objects["tiny.safetensors"][:-100]
    spec.models[0].url = store.put("damaged", content)
    spec.models[0].size_bytes = len(content)
    spec.models[0].sha256, spec.models[0].cache_key = "", "damaged"
    assert "tiny.safetensors is damaged or truncated" in (await generate(spec))[-1].failed.reason
    del spec.models[:]
    assert (await generate(spec))[-1].failed.reason == "models names no checkpoint of type Stable-diffusion"


async def test_a_second_job_has_no_room_and_hanging_up_cancels_the_first(
    stub: Any, tokens: Tokens, worker: Worker, generate: Any, store: ObjectStore, make_spec: Any
) -> None:
    spec = make_spec(steps=150, n_iter=2)
    call = stub.Generate(worker_pb2.GenerateRequest(spec=spec), metadata=tokens.service("inference"))
    while not (await call.read()).event.HasField("progress"):
        pass
    assert worker.room == 0
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await generate(make_spec())
    assert caught.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
    call.cancel()
    await worker.stop()
    assert worker.room == 1
    assert f"{spec.job_id}/image_0.png" not in store.objects


async def test_only_services_may_call(stub: Any, tokens: Tokens, make_spec: Any) -> None:
    for metadata, code in (
        ((), grpc.StatusCode.UNAUTHENTICATED),
        (tokens.user(), grpc.StatusCode.PERMISSION_DENIED),
        (tokens.worker("endpoint"), grpc.StatusCode.UNAUTHENTICATED),
    ):
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stub.Generate(worker_pb2.GenerateRequest(spec=make_spec()), metadata=metadata).read()
        assert caught.value.code() == code
