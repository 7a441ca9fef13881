"""Commands with file names that programs take for something else, for every input and output."""

import io
import os
import subprocess
import sys

import pytest
from PIL import Image
from small_models import save_tokenizer

from bsq_ray.cli import main
from bsq_ray.data.index import IndexOptions, index_shards
from bsq_ray.data.manifest import read_manifest, write_manifest
from bsq_ray.data.pack import PackOptions, pack_images
from bsq_ray.data.sample_index import ShardRow
from bsq_ray.data.tokenize import tokenize

NAMES = ["a::b", "zip::x", "file:x", "~x", "x#y?z%20", "küche 猫", "lr=1e-4", "-p", "caf\udce9", "[1] 'q\""]
SMALL_TRAINING = [
    *("model.image_size=16", "model.patch_size=8", "model.quantizer.bits=4", "model.decoder.head_hidden_dim=16"),
    *(f"model.{half}.{key}" for half in ("encoder", "decoder") for key in ("width=16", "layers=1", "heads=1")),
    *("loss.perceptual_weight=0", "loss.adversarial.weight=0", "training.steps=1", "training.batch_size=2"),
    *("training.eval_samples=4", "training.engine.precision=fp32", "training.schedule.warmup_steps=0"),
]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty working folder, with a model and images next to it."""
    save_tokenizer(tmp_path / "model", seed=0)
    (tmp_path / "images").mkdir()
    for number in range(4):
        Image.effect_noise((40, 40), 60).convert("RGB").save(tmp_path / "images" / f"{number}.png")
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path


def run(capsys, *arguments):
    """Run a command in this process; return its output."""
    with pytest.raises(SystemExit) as exit_:
        main.main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    assert exit_.value.code == 0, captured.err
    return captured.out


@pytest.mark.parametrize("name", NAMES, ids=ascii)
def test_commands_write_exactly_the_named_files(folder, capsys, name):
    """Each command reads and writes the file of this name in the working folder, and nothing else."""
    model = f"{name}.model"
    (folder / "model").rename(model)
    (folder / "images").rename(f"{name}.images")
    os.rename(os.path.join(f"{name}.images", "0.png"), f"{name}.png")

    def check_new(*expected):
        nonlocal before
        assert sorted(set(os.listdir()) - before) == sorted(expected)
        before = set(os.listdir())

    before = set(os.listdir())
    run(capsys, "data", "pack", "--workers", 0, "--", f"{name}.images", f"{name}.packed")
    check_new(f"{name}.packed")
    os.remove(os.path.join(f"{name}.packed", "manifest.parquet"))
    run(capsys, "data", "index", "--", f"{name}.packed")
    run(capsys, "data", "inspect", f"--sheet={name}.sheet.png", "--", f"{name}.packed")
    check_new(f"{name}.sheet.png")
    run(capsys, "info", "--", model)
    run(capsys, "compress", f"--model={model}", "--", f"{name}.png", f"{name}.bsq")
    check_new(f"{name}.bsq")
    run(capsys, "decompress", f"--model={model}", "--", f"{name}.bsq", f"{name}.decoded.png")
    check_new(f"{name}.decoded.png")
    run(capsys, "reconstruct", f"--model={model}", "--", f"{name}.png", f"{name}.pair.png")
    check_new(f"{name}.pair.png")
    arguments = [f"--model={model}", f"--data={name}.packed", f"--out={name}.tokens"]
    run(capsys, "tokenize", "--workers", 0, *arguments)
    check_new(f"{name}.tokens")
    run(capsys, "info", "--", f"{name}.tokens")


@pytest.mark.parametrize("name", ["exp::2", "küche 猫", "caf\udce9 %20#"], ids=ascii)
def test_training_writes_exactly_the_named_folder(folder, capsys, name):
    run(capsys, "data", "pack", "--workers", 0, folder / "images", "packed")
    arguments = ["--config=demo", "--data=packed", f"--out={name}", "--workers=0", *SMALL_TRAINING]
    assert f"{name}/model".encode("utf-8", "backslashreplace").decode() in run(capsys, "train", "tokenizer", *arguments)
    assert sorted(os.listdir()) == sorted([name, "packed"])
    assert "model.safetensors" in os.listdir(os.path.join(name, "model"))
    run(capsys, "info", f"{name}/model")


def run_shell(folder, command):
    """Run a shell command in which `bsq-ray` is the command line."""
    text = f'bsq-ray() {{ {sys.executable} -m bsq_ray "$@"; }}; {command}'
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    return subprocess.run(["bash", "-c", text], cwd=folder, env=environment, capture_output=True, timeout=300)


def test_pipes_and_devices_take_the_place_of_files(folder):
    """The whole way through pipes that have names, with nothing written to the folder."""
    command = (
        "bsq-ray compress --model model <(cat images/0.png) /dev/stdout 2> /dev/null"
        " | bsq-ray decompress --model model /dev/stdin /dev/stdout 2> /dev/null | cat"
    )
    before = sorted(os.listdir(folder))
    image = Image.open(io.BytesIO(run_shell(folder, command).stdout))
    assert (image.format, image.size) == ("PNG", (40, 40))
    assert run_shell(folder, "bsq-ray compress --model model images/0.png /dev/null").returncode == 0
    assert sorted(os.listdir(folder)) == before


@pytest.mark.parametrize("redirection", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_commands_work_with_closed_streams(folder, redirection):
    done = run_shell(folder, f"bsq-ray compress --model model images/0.png out.bsq {redirection}")
    assert (done.returncode, b"Traceback" in done.stderr) == (0, False)
    assert (folder / "out.bsq").exists()


@pytest.mark.parametrize("content", [b"half of an image", b"\x89PNG\r\n\x1a\n", b"x" * 5])
@pytest.mark.parametrize("name", [b"caf\xe9.png", b"\xff\xfe.jpg", b"k\xc3\xbcche.webp"])
def test_damaged_file_of_any_name_is_listed(folder, capsys, name, content):
    """The rest is packed, and the list of damaged files is UTF-8."""
    (folder / "images" / os.fsdecode(name)).write_bytes(content)
    assert "skipped 1 that cannot be decoded" in run(
        capsys, "data", "pack", "--workers", 0, folder / "images", "packed"
    )
    with open("packed/damaged.txt", encoding="utf-8") as file:
        assert name.decode("utf-8", "surrogateescape").encode("utf-8", "backslashreplace").decode() in file.read()


@pytest.mark.parametrize("destination", ["packed/x", "./packed/../packed//x/", "küche 猫"])
def test_workers_with_another_working_folder_write_to_the_same_place(folder, ray_local, monkeypatch, destination):
    """Relative paths are those of the caller, although Ray's workers started elsewhere."""
    monkeypatch.chdir(folder)
    pack_images("images", destination, PackOptions(num_workers=1))
    assert {"manifest.parquet", "shard-000000.tar"} <= {*os.listdir(destination)}
    assert read_manifest(destination).num_samples == 4
    os.remove(os.path.join(destination, "manifest.parquet"))
    assert index_shards(destination, IndexOptions(num_workers=1)).manifest.num_samples == 4
    tokenize("model", destination, "tokens", num_workers=1)
    assert "tokens.json" in os.listdir("tokens")


@pytest.mark.parametrize("name", ["küche 猫", "caf\udce9 %20#"], ids=ascii)
def test_ray_training_writes_exactly_the_named_folder(folder, ray_local, capsys, name):
    """A worker of Ray writes a run to a relative folder of any name."""
    run(capsys, "data", "pack", "--workers", 0, folder / "images", "packed")
    arguments = ["--config=demo", "--data=packed", f"--out={name}", "--workers=1", *SMALL_TRAINING]
    run(capsys, "train", "tokenizer", *arguments)
    assert sorted(os.listdir()) == sorted([name, "packed"])
    assert "model.safetensors" in os.listdir(os.path.join(name, "model"))


@pytest.mark.parametrize("problem", ["missing", "truncated", "elsewhere"])
def test_manifest_is_not_written_without_its_shards(tmp_path, problem):
    """Shards that a node wrote to its own disk do not become part of a data set."""
    shard = ShardRow("shard-000000.tar", 10, "0" * 64, 1, 1)
    if problem == "truncated":
        (tmp_path / shard.name).write_bytes(b"12345")
    if problem == "elsewhere":
        (tmp_path / "other").mkdir()
        (tmp_path / "other" / shard.name).write_bytes(bytes(10))
    with pytest.raises(
        ValueError, match="1 of 1 shards are not in .*, such as shard-000000.tar; if nodes of a cluster"
    ):
        write_manifest(str(tmp_path), [shard], ["all"], "images", has_content_digests=True)
    assert not (tmp_path / "manifest.parquet").exists()
