"""A training's keys: kohya's defaults and spellings, what is mapped, refused and unknown."""

import ast
import contextlib
import math
from datetime import date
from pathlib import Path
from typing import Any

import pytest

from services.common.errors import InvalidArgument
from services.common.payloads import network_args, training
from services.common.payloads.training import Training, check_training, parse_toml
from tests.processes import ROOT

# Contract 12.2, the template of both models.
TEMPLATE = """
[training]
v2=false
v_parameterization=false
train_data_dir="./train/input"
reg_data_dir=""
prior_loss_weight=1
cache_latents=true
shuffle_caption=true
enable_bucket=true
network_dim=32
network_alpha=16
network_train_unet_only=false
network_train_text_encoder_only=false
network_module="networks.lora"
network_args=[]
unet_lr=1e-4
text_encoder_lr=1e-5
optimizer_type="AdamW8bit"
lr_scheduler="cosine_with_restarts"
lr_warmup_steps=0
lr_restart_cycles=1
resolution="512,512"
train_batch_size=1
max_train_epochs=10
noise_offset=0.0
keep_tokens=0
xformers=true
lowram=false
clip_skip=2
mixed_precision="fp16"
save_precision="fp16"
output_name="output_name"
save_every_n_epochs=1
save_n_epoch_ratio=0
save_last_n_epochs=499
save_state=false
save_model_as="safetensors"
output_dir="output"
logging_dir="./logs"
log_prefix="output_name"
min_bucket_reso=256
max_bucket_reso=1024
caption_extension=".txt"
max_token_length=225
seed=1337
no_half_vae=true
pretrained_model_name_or_path="./sd-models/v1-5-pruned-emaonly.safetensors"
"""


LYCORIS = {"network_module": "lycoris.kohya"}
GUI = sorted((Path(__file__).parent / "kohya").glob("*.toml"))


def reason(**fields: Any) -> str:
    with pytest.raises(InvalidArgument) as caught:
        check_training(fields)
    return str(caught.value)


def test_every_key_of_the_template_is_known_and_xformers_is_mapped_with_a_note() -> None:
    config = check_training(parse_toml(TEMPLATE))
    assert config.unknown == []
    assert [note.split(":")[0] for note in config.notes] == ["xformers"]
    assert (config.network_dim, config.network_alpha, config.max_token_length) == (32, 16.0, 225)
    assert config.lr_scheduler_num_cycles == 1
    assert config.resolution == (512, 512)


def test_a_learning_rate_beside_those_of_the_template_is_noted() -> None:
    notes = check_training(parse_toml(TEMPLATE) | {"learning_rate": 1e-3}).notes
    assert "learning_rate: it does nothing beside unet_lr 0.0001 and text_encoder_lr 1e-05; set those" in notes
    assert check_training({"learning_rate": 1e-3, "unet_lr": 1e-4}).notes == []


def test_what_has_no_effect_is_noted_or_refused_where_it_is_on() -> None:
    names = parse_toml(TEMPLATE).keys() - Training.model_fields.keys() - {"lr_restart_cycles"}
    assert names
    for name in names:
        try:
            said = check_training({name: True}).notes
        except InvalidArgument as refusal:
            said = [str(refusal)]
        assert [sentence.split(":")[0].removesuffix(" true") for sentence in said] == [name]


def test_every_key_that_is_known_is_read_where_a_training_runs() -> None:
    read = {name for source in (ROOT / "gpu_worker" / "trainer").glob("*.py") if source.name != "saving.py"
            for name in _read_of(source, {"config", "_config"})}  # fmt: skip
    derived = {  # properties of the configuration, with the keys that each reads
        definition.name: _attributes(definition, {"self"})
        for definition in ast.walk(ast.parse(Path(training.__file__).read_text()))
        if isinstance(definition, ast.FunctionDef) and "property" in map(ast.unparse, definition.decorator_list)
    }
    read |= {key for name, keys in derived.items() if name in read for key in keys}
    of_the_file_alone = {"save_precision", "training_comment"}
    of_the_file_alone |= {f"metadata_{name}" for name in ("author", "description", "license", "tags", "title")}
    assert of_the_file_alone <= _read_of(ROOT / "gpu_worker" / "trainer" / "saving.py", {"config"})
    only_one_is_possible = {"save_model_as", "loss_type"}
    assert Training.model_fields.keys() - read == of_the_file_alone | only_one_is_possible


def _read_of(source: Path, owners: set[str]) -> set[str]:
    return _attributes(ast.parse(source.read_text()), owners)


def _attributes(tree: ast.AST, owners: set[str]) -> set[str]:
    """What is read of whatever has one of these names, `config.seed` as well as `self._config.seed`."""
    nodes = [node for node in ast.walk(tree) if isinstance(node, ast.Attribute)]
    return {node.attr for node in nodes if ast.unparse(node.value).rpartition(".")[2] in owners}


@pytest.mark.parametrize("path", GUI, ids=lambda path: path.stem)
def test_what_kohyas_gui_writes_is_taken_as_it_is(path: Path) -> None:
    config = check_training(parse_toml(path.read_text()))
    assert config.unknown == []
    assert config.text_rate == config.unet_rate > 0
    assert config.algorithm == ("locon" if "locon" in path.stem else "lora")


def test_the_largest_side_of_a_bucket_is_widened_to_whole_steps_before_it_is_held_against_the_resolution() -> None:
    assert check_training({"enable_bucket": True, "resolution": 1024, "max_bucket_reso": 1000}).resolution[0] == 1024


def test_what_is_off_may_be_text() -> None:
    off = {"v2": "false", "random_crop": "False", "multires_noise_iterations": "0", "face_crop_aug_range": "None"}
    config = check_training(off | {"xformers": "false", "network_dropout": "0.0", "max_data_loader_n_workers": "0"})
    assert config.notes == []


def test_a_warmup_that_the_schedule_does_not_have_is_noted() -> None:
    said = ["lr_warmup_steps: lr_scheduler constant has no warmup; constant_with_warmup has"]
    assert check_training({"lr_warmup_steps": 100}).notes == said
    assert check_training({"lr_scheduler": "cosine", "lr_warmup_steps": 100}).notes == []
    assert check_training({"lr_scheduler": "constant", "lr_warmup_steps": "0"}).notes == []


def test_what_is_missing_of_lycoris_is_taken_where_it_is_off_and_named_where_it_is_on() -> None:
    for name in network_args._MISSING:
        for off in ("False", "0", "0.0", "None"):
            assert check_training(LYCORIS | {"network_args": [f"{name}={off}"]}).network_args == {}
        sentence = f"network_args {name}=True: it is not supported; leave it out"
        assert reason(**LYCORIS, network_args=[f"{name}=True"]) == sentence


def test_lycoris_older_names_and_ranks_that_stand_for_a_whole_factor_are_its() -> None:
    keys = LYCORIS | {"network_dim": 100_000, "network_args": ["algo=lokr", "conv_dim=100000", "use_cp=True"]}
    config = check_training(keys)
    assert config.network_args == {"algo": "lokr", "conv_dim": "100000", "use_tucker": "True"}
    assert check_training(config.model_dump()) == config


def test_an_empty_text_where_there_is_none_is_as_if_it_were_not_given() -> None:
    names = Training.model_fields.keys() | training._REFUSED.keys() | {"huggingface_token", "mystery"}
    texts = {name for name, field in Training.model_fields.items() if isinstance(field.default, str)}
    assert check_training(dict.fromkeys(names - texts, "")) == check_training({})


def test_what_other_tools_write_for_every_kind_of_network_is_taken_where_it_is_off() -> None:
    off = ["conv_dim=0", "conv_alpha=1.0", "factor=-1", "rank_dropout=0", "module_dropout=0.0", "use_tucker=False"]
    config = check_training(LYCORIS | {"network_args": ["algo=locon", *off, "decompose_both=False"]})
    assert (config.algorithm, "conv_dim" in config.network_args) == ("locon", False)
    assert check_training({"network_args": off}).network_args == {"conv_alpha": "1"}
    assert check_training(config.model_dump()) == config


@pytest.mark.parametrize("extension", ["txt", ".txt"])
def test_the_ending_of_captions_may_come_without_its_dot(extension: str) -> None:
    assert check_training({"caption_extension": extension}).caption_extension == ".txt"


def test_what_is_not_given_has_kohyas_default() -> None:
    config = check_training({})
    assert (config.network_dim, config.network_alpha, config.learning_rate) == (4, 1.0, 2e-6)
    assert (config.lr_scheduler, config.optimizer_type, config.max_train_steps) == ("constant", "AdamW", 1600)
    assert (config.max_token_length, config.caption_extension) == (75, ".caption")


def test_a_value_of_any_type_is_taken_or_refused_with_a_sentence() -> None:
    odd = (
        5,
        -1,
        1e300,
        math.inf,
        math.nan,
        True,
        "",
        "x",
        "a" * 20_000,
        [],
        [5],
        [[]],
        {"a": 1},
        date(2026, 1, 1),
        2**70,
    )
    for name in [*Training.model_fields, *training._REFUSED, *training._NOTES, *training._WITHOUT_EFFECT]:
        for value in odd:
            with contextlib.suppress(InvalidArgument):
                check_training({name: value})


def test_sections_only_group_keys_and_later_ones_win() -> None:
    fields = parse_toml('[training]\noutput_name="a"\nseed=1\n[saving_arguments]\noutput_name="b"\n')
    assert fields == {"output_name": "b", "seed": 1}


def test_no_toml_is_refused_with_the_place() -> None:
    with pytest.raises(InvalidArgument, match=r"not valid TOML: .*line 2"):
        parse_toml("[training]\nseed = nonsense")


@pytest.mark.parametrize("resolution", ["640,384", [640, 384], "640, 384"])
def test_a_resolution_is_two_sides(resolution: Any) -> None:
    assert check_training({"resolution": resolution}).resolution == (640, 384)


@pytest.mark.parametrize("resolution", ["512", 512, [512]])
def test_one_side_makes_a_square(resolution: Any) -> None:
    assert check_training({"resolution": resolution}).resolution == (512, 512)


def test_numbers_may_be_text_as_clients_send_them() -> None:
    config = check_training(
        {"max_train_epochs": "100", "unet_lr": "1e-4", "max_token_length": "225", "network_args": ["conv_dim=4"]}
    )
    assert (config.max_train_epochs, config.unet_rate, config.max_token_length) == (100, 1e-4, 225)
    assert config.network_args == {"conv_dim": "4"}


def test_unknown_keys_are_listed_and_keys_of_kohyas_process_are_not() -> None:
    config = check_training({"max_data_loader_n_workers": 8, "dream_machine": 1, "color_aug": False})
    assert config.unknown == ["dream_machine"]
    assert [note.split(":")[0] for note in config.notes] == ["max_data_loader_n_workers"]


def test_a_checked_configuration_gives_itself_again() -> None:
    config = check_training({"xformers": True, "mystery": 1, "network_args": ["conv_dim=4"], "resolution": "64,64"})
    assert check_training(config.model_dump()) == config


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        (
            {"v2": True},
            "v2 true: Stable Diffusion 2 is not known here; possible base models: Stable Diffusion 1.5, SDXL",
        ),
        ({"color_aug": True}, "color_aug true: colours are not augmented; set it to false"),
        ({"network_dim": 0}, "network_dim 0 is out of range: 1 to 100000 is possible"),
        ({"network_dim": "many"}, 'network_dim "many": input should be a valid integer'),
        ({"max_train_epochs": 0}, "max_train_epochs 0 is out of range: 1 to 1000000 is possible"),
        ({"resolution": "0,512"}, 'resolution "0,512" is none; possible: one side, or "width,height"'),
        (
            {"optimizer_type": "SGD"},
            'optimizer_type "SGD" is not possible; possible: AdamW, AdamW8bit, Adafactor, Lion',
        ),
        ({"lr_scheduler": "adafactor"}, 'lr_scheduler "adafactor" is not possible; possible: constant'),
        ({"network_args": ["conv_dim"]}, 'network_args ["conv_dim"] is not a list of "name=value"'),
        *(
            ({"network_args": [wrong]}, f"network_args {wrong} is not possible; possible: a whole number from")
            for wrong in ("conv_dim=x", "conv_dim=nan", "conv_dim=-1", "conv_dim=4.5", "factor=4.5", "factor=inf")
        ),
        ({"network_args": ["conv_alpha=nan"]}, "network_args conv_alpha=nan is not possible; possible: a number from"),
        ({"network_args": ["module_dropout=1"]}, "network_args module_dropout=1 is not possible; possible: a number"),
        ({"network_args": ["full_matrix=maybe"]}, "network_args full_matrix=maybe is not possible; possible: true"),
        *(
            (LYCORIS | {"network_args": [f"algo={kind}", wrong]}, f"network_args {wrong} is not possible with algo=")
            for kind, wrong in (
                ("locon", "rank_dropout=0.1"),
                ("lora", "module_dropout=0.1"),
                ("locon", "use_tucker=True"),
                ("loha", "factor=8"),
                ("loha", "dropout=0.1"),
                ("loha", "decompose_both=1"),
            )
        ),
        (
            LYCORIS | {"network_dropout": 0.1, "network_args": ["algo=lokr"]},
            "network_dropout 0.1 is not possible with algo=lokr; possible: rank_dropout or module_dropout",
        ),
        (
            LYCORIS | {"network_dim": 10_000, "network_args": ["algo=loha"]},
            "network_dim 10000 is not possible with algo=loha; possible: 1 to 1024, or with algo=lokr to 100000",
        ),
        ({"network_args": ["conv_dim=1025"]}, "network_args conv_dim 1025 is not possible with algo=lora; possible: 1"),
        (
            {"color_aug": True, "random_crop": "true"},
            'set it to false; random_crop "true": pictures are cropped at their centre; set it to false',
        ),
        ({"lr_scheduler_args": ["T_max=1"]}, "lr_scheduler_args T_max is not possible; possible: step_rules"),
        *(
            ({"caption_extension": wrong}, "cannot be the end of a file's name")
            for wrong in ("", ".", "..", "/../x", "a/b", "a\0")
        ),
        ({"network_args": ["block_dims=1,2"]}, "network_args block_dims is not possible; possible: algo"),
        ({"network_args": ["algo=loha"]}, "others need network_module lycoris.kohya"),
        (
            {"network_module": "lycoris.kohya", "network_args": ["algo=boft"]},
            "network_args algo=boft is not possible; possible: lora, locon, loha, lokr",
        ),
        ({"network_module": "networks.oft"}, "network_module \"networks.oft\": input should be 'networks.lora' or"),
        ({"save_model_as": "ckpt"}, 'save_model_as "ckpt" is not possible; possible: safetensors'),
        (
            {"sample_prompts": [5]},
            "sample_prompts [5] is neither a text with a prompt in each line nor a list of prompts",
        ),
        ({"output_name": "\U0001f408" * 60}, "cannot be the name of a file"),
        ({"output_name": "../x"}, 'output_name "../x" cannot be the name of a file'),
        ({"log_prefix": "/tmp/x"}, 'log_prefix "/tmp/x" cannot be the name of a file'),
        ({"log_prefix": "../../x"}, 'log_prefix "../../x" cannot be the name of a file'),
        ({"output_name": ""}, 'output_name "": string should have at least 1 character'),
        ({"network_train_unet_only": True, "network_train_text_encoder_only": True}, "nothing would be trained"),
        ({"min_timestep": 500, "max_timestep": 500}, "min_timestep 500 is not below max_timestep 500"),
        ({"adaptive_noise_scale": 0.01}, "adaptive_noise_scale 0.01 changes noise_offset, which is 0; give both"),
        ({"min_bucket_reso": 512, "max_bucket_reso": 256}, "min_bucket_reso 512 is larger than max_bucket_reso 256"),
        (
            {"enable_bucket": True, "resolution": "1280,768"},
            "max_bucket_reso 1024 is smaller than a side of the resolution 1280x768; possible: 1280 or more",
        ),
        ({"resume": "./state"}, 'resume "./state": a training goes on by itself, or by hand with the option --resume'),
        ({"keep_tokens_separator": "|||"}, 'keep_tokens_separator "|||": keep_tokens says how many tags stay in front'),
        (
            {"optimizer_type": "prodigy", "unet_lr": 1, "text_encoder_lr": 0.5},
            "optimizer_type Prodigy finds the learning rate itself: unet_lr 1.0 and text_encoder_lr 0.5",
        ),
        *(
            (
                {"optimizer_type": "AdaFactor", "optimizer_args": arguments},
                "optimizer_type Adafactor is possible with relative_step=False in optimizer_args, without which it",
            )
            for arguments in ([], ["scale_parameter=False"], ["relative_step=True", "warmup_init=True"])
        ),
        ({"max_token_length": 100}, "max_token_length 100: input should be 75, 150 or 225"),
        (
            {"text_encoder_lr": [1e-4, 1e-5]},
            "text_encoder_lr [0.0001, 1e-05]: all text encoders have one learning rate",
        ),
        *(
            ({"sample_prompts": f"/content/prompt.{ending}"}, "is no prompt; possible: prompts, one a line, or by hand")
            for ending in ("txt", "toml", "json")
        ),
        (
            {"datasets": [{"resolution": 512}]},
            'datasets [{"resolution": 512}]: what it says belongs into this configuration',
        ),
        ({"loss_type": "huber"}, "loss_type \"huber\": input should be 'l2'"),
        ({"sample_sampler": "magic"}, 'sample_sampler "magic" is not known; possible: Euler'),
        ({"seed": float("nan")}, "seed NaN: input should be a finite number"),
    ],
)
def test_what_cannot_be_had_is_named(fields: dict[str, Any], sentence: str) -> None:
    assert sentence in reason(**fields)
