"""Video tokenizer: attention frame by frame compared with a dense mask, streaming with one pass, memory by length.

Width 256, 4 + 4 layers, 64 px, 16 frames: 64 tokens per frame, 1,024 per clip. The baseline is the same model with
attention over all pairs under a block-causal mask. One pass over more than 16 frames needs a model of that length.
"""

import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from bsq_ray import Tokenizer, config
from bsq_ray.models.layers import transformer

pytestmark = pytest.mark.benchmark
_T, _SIZE = 16, 64


def build_tokenizer(frames=_T, size=_SIZE, width=256, layers=4, heads=4):
    torch.manual_seed(0)
    sizes = {"width": width, "layers": layers, "heads": heads}
    model_config = config.TokenizerModelConfig(
        image_size=size,
        frames=frames,
        encoder=config.TransformerConfig(**sizes),
        decoder=config.DecoderConfig(**sizes, head_hidden_dim=4 * width),
    )
    return Tokenizer(model_config)


def dense_attention(q_BHNE, k_BHME, v_BHME, span):
    """Compute `attend` with a dense block-causal mask."""
    frame_N = torch.arange(q_BHNE.shape[2]) // span
    mask_NN = frame_N[:, None] >= frame_N[None, :]
    return F.scaled_dot_product_attention(q_BHNE, k_BHME, v_BHME, attn_mask=mask_NN).transpose(1, 2)


def min_seconds(calls, rounds):
    """Return the minimum time of each call by name; calls alternate, and the first round warms up."""
    seconds = {}
    for number in range(rounds + 1):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            if number:
                seconds[name] = min(seconds.get(name, float("inf")), time.perf_counter() - start)
    return seconds


@pytest.mark.parametrize("size", [64, 128])
def test_framewise_attention_against_dense_mask(size, monkeypatch, record):
    model, clip = build_tokenizer(size=size), torch.rand(1, 3, _T, size, size) * 2 - 1

    def forward(attend):
        monkeypatch.setattr(transformer, "attend", attend)
        with torch.no_grad():
            model(clip)

    def forward_and_backward(attend):
        monkeypatch.setattr(transformer, "attend", attend)
        output = model(clip)
        (output.images.abs().mean() + output.quantized.loss).backward()

    ways = {"frame by frame": transformer.attend, "dense": dense_attention}
    for name, call in (("forward", forward), ("backward", forward_and_backward)):
        calls = {way: lambda attend=attend, call=call: call(attend) for way, attend in ways.items()}
        seconds = min_seconds(calls, 4)
        rates = {way: 1 / seconds[way] for way in ways}
        record(
            "video-attention-cpu",
            f"{size}-{name}",
            clips_per_s=rates["frame by frame"],
            dense_clips_per_s=rates["dense"],
            speedup=rates["frame by frame"] / rates["dense"],
        )


@pytest.mark.parametrize("chunk", [1, 4])
def test_streaming_against_one_pass(chunk, record):
    model = build_tokenizer().eval()
    clip = torch.rand(1, 3, 4 * _T, _SIZE, _SIZE) * 2 - 1
    tokens = model.encode(clip[:, :, :_T])

    def pieces(frames):
        return clip[:, :, :frames].split(chunk, 2)

    streamed = list(model.encode_stream(pieces(4 * _T)))
    calls = {
        "encode": {
            "one pass": lambda: model.encode(clip[:, :, :_T]),
            "streamed": lambda: list(model.encode_stream(pieces(_T))),
        },
        "decode": {
            "one pass": lambda: model.decode(tokens),
            "streamed": lambda: list(model.decode_stream(streamed[: _T // chunk])),
        },
    }
    for name, ways in calls.items():
        seconds = min_seconds(ways, 3)
        one_pass, streamed_fps = _T / seconds["one pass"], _T / seconds["streamed"]
        record("video-streaming-cpu", "one-pass", **{f"{name}_fps": one_pass, f"{name}_ratio": 1.0})
        values = {f"{name}_fps": streamed_fps, f"{name}_ratio": streamed_fps / one_pass}
        record("video-streaming-cpu", f"by-{chunk}", **values)


def _proc_status_kb(name):
    """Return a value of /proc/self/status: VmRSS is the current memory, VmHWM the peak since `clear_refs`."""
    [line] = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(f"{name}:")]
    return int(line.split()[1])


def peak_memory_mb(kind, frames):
    """Return the peak memory of reconstructing a clip, in MB above that of the loaded model."""
    torch.set_num_threads(2)
    model = build_tokenizer(frames if kind == "one pass" else _T).eval()
    # The high-water mark of `resource` is inherited from the parent process.
    Path("/proc/self/clear_refs").write_text("5")
    before = _proc_status_kb("VmRSS")
    if kind == "one pass":
        model.reconstruct(torch.zeros(1, 3, frames, _SIZE, _SIZE))
    else:
        chunks = (torch.zeros(1, 3, _SIZE, _SIZE) for _ in range(frames))
        for _ in model.decode_stream(model.encode_stream(chunks)):
            pass
    return (_proc_status_kb("VmHWM") - before) / 1024


def test_memory_against_clip_length(record):
    for frames in (16, 64, 256):
        memory_mb = {}
        for kind in ("streamed", "one pass"):
            call = (
                f"import sys; sys.path.insert(0, {str(__file__.rsplit('/', 1)[0])!r}); import test_video_speed as t; "
            )
            call += f"print(t.peak_memory_mb({kind!r}, {frames}))"
            done = subprocess.run([sys.executable, "-c", call], capture_output=True, text=True, check=True)
            memory_mb[kind] = float(done.stdout.split()[-1])
        values = {"streamed_mb": memory_mb["streamed"], "one_pass_mb": memory_mb["one pass"]}
        record("video-memory-cpu", str(frames), **values)
