"""The core package works without Ray, DeepSpeed and the other packages of the extras."""

import os
import subprocess
import sys
import time

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
    start_time = time.perf_counter()
    done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, env=os.environ)
    assert done.returncode == 0, done.stderr
    return time.perf_counter() - start_time


def test_core_tokenizer_and_codec_work_without_extras(tmp_path):
    run_python("-c", BLOCK_EXTRAS + USE_CORE, str(tmp_path / "model"))


@pytest.mark.parametrize("arguments", [("-c", "import bsq_ray"), ("-m", "bsq_ray", "--help")], ids=["import", "help"])
def test_core_start_imports_no_torch(arguments):
    """Importing the package and showing the help load no large package; the time is printed."""
    block_torch = BLOCK_EXTRAS.replace("('bjontegaard'", "('torch', 'bjontegaard'")
    if arguments[0] == "-c":
        script = block_torch + arguments[1]
    else:
        script = block_torch + "import runpy; sys.argv = ['bsq-ray', '--help']\ntry:\n    runpy.run_module('bsq_ray', "
        script += "run_name='__main__')\nexcept SystemExit as exit:\n    assert not exit.code\n"
    run_python("-c", script)
    print(f"\n{' '.join(arguments)}: {run_python(*arguments):.2f} s")
