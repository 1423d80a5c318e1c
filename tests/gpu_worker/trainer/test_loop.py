"""Whole trainings of the tiny checkpoint: repeatable, resumable, stoppable, and what they leave behind."""

import hashlib
import json
import math
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from gpu_worker.engine.denoise import predict
from gpu_worker.job import JobError
from gpu_worker.models import tiny, weights
from gpu_worker.trainer import dataset, previews
from gpu_worker.trainer.dataset import Picture
from gpu_worker.trainer.listening import Stopped
from gpu_worker.trainer.loop import STATE, Loop, _sizes
from gpu_worker.trainer.steps import Batch, Outcome
from tests.gpu_worker import tiny_sdxl
from tests.gpu_worker.conftest import as_cached
from tests.gpu_worker.trainer.conftest import Trainings, draw
from tests.gpu_worker.trainer.curves import curves
from tests.gpu_worker.trainer.small import Notes

# Everything that is left to chance, at once.
CHANCES: dict[str, Any] = {
    "train_batch_size": 2, "shuffle_caption": True, "keep_tokens": 1, "flip_aug": True, "caption_dropout_rate": 0.2,
    "network_dropout": 0.1, "noise_offset": 0.05, "max_train_epochs": 3, "lr_scheduler": "cosine",
    "caption_tag_dropout_rate": 0.2, "multires_noise_iterations": 3,
}  # fmt: skip


class Killed(Exception):
    """The process went away."""


def assert_same(one: Path, other: Path) -> None:
    first, second = load_file(one), load_file(other)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_training_leaves_kohyas_files_previews_and_curves(trainings: Trainings, tmp_path: Path) -> None:
    notes = trainings.run(
        output_name="zog",
        max_train_epochs=2,
        save_every_n_epochs=1,
        save_precision="fp16",
        logging_dir=str(tmp_path / "logs"),
        log_prefix="zog-",
        sample_every_n_epochs=1,
        sample_prompts="a zog --n green --w 64 --h 64 --d 7 --l 3 --s 2",
        sample_sampler="k_euler_a",
    )
    out = tmp_path / "out"
    assert notes.files == ["zog-000001.safetensors", "zog.safetensors"]
    assert sorted(path.name for path in out.iterdir()) == ["sample", "zog-000001.safetensors", "zog.safetensors"]
    assert {tensor.dtype for tensor in load_file(out / "zog.safetensors").values()} == {torch.float16}
    assert [path.name[:15] + path.name[-6:] for path in notes.drawings] == [
        "zog_e000001_00__7.png",
        "zog_e000002_00__7.png",
    ]
    with Image.open(notes.drawings[0]) as image:
        assert image.size == (64, 64)
        assert image.info["parameters"].startswith(
            "a zog\nNegative prompt: green\nSteps: 2, Sampler: Euler a, CFG scale: 3"
        )
    found = curves(tmp_path / "logs")
    assert [path.name[:4] for path in (tmp_path / "logs").iterdir()] == ["zog-"]
    assert list(found["loss/current"].values()) == pytest.approx(notes.losses)
    assert found["lr/unet"][8] == pytest.approx(1e-3)
    assert found.keys() == {"loss/current", "loss/average", "lr/unet", "lr/textencoder"}
    [plan] = notes.plans
    assert (plan.num_pictures, plan.num_epochs, plan.num_steps, plan.first_step) == (4, 2, 8, 0)
    assert [(step.step, step.epoch) for step in notes.steps] == [(n, 1 + (n > 4)) for n in range(1, 9)]
    assert all(step.seconds_left > 0 for step in notes.steps[:-1])
    assert notes.steps[-1].seconds_left == 0


@pytest.mark.slow
def test_the_metadata_is_kohyas(trainings: Trainings, tmp_path: Path) -> None:
    trainings.run(
        output_name="zog",
        network_args=["conv_dim=2"],
        optimizer_args=["weight_decay=0.1", "eps=1e-7"],
        training_comment="a comment",
        metadata_author="somebody",
        metadata_title="A Zog",
        learning_rate=1e-4,
        min_snr_gamma=5,
    )
    with safe_open(tmp_path / "out" / "zog.safetensors", framework="pt") as file:
        metadata = file.metadata()
    expected = {
        "ss_output_name": "zog", "ss_num_train_images": "4", "ss_num_reg_images": "0", "ss_num_epochs": "1",
        "ss_epoch": "1", "ss_steps": "4", "ss_max_train_steps": "4", "ss_num_batches_per_epoch": "4",
        "ss_network_module": "networks.lora", "ss_network_dim": "4", "ss_network_alpha": "2.0",
        "ss_network_args": '{"conv_dim": "2"}', "ss_unet_lr": "0.001", "ss_text_encoder_lr": "0.001",
        "ss_optimizer": "AdamW(weight_decay=0.1,eps=1e-7)", "ss_lr_scheduler": "constant",
        "ss_learning_rate": "0.0001", "ss_base_model_version": "sd_v1", "ss_clip_skip": "1",
        "ss_min_snr_gamma": "5.0", "ss_resolution": "(64, 64)", "ss_seed": "5", "ss_training_comment": "a comment",
        "ss_sd_model_name": trainings.checkpoint.name, "ss_network_dropout": "None",
        "modelspec.architecture": "stable-diffusion-v1/lora", "modelspec.implementation": "diffusers",
        "modelspec.title": "A Zog", "modelspec.author": "somebody", "modelspec.prediction_type": "epsilon",
    }  # fmt: skip
    assert {name: metadata[name] for name in expected} == expected
    assert json.loads(metadata["ss_dataset_dirs"]) == {"1_zog": {"n_repeats": 1, "img_count": 4}}
    assert json.loads(metadata["ss_tag_frequency"])["1_zog"]["green"] == 4
    assert json.loads(metadata["ss_bucket_info"])["buckets"] == {"0": {"resolution": [64, 64], "count": 4}}
    assert "modelspec.license" not in metadata
    with (tmp_path / "out" / "zog.safetensors").open("rb") as content:
        content.seek(8 + int.from_bytes(content.read(8), "little"))
        assert metadata["sshs_model_hash"] == hashlib.file_digest(content, "sha256").hexdigest(), "of the tensors alone"
    assert len(metadata["sshs_legacy_hash"]) == 8
    assert len(metadata["ss_new_sd_model_hash"]) == 64


@pytest.mark.slow
def test_the_metadata_counts_batches_where_a_step_has_several(trainings: Trainings, tmp_path: Path) -> None:
    trainings.run(gradient_accumulation_steps=3)
    with safe_open(tmp_path / "out" / "last.safetensors", framework="pt") as file:
        metadata = file.metadata()
    assert (metadata["ss_num_batches_per_epoch"], metadata["ss_max_train_steps"]) == ("4", "2")


@pytest.mark.slow
def test_v_parameterization_is_all_that_a_checkpoint_of_velocities_says_itself(
    trainings: Trainings, tmp_path: Path
) -> None:
    keys = {"max_train_epochs": None, "max_train_steps": 1, "sample_every_n_epochs": 1, "sample_prompts": "a zog --s 2"}
    noise = trainings.run(out="noise", **keys)
    by_key = trainings.run(out="key", v_parameterization=True, **keys)
    says = tiny.config()
    says["scheduler"]["prediction_type"] = "v_prediction"
    velocities = tmp_path / trainings.checkpoint.name
    save_file(load_file(trainings.checkpoint), velocities, metadata={"esd_config": json.dumps(says)})
    trainings.checkpoint = velocities
    by_file = trainings.run(out="file", **keys)
    assert noise.losses != by_key.losses == by_file.losses
    pictures = [drawn.drawings[0].read_bytes() for drawn in (noise, by_key, by_file)]
    assert pictures[0] != pictures[1] == pictures[2]
    for folder, kind in (("noise", "epsilon"), ("key", "v"), ("file", "v")):
        with safe_open(tmp_path / folder / "last.safetensors", framework="pt") as file:
            assert file.metadata()["modelspec.prediction_type"] == kind


@pytest.mark.slow
@pytest.mark.parametrize(
    "optimizer",
    [
        {},
        {"optimizer_type": "Adafactor", "optimizer_args": ["relative_step=False"]},
        {"optimizer_type": "Lion"},
        {"optimizer_type": "Prodigy", "unet_lr": 1, "text_encoder_lr": 1},
    ],
)
def test_a_seed_makes_a_training_repeatable_and_going_on_equals_never_having_stopped(
    trainings: Trainings, tmp_path: Path, optimizer: dict[str, Any]
) -> None:
    keys = CHANCES | optimizer
    whole = trainings.run(out="whole", **keys)

    def kill(path: Path, epoch: int) -> None:
        if epoch == 2:
            raise Killed

    before = Notes(on_kept=kill)
    with pytest.raises(Killed):
        trainings.run(before, out="halves", **keys)
    after = trainings.run(out="halves", resumed=tmp_path / "halves" / STATE, **keys)
    assert before.losses + after.losses == whole.losses
    assert after.plans[0].first_step == len(before.losses)
    assert_same(tmp_path / "whole" / "last.safetensors", tmp_path / "halves" / "last.safetensors")
    assert not (tmp_path / "halves" / STATE).exists()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["SDXL", "LoKr"])
def test_a_seed_makes_trainings_of_every_kind_repeatable(trainings: Trainings, tmp_path: Path, kind: str) -> None:
    keys = CHANCES | {"max_train_epochs": 1}
    if kind == "SDXL":
        trainings.checkpoint = tiny_sdxl.make(tmp_path / "tiny-xl.safetensors").path
    else:
        lokr = ["algo=lokr", "factor=4", "rank_dropout=0.1", "module_dropout=0.1"]
        keys |= {"network_module": "lycoris.kohya", "network_args": lokr, "network_dropout": 0}
    assert trainings.run(out="once", **keys).losses == trainings.run(out="again", **keys).losses
    once, again = tmp_path / "once" / "last.safetensors", tmp_path / "again" / "last.safetensors"
    assert_same(once, again)
    with safe_open(once, framework="pt") as file:
        assert file.metadata()["modelspec.architecture"].endswith("/lora"), "as kohya has it for LyCORIS too"
    trainings.run(out="otherwise", **(keys | {"seed": 6}))
    with pytest.raises(AssertionError):
        assert_same(once, tmp_path / "otherwise" / "last.safetensors")


@pytest.mark.slow
def test_a_state_of_another_configuration_or_a_damaged_one_is_refused(trainings: Trainings, tmp_path: Path) -> None:
    with pytest.raises(Stopped):
        trainings.run(Notes(stop_after=5), max_train_epochs=3)
    state = tmp_path / "out" / STATE
    with pytest.raises(JobError, match="belongs to a training with another configuration"):
        trainings.run(resumed=state, max_train_epochs=3, network_alpha=1)
    state.write_bytes(state.read_bytes()[:-100])
    with pytest.raises(JobError, match="is damaged"):
        trainings.run(resumed=state, max_train_epochs=3)


def test_a_stop_ends_within_one_step_and_keeps_what_was_saved(trainings: Trainings, tmp_path: Path) -> None:
    notes = Notes(stop_after=6)
    with pytest.raises(Stopped):
        trainings.run(notes, max_train_epochs=5, save_every_n_epochs=1)
    assert len(notes.steps) == 6
    assert sorted(path.name for path in (tmp_path / "out").glob("*.safetensors")) == ["last-000001.safetensors"]


def test_a_stop_before_the_first_step_leaves_nothing(trainings: Trainings, tmp_path: Path) -> None:
    notes = Notes(stop_after=0)
    with pytest.raises(Stopped):
        trainings.run(notes)
    assert not notes.plans, "it ended while pictures were encoded"
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.slow
def test_only_the_last_files_are_kept_where_that_is_asked_for(trainings: Trainings, tmp_path: Path) -> None:
    notes = trainings.run(max_train_epochs=5, save_every_n_epochs=1, save_last_n_epochs=2, max_train_steps=1)
    assert notes.gone == ["last-000001.safetensors", "last-000002.safetensors"]
    left = ["last-000003.safetensors", "last-000004.safetensors", "last.safetensors"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == left


@pytest.mark.slow
def test_files_of_an_earlier_process_are_not_wanted_any_more_either(trainings: Trainings, tmp_path: Path) -> None:
    keys = {"max_train_epochs": 4, "save_every_n_epochs": 1, "save_last_n_epochs": 1}
    with pytest.raises(Stopped):
        trainings.run(Notes(stop_after=9), **keys)
    notes = trainings.run(out="elsewhere", resumed=tmp_path / "out" / STATE, **keys)
    assert notes.gone == ["last-000002.safetensors"]


@pytest.mark.slow
def test_files_may_come_every_so_many_steps_of_which_old_ones_go(trainings: Trainings, tmp_path: Path) -> None:
    notes = trainings.run(max_train_epochs=2, save_every_n_epochs=1, save_every_n_steps=2, save_last_n_steps=3)
    steps = [f"last-step0000000{step}.safetensors" for step in (2, 4, 6, 8)]
    assert notes.files == [*steps[:2], "last-000001.safetensors", *steps[2:], "last.safetensors"]
    assert notes.gone == steps[:2]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "last-000001.safetensors", *steps[2:], "last.safetensors"
    ]  # fmt: skip
    assert_same(tmp_path / "out" / steps[3], tmp_path / "out" / "last.safetensors")
    with safe_open(tmp_path / "out" / steps[2], framework="pt") as file:
        assert (file.metadata()["ss_steps"], file.metadata()["ss_epoch"]) == ("6", "2")


@pytest.mark.slow
def test_steps_may_be_asked_for_instead_of_epochs(trainings: Trainings) -> None:
    notes = trainings.run(max_train_epochs=None, max_train_steps=18, save_n_epoch_ratio=2)
    assert (notes.plans[0].num_epochs, notes.plans[0].num_steps, len(notes.steps)) == (5, 18, 18)
    assert notes.files == ["last-000002.safetensors", "last-000004.safetensors", "last.safetensors"]


@pytest.mark.slow
def test_what_this_device_does_not_have_is_told(trainings: Trainings, tmp_path: Path) -> None:
    notes = Notes()
    trainings.loop(notes, mixed_precision="fp16", clip_skip=2)
    assert notes.lines == ["mixed_precision: it is CUDA's; here everything is computed in fp32, not in fp16"]
    trainings.checkpoint = tiny_sdxl.make(tmp_path / "tiny-xl.safetensors").path
    trainings.loop(notes, clip_skip=2)
    assert notes.lines[1].startswith("clip_skip: of SDXL's text encoders the last layer but one is read")


@pytest.mark.parametrize("tells_late", [False, True], ids=["told at once", "told a step later, as on CUDA"])
def test_a_loss_that_is_no_number_ends_the_training(trainings: Trainings, tells_late: bool) -> None:
    notes = Notes()
    loop = trainings.loop(notes)
    loop._is_cuda = tells_late
    loop._models.unet.conv_out.bias.fill_(torch.nan)
    with pytest.raises(JobError, match="the loss is not a number any more, at step 1"):
        loop.run()
    assert notes.files == []


def test_weights_that_are_no_numbers_are_neither_saved_nor_kept(trainings: Trainings, tmp_path: Path) -> None:
    loop = trainings.loop(Notes(), max_train_epochs=2, save_every_n_epochs=1)
    step, numbers = loop._steps.step, iter(range(1, 9))

    def step_and_break(*given: Any) -> Outcome:
        outcome = step(*given)
        if next(numbers) == 4:  # the epoch's last: no loss tells of it
            loop._network.unet[-1].detach()[0] = torch.inf
        return outcome

    loop._steps.step = step_and_break  # type: ignore[method-assign]
    with pytest.raises(JobError, match="a weight of the network is not a number any more, at step 4"):
        loop.run()
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.slow
def test_a_step_that_the_loss_scaler_skips_is_not_told_and_leaves_the_weights(trainings: Trainings) -> None:
    notes = Notes()
    loop = trainings.loop(notes)
    loop._steps._scaler = torch.amp.GradScaler("cpu")  # as in fp16
    loss, lost = loop._steps.loss, iter([False, True, False, False])
    loop._steps.loss = lambda *given: loss(*given) * (torch.nan if next(lost) else 1)  # type: ignore[method-assign]
    loop.run()
    assert [progress.step for progress in notes.steps] == [1, 3, 4]
    assert all(math.isfinite(progress.average_loss) for progress in notes.steps)
    assert notes.files == ["last.safetensors"]


@pytest.mark.slow
def test_a_training_whose_steps_are_all_skipped_ends(trainings: Trainings) -> None:
    loop = trainings.loop(Notes(), max_train_epochs=6)
    loop._steps._scaler = torch.amp.GradScaler("cpu")
    step = loop._steps.step

    def skipped(*given: Any) -> Outcome:
        return Outcome(torch.tensor(step(*given).loss), torch.tensor(True))

    loop._steps.step = skipped  # type: ignore[method-assign]
    with pytest.raises(JobError, match="the gradient of the loss is not a number any more, at step 20"):
        loop.run()


@pytest.mark.slow
def test_a_preview_that_cannot_be_drawn_is_told_and_the_training_goes_on(trainings: Trainings) -> None:
    long = "a, " * 3000
    notes = trainings.run(sample_every_n_epochs=1, sample_prompts=[f"{long} --s 1"])
    assert any("no preview of " in line and "chunks" in line for line in notes.lines)
    assert notes.files == ["last.safetensors"]


@pytest.mark.slow
def test_previews_are_drawn_without_dropout(trainings: Trainings) -> None:
    notes = Notes()
    loop = trainings.loop(notes, network_dropout=0.5, sample_every_n_epochs=1, sample_prompts="a zog --s 2")
    loop.run()
    for epoch in (2, 3):
        loop._previews.draw(epoch, is_saved=True, is_last=False)
    assert len({path.read_bytes() for path in notes.drawings}) == 1
    assert loop._models.unet.training


@pytest.mark.slow
def test_a_stop_ends_a_preview_within_one_step_of_it(trainings: Trainings, monkeypatch: pytest.MonkeyPatch) -> None:
    notes, done = Notes(), []

    def predict_and_stop(*given: Any) -> Any:
        done.append(given)
        notes.stop_after = 0 if len(done) == 2 else None
        return predict(*given)

    monkeypatch.setattr(previews, "predict", predict_and_stop)
    with pytest.raises(Stopped):
        trainings.run(notes, max_train_epochs=2, sample_every_n_epochs=1, sample_prompts="a zog --s 9")
    assert (len(done), notes.drawings, len(notes.steps)) == (2, [], 4)


def test_a_preview_takes_kohyas_options_as_kohya_reads_them(trainings: Trainings) -> None:
    line = 'a cat --n don\'t, "bad" hands --W 72  --h  64 --d 3 --ss k_euler_a --s 2 --l 3.5'
    [asked] = trainings.loop(Notes(), sample_every_n_epochs=1, sample_prompts=[line])._previews._requests
    assert (asked.prompt, asked.negative_prompt) == ("a cat", 'don\'t, "bad" hands')
    assert (asked.width, asked.height, asked.seed) == (72, 64, 3)
    assert (asked.sampler_name, asked.steps, asked.cfg_scale) == ("Euler a", 2, 3.5)


@pytest.mark.parametrize("prompt", ["a cat --z 1", "a cat --w 13"])
def test_an_impossible_preview_is_refused_before_the_first_step(trainings: Trainings, prompt: str) -> None:
    with pytest.raises(JobError, match=r'sample_prompts "a cat --[zw] 1'):
        trainings.loop(Notes(), sample_every_n_epochs=1, sample_prompts=[prompt])


@pytest.mark.slow
def test_a_caption_becomes_a_preview_or_none_but_never_ends_a_training(trainings: Trainings, tmp_path: Path) -> None:
    trainings.pictures = tmp_path / "own"
    draw(trainings.pictures / "1_zog" / "a.png")
    caption, notes = trainings.pictures / "1_zog" / "a.txt", Notes()
    caption.write_text("a cat --x marks the (spot)")
    [request] = trainings.loop(notes, sample_every_n_epochs=1)._previews._requests
    assert request.prompt == r"a cat --x marks the \(spot\)"
    caption.write_text("a cat <lora:zog:much>")
    assert trainings.loop(notes, sample_every_n_epochs=1)._previews._requests == []
    assert notes.lines[0].startswith("no preview of 'a cat <lora:zog:much>': ")


@pytest.mark.slow
def test_a_regularisation_picture_counts_by_the_prior_loss_weight(trainings: Trainings, tmp_path: Path) -> None:
    draw(tmp_path / "others" / "1_thing" / "a.png")
    losses = []
    for weight in (1.0, 0.5):
        loop = trainings.loop(Notes(), reg_data_dir=str(tmp_path / "others"), prior_loss_weight=weight)
        loop._encode()
        own, other = loop._dataset.pictures[0], loop._dataset.pictures[-1]

        def batch(*pictures: Picture, loop: Loop = loop) -> Batch:
            return loop._batch(pictures, 1, random.Random(0), torch.Generator())

        counts = batch(own, other).weights
        assert counts is not None
        assert (counts.tolist(), batch(own).weights) == ([1, weight], None)
        losses.append(float(loop._steps.loss(batch(other), torch.Generator().manual_seed(0)).detach()))
    assert losses[1] == pytest.approx(0.5 * losses[0])


@pytest.mark.slow
def test_sdxl_is_trained_in_buckets_beside_regularisation_pictures(trainings: Trainings, tmp_path: Path) -> None:
    trainings.checkpoint = tmp_path / "tiny-xl.safetensors"
    tiny_sdxl.make(trainings.checkpoint)
    trainings.pictures = tmp_path / "own"
    draw(trainings.pictures / "2_zog" / "wide.png", (128, 64))
    draw(trainings.pictures / "1_zog" / "square.png", (64, 64))
    draw(tmp_path / "others" / "1_thing" / "a.png")
    notes = trainings.run(
        reg_data_dir=str(tmp_path / "others"),
        prior_loss_weight=0.5,
        enable_bucket=True,
        min_bucket_reso=32,
        bucket_reso_steps=32,
        train_batch_size=2,
        flip_aug=True,
        cache_latents=False,
    )
    assert len(notes.steps) == 3  # the wide one twice; the square one, and three others beside
    with safe_open(tmp_path / "out" / "last.safetensors", framework="pt") as file:
        metadata, names = file.metadata(), set(file.keys())
    assert metadata["ss_base_model_version"] == "sdxl_base_v1-0"
    assert metadata["ss_num_reg_images"] == "1"
    assert metadata["modelspec.architecture"] == "stable-diffusion-xl-v1-base/lora"
    assert "lora_te2_text_model_encoder_layers_0_mlp_fc1.alpha" in names
    assert "lora_unet_middle_block_1_proj_in.lora_down.weight" in names


@pytest.mark.slow
def test_a_checkpoint_of_another_use_is_no_base_model(trainings: Trainings, tmp_path: Path) -> None:
    trainings.checkpoint = tiny_sdxl.make(tmp_path / "refiner.safetensors", is_refiner=True).path
    with pytest.raises(JobError, match=r"refiner\.safetensors is an SDXL refiner, which cannot be trained on"):
        trainings.loop(Notes())


@pytest.mark.slow
def test_sizes_are_not_rounded_where_the_models_are_bf16(trainings: Trainings, tmp_path: Path) -> None:
    tiny_sdxl.make(tmp_path / "tiny-xl.safetensors")
    trainings.pictures = tmp_path / "own"
    draw(trainings.pictures / "1_zog" / "a.png", (1001, 777))
    config, base = trainings.config(), as_cached(tmp_path / "tiny-xl.safetensors")
    models = weights.load(base, None, "cpu", torch.bfloat16)
    found = dataset.read(config, lambda _: None)
    loop = Loop(config, models, base, found, tmp_path / "out", Notes())
    loop._encode()
    batch = loop._batch(found.pictures, 1, random.Random(0), torch.Generator())
    assert batch.sizes is not None
    assert batch.sizes.tolist() == [[777, 1001, 0, 9, 64, 64]]


def test_sdxl_is_told_sizes_and_crops_of_what_it_sees() -> None:
    picture = Picture(Path("a.png"), "", (1000, 500), (768, 384), (640, 384), 1, is_regularisation=False)
    assert _sizes(picture, flip=False) == [500, 1000, 0, 64, 384, 640]
    uneven = Picture(Path("a.png"), "", (1001, 500), (769, 384), (640, 384), 1, is_regularisation=False)
    left = _sizes(uneven, flip=False)[3]
    assert left + 640 + _sizes(uneven, flip=True)[3] == uneven.scaled[0]
