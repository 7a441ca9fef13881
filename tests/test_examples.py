"""Every file and notebook in examples/ runs, on small models and real photos."""

import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
import torch
from PIL import Image

from bsq_ray import Tokenizer, config
from bsq_ray.models.masked_lm import MaskedLM

EXAMPLES = Path(__file__).parents[1] / "examples"
SIZES = {"width": 32, "layers": 1, "heads": 2}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """(tokenizer, masked LM): folders of untrained models for 64 px images, 8 x 8 tokens of 10 bits, 4 classes."""
    folder = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    tokenizer = Tokenizer(
        config.TokenizerModelConfig(
            image_size=64,
            encoder=config.TransformerConfig(**SIZES),
            decoder=config.DecoderConfig(**SIZES, head_hidden_dim=32),
            quantizer=config.BSQConfig(bits=10),
        )
    )
    masked_lm = MaskedLM(config.MaskedLMModelConfig(grid=[1, 8, 8], bits=10, sub_bits=5, num_classes=4, **SIZES))
    tokenizer.save_pretrained(str(folder / "tokenizer"))
    masked_lm.save_pretrained(str(folder / "masked_lm"))
    tokenizer.save_pretrained(str(folder / "masked_lm" / "tokenizer"))
    return str(folder / "tokenizer"), str(folder / "masked_lm")


@pytest.fixture
def photo(photo_folders, tmp_path):
    shutil.copy(photo_folders[1] / "coffee.png", tmp_path / "photo.png")
    return str(tmp_path / "photo.png")


def run(name, *arguments, cwd, **environment):
    command = [sys.executable, str(EXAMPLES / name), *map(str, arguments)]
    variables = {**os.environ, **environment}
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=600, env=variables)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_examples_are_listed_and_short():
    files = sorted(EXAMPLES.rglob("*.py")) + sorted(EXAMPLES.rglob("*.ipynb"))
    listed = (EXAMPLES / "README.md").read_text()
    assert len(files) == 9
    for path in files:
        assert f"({path.relative_to(EXAMPLES)})" in listed, path
        assert path.suffix != ".py" or len(path.read_text().splitlines()) < 60, path


def test_encode_decode_writes_tokens_and_reconstruction(models, photo, tmp_path):
    printed = run("01_encode_decode.py", models[0], photo, cwd=tmp_path)
    assert "grid (1, 8, 8), 10 bits per token" in printed
    assert (tmp_path / "reconstruction.tokens").stat().st_size == 64 * 2
    assert (tmp_path / "reconstruction.png").exists()


@pytest.mark.parametrize("side", [40, 600])
def test_compare_with_jpeg_writes_panels_of_at_most_the_same_bytes(models, photo, tmp_path, side):
    """A format that cannot be as small is marked; the headers of tiny JPEG files are larger than a whole .bsq file."""
    with Image.open(photo) as image:
        image.resize((side, side)).save(photo)
    printed = run(
        "07_compare_with_jpeg.py", photo, "out.png", "--model", models[0], "--crop", "0,8,30,28", cwd=tmp_path
    )
    panels = re.findall(r"(\w+), ([\d,]+) bytes( \(its smallest\))?", printed)
    sizes = {name: int(text.replace(",", "")) for name, text, _ in panels}
    assert list(sizes) == ["bsq_ray", "JPEG", "WEBP"]
    for name, _, note in panels[1:]:
        assert (sizes[name] > sizes["bsq_ray"]) == bool(note)
        assert note or sizes[name] > 0.8 * sizes["bsq_ray"]
    assert bool(panels[1][2]) == (side == 40)
    assert Image.open(tmp_path / "out.png").size == (4 * 34 - 4, 20 + 26)


@pytest.mark.slow
def test_compress_folder_with_ray_data_skips_damaged_files(models, photo, tmp_path):
    (tmp_path / "photos").mkdir()
    shutil.move(photo, tmp_path / "photos" / "photo.png")
    (tmp_path / "photos" / "damaged.png").write_bytes(b"no image")
    name = "02_compress_folder_with_ray_data.py"
    # Without an address Ray waits for minutes for the cluster that was started last, also if it was killed.
    printed = run(name, models[0], "photos", "compressed", "--actors", 1, cwd=tmp_path, RAY_ADDRESS="local")
    assert "damaged.png: skipped" in printed
    assert [path.name for path in (tmp_path / "compressed").iterdir()] == ["photo.bsq"]


def test_custom_quantizer_trains_next_to_bsq(photo_folders, tmp_path):
    printed = run("03_custom_quantizer.py", photo_folders[0], 2, cwd=tmp_path)
    assert "BinarySphericalQuantizer: PSNR" in printed
    assert "TanhQuantizer: PSNR" in printed


def test_custom_stage_trains(photo_shards, tmp_path):
    command = [sys.executable, "-m", "bsq_ray", "train", "tokenizer", "--config", "demo", "--workers", "0"]
    command += [
        "--data",
        photo_shards,
        "--out",
        "run",
        "training.steps=2",
        "training.batch_size=8",
        "training.engine.kind=ddp",
    ]
    command += ["model.encoder.layers=1", "model.decoder.layers=1", "training.eval_samples=16"]
    command += ["training.stage_class=04_custom_stage:DenoisingStage", "training.stage_options.noise=0.3"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(EXAMPLES), str(EXAMPLES.parent)])}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "trained 2 steps" in done.stdout
    Tokenizer.from_pretrained(str(tmp_path / "run" / "model"))


@pytest.mark.slow
def test_service_client_compresses_and_generates(models, photo, tmp_path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [
        sys.executable,
        "-m",
        "bsq_ray",
        "serve",
        "--model",
        models[0],
        "--model",
        models[1],
        "--port",
        str(port),
    ]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    service = subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, text=True)
    try:
        url = service.stdout.readline().strip().rstrip("/")
        _wait_until_healthy(f"{url}/healthz")
        printed = run("05_service_client.py", photo, "--url", url, cwd=tmp_path)
        assert "bytes to" in printed
        assert "step 1 of" in printed
        assert (tmp_path / "photo.decoded.png").exists()
    finally:
        service.terminate()
        assert service.wait(60) == 0


def _wait_until_healthy(url):
    for _ in range(300):
        try:
            urllib.request.urlopen(url, timeout=5).close()
            return
        except OSError:
            time.sleep(0.2)
    raise AssertionError(f"{url} is not healthy")


def test_generate_writes_images(models, tmp_path):
    run("06_generate.py", models[1], "--num-images", 2, "--steps", 2, cwd=tmp_path)
    assert {path.name for path in tmp_path.glob("*.png")} == {"generated.png", "steps.png", "interpolation.png"}


@pytest.mark.parametrize("name", ["encode_decode", "rate_distortion"])
def test_notebook_runs(name, models, photo, photo_folders, tmp_path, monkeypatch):
    nbclient, nbformat = pytest.importorskip("nbclient"), pytest.importorskip("nbformat")
    monkeypatch.setenv("BSQ_RAY_MODEL", models[0])
    monkeypatch.setenv("BSQ_RAY_PHOTOS", str(photo_folders[1]))
    notebook = nbformat.read(EXAMPLES / "notebooks" / f"{name}.ipynb", as_version=4)
    nbformat.validate(notebook)
    nbclient.NotebookClient(notebook, timeout=300, kernel_name="python3").execute(cwd=str(tmp_path))
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    assert any("image/png" in output.get("data", {}) for output in outputs)


@pytest.mark.parametrize("name", ["encode_decode", "rate_distortion"])
def test_notebook_is_stored_without_outputs(name):
    import json

    notebook = json.loads((EXAMPLES / "notebooks" / f"{name}.ipynb").read_text())
    assert not any(cell.get("outputs") for cell in notebook["cells"])
