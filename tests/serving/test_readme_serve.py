"""The README's section "Serve": the command and every `curl` line as printed, but for the port."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from local_service import save_models
from PIL import Image
from small_videos import make_street_video

from bsq_ray import Codec
from bsq_ray.media.video_files import read_video

_SECTION = (Path(__file__).parents[2] / "README.md").read_text().split("## Serve\n")[1].split("\n## ")[0]
_COMMAND, _CURL = re.findall(r"```bash\n(.*?)```", _SECTION, re.S)


@pytest.fixture
def served(tmp_path, photo_folders):
    """A folder as the README leaves it, and the port of the service that its command started there."""
    models = save_models(tmp_path / "made")
    for name, folder in (("small", "runs/demo/model"), ("draws", "runs/lm/model")):
        shutil.copytree(models[name], tmp_path / folder)
    shutil.copy(photo_folders[1] / "coffee.png", tmp_path / "photo.png")
    (tmp_path / "clip.mp4").write_bytes(make_street_video(5))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    arguments = [*_COMMAND.split()[1:], "--port", str(port)]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    service = subprocess.Popen(
        [sys.executable, "-c", "from bsq_ray.cli.main import main; main()", *arguments],
        cwd=tmp_path, env=environment, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        assert service.stdout.readline() == f"http://127.0.0.1:{port}/\n"
        yield tmp_path, port
    finally:
        service.send_signal(signal.SIGTERM)
        assert service.wait(60) == 0


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("curl"), reason="needs curl")
def test_readme_serve_commands_work_as_printed(served):
    """Every command of the README's section works as printed."""
    folder, port = served
    outputs = {}
    for line in _CURL.splitlines():
        command = line.split("    #")[0].replace("127.0.0.1:8000", f"127.0.0.1:{port}")
        result = subprocess.run(
            ["bash", "-c", command.replace("curl ", "curl --silent --show-error --fail ", 1)],
            cwd=folder, capture_output=True, text=True, timeout=120,
        )  # fmt: skip
        assert result.returncode == 0, (line, result.stderr)
        outputs[command.split("/v1/")[1].split()[0]] = result.stdout
    assert [model["name"] for model in json.loads(outputs["models"])["models"]] == ["small", "draw"]
    for name in ("decoded", "reconstruction", "drawn"):
        assert Image.open(folder / f"{name}.png").size == (64, 64)
    assert (folder / "decoded.png").read_bytes() == (folder / "reconstruction.png").read_bytes()
    codec = Codec.from_pretrained(str(folder / "runs/demo/model"))
    photo = Image.open(folder / "photo.png").convert("RGB")
    assert (folder / "photo.bsq").read_bytes() == codec.compress(photo).data
    assert Image.open(folder / "back.png").size == photo.size
    clip = read_video(str(folder / "clip.mkv"))
    data = codec.compress_clip(read_video(str(folder / "clip.mp4")).frames, clip.frame_rate, clip.color).data
    assert (folder / "clip.bsq").read_bytes() == data
    assert np.array_equal(np.stack(list(clip.frames)), np.stack(list(codec.decompress_clip(data))))
    for name in ("back", "reconstruction"):
        assert len(list(read_video(str(folder / f"{name}.mp4")).frames)) == 5
    assert json.loads(outputs["measure"])["bytes"] == len((folder / "photo.bsq").read_bytes())
