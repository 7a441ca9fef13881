"""Files written with one instruction set of the CPU and read with another, by the shipped codec.

    writer (AVX-512, AVX2, none of them) ─▶ file ─▶ reader (AVX-512, AVX2, none of them) ─▶ the same pixels

PyTorch, oneDNN and MKL choose their kernels at start from the limits in the environment, so each run is a process.
"""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from bsq_ray import Codec
from bsq_ray.codec.entropy_coding import deterministic_fp32
from bsq_ray.shipped_models.catalog import DEFAULT_CODEC

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(600),
    pytest.mark.skipif(torch.backends.cpu.get_cpu_capability() != "AVX512", reason="the processor has no AVX-512"),
]

LIMITS = {
    "AVX-512": {},
    "AVX2": {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "MKL_CBWR": "AVX2"},
    "baseline": {"ATEN_CPU_CAPABILITY": "default", "ONEDNN_MAX_CPU_ISA": "SSE41", "MKL_CBWR": "COMPATIBLE"},
}


def write(photo, folder, name):
    """Write a file with the instructions of this process, and a digest of the prior's fp32 logits."""
    codec = Codec.from_pretrained(DEFAULT_CODEC)
    Path(folder, f"{name}.bsq").write_bytes(codec.compress(Image.open(photo)).data)
    tokens_BNS = torch.randint(0, 64, (2, 64, 4), generator=torch.Generator().manual_seed(0))
    with deterministic_fp32(torch.device("cpu")):
        logits = codec.prior(tokens_BNS)
    print(json.dumps({"logits": hashlib.sha256(logits.numpy().tobytes()).hexdigest()}))


def read(folder):
    """Print a digest of the pixels of each file in a folder."""
    codec = Codec.from_pretrained(DEFAULT_CODEC)
    images = {path.stem: codec.decompress(path.read_bytes()) for path in sorted(Path(folder).glob("*.bsq"))}
    print(json.dumps({name: hashlib.sha256(image.tobytes()).hexdigest() for name, image in images.items()}))


def run(limits, call):
    """Run a function of this module in a process with limited instructions; return what it prints."""
    folder = str(Path(__file__).parent)
    code = f"import sys; sys.path.insert(0, {folder!r}); import test_instruction_sets as t; t.{call}"
    command, env = [sys.executable, "-c", code], os.environ | limits
    done = subprocess.run(command, capture_output=True, text=True, env=env, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_files_decode_alike_with_every_instruction_set(photos, tmp_path):
    photos[0].resize((144, 96)).save(tmp_path / "photo.png")
    logits, pixels = {}, {}
    for name, limits in LIMITS.items():
        logits[name] = run(limits, f"write({str(tmp_path / 'photo.png')!r}, {str(tmp_path)!r}, {name!r})")["logits"]
    for name, limits in LIMITS.items():
        pixels[name] = run(limits, f"read({str(tmp_path)!r})")
    # The limits take effect: the arithmetic differs, and the pixels do not.
    assert len(set(logits.values())) == len(LIMITS)
    assert pixels["AVX-512"] == pixels["AVX2"] == pixels["baseline"]
