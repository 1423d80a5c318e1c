"""What inspection accepts, and in which words it refuses."""

import io
import pickle
import tarfile
import zipfile
from pathlib import Path

import pytest

from services.models import inspection, pickles
from services.models.inspection import Findings, inspect
from services.models.pickles import Refused
from tests.services.models.files import (
    malicious,
    safetensors,
    sparse_tars,
    tar,
    torch_stream,
    torch_zip,
    weights,
    with_header,
)


def look(name: str, content: bytes) -> Findings:
    return inspect(name, len(content), lambda first, last: content[first : last + 1])


def test_a_sound_safetensors_file_is_recognised() -> None:
    assert look("a.safetensors", safetensors()) == Findings("safetensors", "sd_1_5", "checkpoint")
    assert look("A.SAFETENSORS", safetensors(name="conditioner.embedders.0.x")).architecture == "sd_xl"


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "is empty"),
        (b"abc", "truncated"),
        (safetensors()[:-1], "truncated: 1 of 64 bytes of its tensors are missing"),
        (safetensors()[:20], "truncated: its header alone has"),
        (safetensors() + b"x", "1 bytes follow its last tensor"),
        ((1 << 40).to_bytes(8, "little") + b"{}" * 9, "a header of 1099511627776 bytes is announced"),
        ((4).to_bytes(8, "little") + b"[1,]", "header is not JSON"),
        (with_header([], b""), "not a JSON object"),
        (with_header("[" * 9, b"")[:8] + b'"' + b"[" * 9 + b'"', "not a JSON object"),
        (with_header({}, b""), "holds no tensors"),
        (safetensors(data_offsets=[1, 65]), "leave a gap"),
        (safetensors(data_offsets=[0, 60]), "has 60 bytes, its shape and type need 64"),
        (safetensors(dtype="X8"), "entry of tensor cond_stage_model.transformer.weight is malformed"),
        (safetensors(shape=[-64]), "malformed"),
        (safetensors(shape=[True] * 64), "malformed"),
        (safetensors(shape=[2**63, 2**63]), "malformed"),
        (with_header({"a": 1}, b""), "tensor a is malformed"),
    ],
)
def test_a_broken_safetensors_file_is_refused_in_words(content: bytes, reason: str) -> None:
    with pytest.raises(Refused, match=reason):
        look("a.safetensors", content)


def test_overlapping_tensors_are_refused() -> None:
    entry = {"dtype": "U8", "shape": [4]}
    header = {"a": entry | {"data_offsets": [0, 4]}, "b": entry | {"data_offsets": [2, 6]}}
    with pytest.raises(Refused, match="overlap at b"):
        look("a.safetensors", with_header(header, bytes(6)))


def test_a_header_of_nested_brackets_is_refused() -> None:
    content = b"[" * 200_000
    with pytest.raises(Refused, match="not JSON"):
        look("a.safetensors", len(content).to_bytes(8, "little") + content)


def test_a_header_of_more_values_than_any_model_has_is_refused_before_it_is_read() -> None:
    for values in (b"0," * 500_001, (b"[" * 500 + b"0" + b"]" * 500 + b",") * 1_001):
        text = b'{"":[' + values + b"0]}"
        with pytest.raises(Refused, match="more than 500000 values"):
            look("a.safetensors", len(text).to_bytes(8, "little") + text)


def test_an_archive_with_a_huge_directory_is_refused_before_it_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inspection, "MAX_PICKLE_BYTES", 100)
    with pytest.raises(Refused, match=r"has a directory of \d+ bytes, 100 are allowed"):
        look("a.ckpt", torch_zip(weights()))


def test_a_pickle_of_more_opcodes_than_weights_need_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pickles, "_MAX_OPCODES", 10)
    with pytest.raises(Refused, match="more than 10 opcodes"):
        look("a.ckpt", torch_zip(weights()))


SHORT, LONG = "models/Stable-diffusion/a.safetensors", f"models/Lora/{'b' * 120}.safetensors"


@pytest.mark.parametrize(
    ("form", "name"),
    [
        (tarfile.USTAR_FORMAT, SHORT),  # this format has no room for the long name
        (tarfile.GNU_FORMAT, SHORT),
        (tarfile.GNU_FORMAT, LONG),
        (tarfile.PAX_FORMAT, SHORT),
        (tarfile.PAX_FORMAT, LONG),
    ],
)
def test_a_tar_is_looked_into(form: int, name: str) -> None:
    assert look("a.safetensors", tar(name, safetensors(), form)) == Findings("safetensors", "sd_1_5", "checkpoint")
    with pytest.raises(Refused, match="tensors are missing"):
        look("a.safetensors", tar(name, safetensors()[:-1], form))


def test_a_tar_that_ends_early_or_holds_no_model_is_refused() -> None:
    content = tar("models/VAE/a.safetensors", safetensors(2000))
    with pytest.raises(Refused, match=r"truncated: \d+ bytes of 'models/VAE/a.safetensors' in its tar are missing"):
        look("a.safetensors", content[:1500])
    with pytest.raises(Refused, match="without a model"):
        look("a.safetensors", tar("readme.txt", b"hello"))
    with pytest.raises(Refused, match="corrupt tar"):
        look("a.safetensors", b"x" + content[1:])


@pytest.mark.parametrize("form", ["gnu", "pax", "global"])
def test_a_tar_of_sparse_files_is_refused(form: str) -> None:
    with pytest.raises(Refused, match="tar of sparse files: pack it without --sparse"):
        look("a.safetensors", sparse_tars(SHORT, safetensors())[form])


def test_a_header_of_a_tar_that_is_too_long_to_look_into_is_refused() -> None:
    with pytest.raises(Refused, match=r"has a header of \d+ bytes in its tar, 65536 are allowed"):
        look("a.safetensors", tar(SHORT, safetensors(), tarfile.PAX_FORMAT, comment="a" * 70_000))


def test_a_torch_archive_that_would_grow_when_it_is_loaded_is_refused() -> None:
    buffer = io.BytesIO(torch_zip(weights()))
    with zipfile.ZipFile(buffer, "a", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data/0", bytes(1 << 20))
    with pytest.raises(Refused, match="has archive/data/0 compressed or encrypted"):
        look("a.ckpt", buffer.getvalue())
    with zipfile.ZipFile(buffer := io.BytesIO(torch_zip(weights())), "a") as archive:
        archive.writestr("archive/data/0", bytes(1000))
        (record,) = (member for member in archive.infolist() if member.filename == "archive/data/0")
        archive.filelist += [record, record]
    with pytest.raises(Refused, match=r"its members have 3\d\d\d bytes, the archive has"):
        look("a.ckpt", buffer.getvalue())


@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize("wrap", [torch_zip, torch_stream])
@pytest.mark.parametrize("name", ["a.ckpt", "a.pt", "a.pth", "a.bin"])
def test_code_in_a_pickle_is_refused_and_not_executed(tmp_path: Path, protocol: int, wrap: object, name: str) -> None:
    assert callable(wrap)
    assert look(name, wrap(weights(protocol))) == Findings("torch", "sd_1_5", "lora")
    with pytest.raises(Refused, match=r"has code in its pickle: posix\.system"):
        look(name, wrap(malicious(f"touch {tmp_path}/executed", protocol)))
    with pytest.raises(Refused, match="has code in its pickle"):
        look(name, tar(f"models/{name}", wrap(malicious(f"touch {tmp_path}/executed", protocol))))
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize(
    "pickled",
    [
        # The names that count are popped away from under harmless ones.
        b"\x80\x04\x8c\x02os\x8c\x06system\x8c\x0bcollections\x8c\x0bOrderedDict00\x93.",
        b"\x80\x04\x8c\x02os\x94\x8c\x06system\x94\x8c\x0bcollections\x8c\x0bOrderedDict00h\x00h\x01\x93.",
        b"\x80\x04N\x8c\x06system\x93.",
        b"\x80\x02\x82\x01.",
        b"(S'true'\nios\nsystem\n.",
        b"cbuiltins\neval\n.",
    ],
)
def test_hidden_names_of_code_are_refused(pickled: bytes) -> None:
    with pytest.raises(Refused, match="pickle"):
        look("a.ckpt", torch_zip(pickled))


def test_a_pickle_is_looked_at_whatever_the_case_of_its_name() -> None:
    # torch finds archive/DATA.PKL where it looks for archive/data.pkl.
    assert look("a.ckpt", torch_zip(weights(), "archive/DATA.PKL")).format == "torch"
    with pytest.raises(Refused, match="has code in its pickle"):
        look("a.ckpt", torch_zip(malicious("true"), "archive/DATA.PKL"))


@pytest.mark.parametrize("is_large", [False, True], ids=["zip", "zip64"])
def test_an_archive_of_two_directories_is_refused(is_large: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """zipfile counts back from the end to the one before it; other readers go where the end says."""
    if is_large:
        monkeypatch.setattr(zipfile, "ZIP_FILECOUNT_LIMIT", 0)  # so that zipfile writes the end of a large archive
    good, bad = torch_zip(weights()), torch_zip(malicious("true"))
    assert (b"PK\6\6" in good) is is_large
    assert look("a.ckpt", good).format == "torch"
    with pytest.raises(
        Refused, match="it has no end where it should be" if is_large else "its directory lies elsewhere"
    ):
        look("a.ckpt", bad + good)
    with pytest.raises(Refused, match="does not end with its directory"):
        look("a.ckpt", good + bad[:-1])


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (torch_zip(weights())[:-30], "no sound zip archive"),
        (torch_zip(weights()[:-1]), "truncated or corrupt pickle"),
        (torch_stream(weights())[:-2], "truncated or corrupt pickle"),
        (pickle.dumps({"a": 1}, 2), "no torch file"),
        (b"GIF89a", "no torch file: it begins with b'GIF8'"),
        (torch_zip(weights()).replace(b"data.pkl", b"date.pkl"), "without data.pkl"),
    ],
)
def test_what_is_no_torch_file_is_refused(content: bytes, reason: str) -> None:
    with pytest.raises(Refused, match=reason):
        look("a.ckpt", content)


def test_files_of_other_names_pass() -> None:
    assert look("a.yaml", b"model: {}") == Findings()
    assert look("a.yaml", b"") == Findings()
