"""Clips: attention frame by frame against a dense mask, streaming against one pass, and memory against length.

Width 256, 4 + 4 layers, 64 px, 16 frames: 64 tokens a frame, 1,024 a clip. The neighbour is the same model whose
attention computes every pair under a block-causal mask. One pass over more frames than 16 needs a model of as many.
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
    section = config.TokenizerModelConfig(
        image_size=size,
        frames=frames,
        encoder=config.TransformerConfig(**sizes),
        decoder=config.DecoderConfig(**sizes, head_hidden_dim=4 * width),
    )
    return Tokenizer(section)


def dense_attention(q_BHNE, k_BHME, v_BHME, span):
    """`attend` as a mask says it."""
    frame_N = torch.arange(q_BHNE.shape[2]) // span
    mask_NN = frame_N[:, None] >= frame_N[None, :]
    return F.scaled_dot_product_attention(q_BHNE, k_BHME, v_BHME, attn_mask=mask_NN).transpose(1, 2)


def min_seconds(calls, rounds):
    """Of each named call, in turns, so that what else the machine does falls on all; a first turn is left out."""
    seconds = {}
    for number in range(rounds + 1):
        for name, call in calls.items():
            began = time.perf_counter()
            call()
            if number:
                seconds[name] = min(seconds.get(name, float("inf")), time.perf_counter() - began)
    return seconds


@pytest.mark.parametrize("size", [64, 128])
def test_framewise_attention_against_dense_mask(size, monkeypatch, record_measurement):
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
    for what, call in (("forward", forward), ("forward + backward", forward_and_backward)):
        calls = {name: lambda attend=attend, call=call: call(attend) for name, attend in ways.items()}
        seconds = min_seconds(calls, 4)
        ours, theirs = (1 / seconds[name] for name in ways)
        what = f"causal video model, {_T} frames of {size} px ({_T * (size // 8) ** 2:,} tokens), {what}"
        record_measurement(what, f"{ours:.3g} clips/s", f"dense mask {theirs:.3g}: {ours / theirs:.2f} x")


@pytest.mark.parametrize("chunk", [1, 4, _T])
def test_streaming_against_one_pass(chunk, record_measurement):
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
            "long": lambda: list(model.encode_stream(pieces(4 * _T))),
        },
        "decode": {
            "one pass": lambda: model.decode(tokens),
            "streamed": lambda: list(model.decode_stream(streamed[: _T // chunk])),
            "long": lambda: list(model.decode_stream(streamed)),
        },
    }
    for name, ways in calls.items():
        seconds = min_seconds(ways, 3)
        whole, part, long = _T / seconds["one pass"], _T / seconds["streamed"], 4 * _T / seconds["long"]
        record_measurement(
            f"{name}, streamed by {chunk} of {_SIZE} px",
            f"{part:.3g} frames/s; {4 * _T} frames in moving windows {long:.3g}",
            f"one pass {whole:.3g}: {part / whole:.2f} x, {long / whole:.2f} x",
        )


def _proc_status_kb(name):
    """A line of what Linux knows of this process: VmRSS now, VmHWM the most since `clear_refs`."""
    [line] = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(f"{name}:")]
    return int(line.split()[1])


def peak_memory_mb(kind, frames):
    """Peak memory, MB above that of the loaded model, of reconstructing a clip of so many frames."""
    torch.set_num_threads(2)
    model = build_tokenizer(frames if kind == "one pass" else _T).eval()
    # Not `resource`: its high-water mark is inherited from the process that started this one.
    Path("/proc/self/clear_refs").write_text("5")
    before = _proc_status_kb("VmRSS")
    if kind == "one pass":
        model.reconstruct(torch.zeros(1, 3, frames, _SIZE, _SIZE))
    else:
        chunks = (torch.zeros(1, 3, _SIZE, _SIZE) for _ in range(frames))
        for _ in model.decode_stream(model.encode_stream(chunks)):
            pass
    return (_proc_status_kb("VmHWM") - before) / 1024


def test_memory_against_clip_length(record_measurement):
    for frames in (16, 64, 256):
        memory_mb = {}
        for kind in ("streamed", "one pass"):
            call = (
                f"import sys; sys.path.insert(0, {str(__file__.rsplit('/', 1)[0])!r}); import test_video_speed as t; "
            )
            call += f"print(t.peak({kind!r}, {frames}))"
            done = subprocess.run([sys.executable, "-c", call], capture_output=True, text=True, check=True)
            memory_mb[kind] = float(done.stdout.split()[-1])
        what = f"memory beside the model, encoding and decoding {frames} frames of {_SIZE} px"
        record_measurement(what, f"{memory_mb['streamed']:.0f} MB streamed", f"one pass {memory_mb['one pass']:.0f} MB")
