"""The core package works without Ray, DeepSpeed and the other packages of the extras; short commands start fast."""

import os
import resource
import subprocess
import sys

import pytest

# Packages that only the extras install.
EXTRAS = (
    "bjontegaard", "boto3", "botocore", "cv2", "deepspeed", "fastapi", "imagecodecs", "lpips", "matplotlib", "mlflow",
    "optuna", "pyarrow", "pytorch_msssim", "ray", "s3fs", "scipy", "sklearn", "starlette", "tensorboardX",
    "torchvision", "wandb", "webdataset",
)  # fmt: skip
BLOCK_EXTRAS = f"""
import sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {EXTRAS!r}:
            raise ModuleNotFoundError("blocked: " + name, name=name)

sys.meta_path.insert(0, Blocker())
"""
USE_CORE = """
import numpy as np
import torch
from PIL import Image

import bsq_ray
from bsq_ray import config

folder = sys.argv[1]
sizes = {"width": 16, "layers": 1, "heads": 2}
model = config.TokenizerModelConfig(
    image_size=16,
    encoder=config.TransformerConfig(**sizes),
    decoder=config.DecoderConfig(**sizes, head_hidden_dim=16),
    quantizer=config.BSQConfig(bits=4),
)
bsq_ray.Tokenizer(model).save_pretrained(folder)
tokenizer = bsq_ray.Tokenizer.from_pretrained(folder)
assert tokenizer.decode(tokenizer.encode(torch.zeros(1, 3, 16, 16))).shape == (1, 3, 16, 16)
codec = bsq_ray.Codec.from_pretrained(folder)
image = Image.fromarray(np.zeros((20, 30, 3), np.uint8))
assert codec.decompress(codec.compress(image).data).size == (30, 20)
import bsq_ray.codec.files
from bsq_ray.cli.info import format_info
assert "16 px images" in format_info(folder)
"""


def run_python(*arguments):
    done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, env=os.environ)
    assert done.returncode == 0, done.stderr


@pytest.mark.integration
def test_core_tokenizer_and_codec_work_without_extras(tmp_path):
    run_python("-c", BLOCK_EXTRAS + USE_CORE, str(tmp_path / "model"))


PLAN = ("plan", "--config", "imagenet128-bsq18", "--gpu", "a5000", "--gpus", "8")
INFO = ("info", "imagenet128-bsq18")


@pytest.mark.parametrize("command", [None, ("--help",), PLAN, INFO], ids=["import", "help", "plan", "info"])
def test_core_start_imports_no_torch(command):
    """Importing the package, the help, a plan and the description of a preset load no large package."""
    script = BLOCK_EXTRAS.replace("('bjontegaard'", "('torch', 'fsspec', 'bjontegaard'") + "import bsq_ray\n"
    if command is not None:
        script += f"import runpy; sys.argv = {['bsq-ray', *command]!r}\ntry:\n    runpy.run_module('bsq_ray', "
        script += "run_name='__main__')\nexcept SystemExit as exit:\n    assert not exit.code\n"
    run_python("-c", script)


@pytest.mark.integration
def test_serving_ingress_imports_no_torch():
    """The process that responds to `/healthz` starts without torch."""
    run_python("-c", "import sys, bsq_ray.serving.http.ingress; assert 'torch' not in sys.modules")


@pytest.mark.parametrize("command", [PLAN, INFO], ids=["plan", "info"])
def test_core_command_takes_little_cpu_time(command):
    """A plan takes a small multiple of the CPU time of the help (3 times when measured, 15 with torch)."""

    def cpu_s(*arguments):
        times = []
        for _ in range(3):
            before = resource.getrusage(resource.RUSAGE_CHILDREN)
            run_python("-m", "bsq_ray", *arguments)
            after = resource.getrusage(resource.RUSAGE_CHILDREN)
            times.append(after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime)
        return min(times)

    assert cpu_s(*command) < 6 * cpu_s("--help")
