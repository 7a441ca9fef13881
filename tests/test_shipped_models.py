"""Models of the package: names, defaults of commands, listing, and golden files of the models that are shipped."""

import hashlib
import json
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch
from shipped_stand_ins import ship_stand_ins
from small_models import retrain_decoder, save_tokenizer

from bsq_ray import Codec, Prior, Tokenizer, model_folder
from bsq_ray.cli import main
from bsq_ray.codec.container import read_header
from bsq_ray.codec.files import compress_file, decompress_file
from bsq_ray.codec.shipped_codec import find_shipped_codec
from bsq_ray.model_export import export_model
from bsq_ray.serving.server import parse_settings, shipped_model_options
from bsq_ray.shipped_models import catalog

GOLDEN = Path(__file__).parent / "golden" / "shipped"
MAX_SHIPPED_BYTES = 40e6


@pytest.fixture
def shipped(tmp_path, monkeypatch):
    """Folder of stand-ins for the shipped models; the working folder is an empty one."""
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    return ship_stand_ins(tmp_path, monkeypatch)


@pytest.fixture
def nothing_shipped(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(catalog, "MODELS_FOLDER", tmp_path / "none")


@pytest.fixture
def run_cli(capsys):
    """Runs a command in this process: (exit status, stdout, stderr)."""

    def run(*arguments):
        with pytest.raises(SystemExit) as exit_:
            main.main([*map(str, arguments)])
        captured = capsys.readouterr()
        return exit_.value.code, captured.out, captured.err

    return run


@pytest.fixture
def photo(photos):
    """Path of a small photo in the working folder."""
    photos[0].resize((70, 50)).save("photo.png")
    return "photo.png"


def test_from_pretrained_name_loads_shipped_model(shipped):
    tokenizer, prior = Tokenizer.from_pretrained("photo"), Prior.from_pretrained("photo-prior")
    assert tokenizer.model_id == model_folder.read_model_header(str(shipped / "photo-prior" / "tokenizer")).model_id
    assert {value.dtype for value in prior.state_dict().values()} == {torch.float32}
    assert prior.model_id == model_folder.read_model_header("photo-prior").model_id
    assert Codec.from_pretrained("photo-prior").prior is not None
    assert Codec.from_pretrained("photo").tokenizer.model_id == tokenizer.model_id


def test_local_model_folder_precedes_shipped_model(shipped, tmp_path):
    """Only a folder with a configuration takes precedence: a folder of photos may have the name of a model."""
    Path("photo").mkdir()
    shipped_id = Tokenizer.from_pretrained("photo").model_id
    assert model_folder.absolute_url("photo") == str(shipped / "photo-prior" / "tokenizer")
    save_tokenizer("photo", seed=5)
    assert Tokenizer.from_pretrained("photo").model_id != shipped_id
    assert model_folder.absolute_url("photo") == str(tmp_path / "work" / "photo")


def test_local_run_folder_precedes_shipped_model(shipped):
    save_tokenizer("photo/model", seed=5)
    Path("photo/config.yaml").write_text("stage: tokenizer\n")
    with pytest.raises(ValueError, match="photo is a run folder; use its model folder photo/model"):
        Tokenizer.from_pretrained("photo")


def test_unknown_name_lists_shipped_models(shipped):
    with pytest.raises(ValueError, match="no shipped model has this name: the shipped models are photo, photo-prior"):
        Tokenizer.from_pretrained("phto")


def test_shipped_model_of_other_kind_names_the_kind(shipped):
    with pytest.raises(ValueError, match="photo-prior"):
        Tokenizer.from_pretrained("photo-prior")


def test_two_models_of_one_name_raise(shipped):
    shutil.copytree(shipped / "photo-prior", shipped / "copy")
    assert [model.name for model in catalog.list_shipped_models()] == ["photo", "photo-prior"]
    path = shipped / "copy" / "config.yaml"
    path.write_text(path.read_text().replace("seed: 0", "seed: 1"))
    with pytest.raises(ValueError, match=r"two models are named photo-prior: .*copy and .*photo-prior; rename one"):
        catalog.list_shipped_models()


def test_commands_without_model_use_defaults(shipped, photo, run_cli):
    assert run_cli("compress", photo, "photo.bsq")[0] == 0
    codec = Codec.from_pretrained("photo-prior")
    data = Path("photo.bsq").read_bytes()
    assert read_header(data).is_written_with(codec.token_format.tokenizer_id, codec.token_format.prior_id)
    assert run_cli("decompress", "photo.bsq", "decoded.png")[0] == 0
    assert decoded_pixels("decoded.png") == codec.decompress(data).tobytes()
    status, out, _ = run_cli("reconstruct", photo, "reconstruction.png")
    assert status == 0
    assert "32 x 32 px" in out


def test_commands_accept_names_of_shipped_models(shipped, photo, run_cli):
    assert run_cli("compress", "--model", "photo", photo, "raw.bsq")[0] == 0
    assert not read_header(Path("raw.bsq").read_bytes()).has_prior
    assert run_cli("decompress", "--model", "photo", "raw.bsq", "a.png")[0] == 0
    assert run_cli("decompress", "raw.bsq", "b.png")[0] == 0
    assert decoded_pixels("a.png") == decoded_pixels("b.png")
    status, out, _ = run_cli("info", "photo-prior")
    assert status == 0
    assert f"id {model_folder.read_model_header('photo-prior').model_id}" in out


def test_decompress_without_model_finds_earlier_decoder(shipped, photo, tmp_path):
    """A file of an earlier version of a shipped tokenizer, with another decoder, is decoded by the current one."""
    compress_file("photo", photo, "raw.bsq")
    tokenizer = shipped / "photo-prior" / "tokenizer"
    retrain_decoder(str(tokenizer), tmp_path / "retrained")
    shutil.rmtree(tokenizer)
    export_model(str(tmp_path / "retrained"), str(tokenizer))
    assert find_shipped_codec(Path("raw.bsq").read_bytes()) == str(tokenizer)
    assert "written with another decoder of the same tokens" in decompress_file(None, "raw.bsq", "decoded.png")


def test_decompress_without_model_foreign_file_raises(shipped, photo, tmp_path, run_cli):
    compress_file(save_tokenizer(tmp_path / "other", seed=7), photo, "other.bsq")
    status, _, error = run_cli("decompress", "other.bsq", "decoded.png")
    assert status == 2
    assert re.search(
        r"other.bsq: the file was written with the models with key \w{4}, which this version does not ship "
        r"\(the shipped models are photo, photo-prior\); name their model folder with --model",
        error,
    )


def test_commands_without_shipped_models_name_the_option(nothing_shipped, photo, tmp_path, run_cli):
    compress_file(save_tokenizer(tmp_path / "other", seed=7), photo, "other.bsq")
    for arguments, message in (
        (("compress", photo, "a.bsq"), "there is no default model photo-prior: this version ships no models; name a"),
        (
            ("reconstruct", photo, "a.png"),
            "there is no default model photo: this version ships no models; name a model",
        ),
        (("decompress", "other.bsq", "a.png"), "does not ship (this version ships no models); name their model folder"),
        (("serve",), "this version ships no models; name a model folder with --model"),
        (("compress", "--model", "photo", photo, "a.bsq"), "no shipped model has this name: this version ships no"),
    ):
        status, out, error = run_cli(*arguments)
        assert (status, out) == (2, "")
        assert message in error
        assert "Traceback" not in error
    assert run_cli("models") == (0, "this version ships no models\n", "")


def test_models_lists_kind_size_tokens_and_measurements(shipped, run_cli):
    status, out, _ = run_cli("models")
    assert status == 0
    tokenizer, prior = out.split("\n\n")
    tokenizer_folder = shipped / "photo-prior" / "tokenizer"
    assert tokenizer.startswith(
        f"photo: tokenizer, 0.1 MB, tokens of 10 bits, 0.15625 bits per pixel\n  {tokenizer_folder}\n"
    )
    assert "psnr 21.5 on 3 photos" in tokenizer
    assert prior.startswith("photo-prior: prior, 0.1 MB, tokens of 10 bits\n")
    assert str(shipped / "photo-prior") in prior


def test_serve_without_model_serves_default_codec_first(shipped):
    """The first model with a capability serves requests that name no model."""
    settings = parse_settings(shipped_model_options(), "127.0.0.1")
    assert list(settings.models) == ["photo-prior", "photo"]
    assert settings.models["photo-prior"] == str(shipped / "photo-prior")
    assert parse_settings(["photo"], "127.0.0.1").models == {"photo": str(shipped / "photo-prior" / "tokenizer")}


def decoded_pixels(path):
    from PIL import Image

    return Image.open(path).tobytes()


# Tests of the models that this version ships.


def shipped_codecs():
    return [model.name for model in catalog.list_shipped_models() if model.config.stage in ("tokenizer", "prior")]


def missing_golden_files():
    return set(shipped_codecs()) - {path.stem for path in GOLDEN.glob("*.bsq")}


def golden_digests():
    path = GOLDEN / "sha256.json"
    return json.loads(path.read_text()) if path.exists() else {}


def test_shipped_models_have_folder_names_cards_and_small_files():
    models = catalog.list_shipped_models()
    for model in models:
        assert model.folder.name in (model.name, "tokenizer")
        card = (model.folder / "README.md").read_text()
        assert all(f"| {row} |" in card for row in ("data", "licenses", "recipe", "seeds", "weights")), model.name
        assert {path.name for path in model.folder.iterdir()} <= {
            "README.md", "config.yaml", "model.safetensors", "tokenizer",
        }  # fmt: skip
        model_folder.load_model_folder(str(model.folder))
    files = [path for path in catalog.MODELS_FOLDER.rglob("*") if path.suffix != ".pyc" and path.is_file()]
    assert sum(path.stat().st_size for path in files) <= MAX_SHIPPED_BYTES
    if models:
        assert {catalog.DEFAULT_CODEC, catalog.DEFAULT_TOKENIZER} <= {model.name for model in models}


def test_every_shipped_codec_has_a_golden_file(request, photos):
    """`--regenerate-golden` adds missing files; files of earlier versions stay as they are."""
    digests = golden_digests()
    if request.config.getoption("--regenerate-golden"):
        GOLDEN.mkdir(exist_ok=True)
        for name in shipped_codecs():
            path = GOLDEN / f"{name}.bsq"
            if not path.exists():
                codec = Codec.from_pretrained(name)
                path.write_bytes(codec.compress(photos[0].resize((150, 100))).data)
                digests[name] = pixel_digest(codec, path.read_bytes())
        (GOLDEN / "sha256.json").write_text(json.dumps(digests, indent=1) + "\n")
    assert not missing_golden_files()
    assert {path.stem for path in GOLDEN.glob("*.bsq")} == set(digests)


def test_shipped_codec_without_golden_file_is_missing(shipped, tmp_path, monkeypatch):
    monkeypatch.setattr(sys.modules[__name__], "GOLDEN", tmp_path)
    (tmp_path / "photo.bsq").touch()
    assert missing_golden_files() == {"photo-prior"}


@pytest.mark.integration
def test_golden_files_of_shipped_codecs_decode_to_pixels():
    digests = {}
    for path in GOLDEN.glob("*.bsq"):
        data = path.read_bytes()
        digests[path.stem] = pixel_digest(Codec.from_pretrained(find_shipped_codec(data)), data)
    assert digests == golden_digests()


def pixel_digest(codec, data):
    return hashlib.sha256(codec.decompress(data).tobytes()).hexdigest()
