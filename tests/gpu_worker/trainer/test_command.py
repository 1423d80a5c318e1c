"""`python -m gpu_worker train config.toml`, as a user calls it."""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import tomli_w
import torch

from gpu_worker.files.transfer import Transfer
from gpu_worker.job import JobError
from gpu_worker.models import weights
from gpu_worker.trainer import command, dataset, latents
from gpu_worker.trainer.loop import NO_MEMORY, STATE
from gpu_worker.trainer.session import TrainerSettings, _Session
from tests.gpu_worker.conftest import as_cached
from tests.gpu_worker.trainer.conftest import Trainings
from tests.gpu_worker.trainer.small import SMALL, Notes

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture
def config(trainings: Trainings) -> dict[str, object]:
    """The keys of a training that works."""
    return SMALL | {
        "pretrained_model_name_or_path": str(trainings.checkpoint),
        "train_data_dir": str(trainings.pictures),
        "output_dir": str(trainings.folder / "out"),
        "sample_every_n_epochs": 1,
    }


def write(folder: Path, config: dict[str, object]) -> Path:
    path = folder / "config.toml"
    path.write_text(tomli_w.dumps({"training": config}))
    return path


def refusal(path: Path, capsys: pytest.CaptureFixture[str]) -> str:
    """What the command says where it must not train."""
    assert command.main([str(path)]) == command.EXIT_FAILED
    return next(line for line in capsys.readouterr().err.splitlines() if line.startswith("error: "))


@pytest.mark.slow
def test_a_training_by_hand_needs_no_service_and_shows_how_far_it_is(
    config: dict[str, object], trainings: Trainings
) -> None:
    (trainings.folder / "prompts.txt").write_text("# a comment\na zog --s 2\n")
    keys = config | {"sample_prompts": str(trainings.folder / "prompts.txt"), "xformers": True, "mystery": 1}
    done = subprocess.run(
        [sys.executable, "-W", "error::UserWarning", "-m", "gpu_worker", "train", write(trainings.folder, keys)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "200"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "note: xformers: attention is computed by torch" in done.stderr
    assert "warning: the key mystery is not known here and does nothing" in done.stderr
    assert "4 pictures, 1 epochs, 4 steps" in done.stderr
    assert "training" in done.stderr
    assert "4/4" in done.stderr
    assert "Traceback" not in done.stderr
    assert (trainings.folder / "out" / "last.safetensors").is_file()
    assert len(list((trainings.folder / "out" / "sample").glob("last_e000001_00_*_1.png"))) == 1


def interrupted(arguments: list[str], line: str) -> tuple[int, list[str]]:
    """The exit code and the lines of the command, which gets Ctrl-C's signal once it has said the line."""
    command_line = [sys.executable, "-m", "gpu_worker", "train", *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command_line, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True) as running:
        assert running.stderr is not None
        lines = []
        for said in running.stderr:
            lines.append(said.strip())
            if said.startswith(line):
                running.send_signal(signal.SIGINT)
                line = "nothing more"
    return running.returncode, lines


@pytest.mark.slow
def test_ctrl_c_ends_a_training_in_order_and_resume_goes_on_from_there(
    config: dict[str, object], trainings: Trainings
) -> None:
    path = write(trainings.folder, config | {"max_train_epochs": 10_000, "sample_every_n_epochs": 0,
                                             "save_every_n_epochs": 1, "save_last_n_epochs": 2})  # fmt: skip
    code, lines = interrupted([str(path)], f"saved {trainings.folder}/out/last-000002")
    assert (code, lines[-2]) == (command.EXIT_STOPPED, "stopped; what was saved stays")
    assert (trainings.folder / "out" / STATE).is_file()
    code, lines = interrupted([str(path), "--resume"], "going on after epoch ")
    assert (code, lines[-2]) == (command.EXIT_STOPPED, "stopped; what was saved stays")
    assert [line for line in lines if re.fullmatch(r"going on after epoch \d+ of 10000, step \d+", line)]


def test_what_is_wrong_is_one_sentence(
    config: dict[str, object], trainings: Trainings, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = trainings.folder
    (folder / "empty").mkdir()
    (folder / "broken.safetensors").write_bytes(b"nonsense")
    (folder / "latin.txt").write_bytes("café".encode("latin-1"))
    (folder / "prompts.toml").write_text('[[prompt.subset]]\nprompt = "a zog"\n')
    wrong: list[tuple[dict[str, object], str]] = [
        ({"network_dim": 0}, "error: network_dim 0 is out of range"),
        (
            {"train_data_dir": str(folder / "empty"), "pretrained_model_name_or_path": "/no"},
            "error: the dataset has no",
        ),
        ({"pretrained_model_name_or_path": "/no"}, "error: pretrained_model_name_or_path '/no' is no file"),
        ({"vae": "/no"}, "error: vae '/no' is no file"),
        ({"pretrained_model_name_or_path": str(folder / "broken.safetensors")}, "error: broken.safetensors is damaged"),
        ({"output_dir": str(folder / "broken.safetensors")}, f"error: {folder / 'broken.safetensors'}: File exists"),
        ({"sample_prompts": "nowhere.txt"}, 'error: sample_prompts "nowhere.txt" is no prompt'),
        ({"sample_prompts": str(folder / "prompts.toml")}, "error: sample_prompts "),
        ({"sample_prompts": str(folder / "latin.txt")}, f"error: {folder / 'latin.txt'} is not UTF-8: "),
    ]
    for keys, sentence in wrong:
        assert refusal(write(folder, config | keys), capsys).startswith(sentence)
    assert refusal(folder / "none.toml", capsys) == f"error: {folder / 'none.toml'}: No such file or directory"
    (folder / "bad.toml").write_text("seed = nonsense")
    assert refusal(folder / "bad.toml", capsys).startswith("error: the configuration is not valid TOML")


def test_files_may_have_windows_mark_of_utf_8_and_a_prompt_may_be_longer_than_a_files_name(
    config: dict[str, object], trainings: Trainings
) -> None:
    prompts = trainings.folder / "prompts.txt"
    prompts.write_text("a zog, café\n", encoding="utf-8-sig")
    path = write(trainings.folder, config | {"sample_prompts": str(prompts)})
    path.write_text(path.read_text(), encoding="utf-8-sig")
    assert command._read(path).sample_prompts == ["a zog, café"]
    long = "a zog on a hill, " * 20
    assert command._read(write(trainings.folder, config | {"sample_prompts": long})).sample_prompts == [long.strip()]


@pytest.mark.parametrize("place", ["the models", "a picture's latents"])
def test_a_gpu_that_is_too_small_is_one_sentence_wherever_it_shows(
    config: dict[str, object],
    trainings: Trainings,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    place: str,
) -> None:
    def too_much(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    part, name = (weights.Models, "stay") if place == "the models" else (latents, "distribution")
    monkeypatch.setattr(part, name, too_much)
    assert refusal(write(trainings.folder, config), capsys) == f"error: {NO_MEMORY}"
    own = _Session(TrainerSettings.model_construct(), "cpu", trainings.folder, Transfer())
    training, base = trainings.config(), as_cached(trainings.checkpoint)
    with pytest.raises(JobError, match="the GPU has not enough memory for this training"):
        own._loop(training, base, dataset.read(training, lambda _: None), Notes(), "sd_1_5", None)


def test_there_must_be_something_to_go_on_from(
    config: dict[str, object], trainings: Trainings, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command.main([str(write(trainings.folder, config)), "--resume"]) == command.EXIT_FAILED
    assert f"{STATE} is not there" in capsys.readouterr().err


def test_help_and_mistakes_are_told_before_torch_is_read(config: dict[str, object], trainings: Trainings) -> None:
    program = """
import sys
from gpu_worker.__main__ import main
try:
    main()
finally:
    assert "torch" not in sys.modules
"""
    nowhere = {"pretrained_model_name_or_path": "/nowhere"}
    wrong = write(trainings.folder, config | nowhere)
    for argument, code, said in (("--help", 0, "a TOML file with kohya's keys"), (wrong, 1, "'/nowhere' is no file")):
        done = subprocess.run(
            [sys.executable, "-c", program, "train", argument], cwd=ROOT, capture_output=True, text=True, check=False
        )
        assert (done.returncode, said in done.stdout + done.stderr) == (code, True), done.stderr
