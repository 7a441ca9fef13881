"""Device, presets and timing of the GPU benchmarks.

With GPU_DRY_RUN=1 they run on the CPU with presets shrunk to milliseconds, and nothing is recorded: that shows that the
benchmarks work before a GPU is paid for.
"""

import gc
import os
import statistics
import time
from collections import defaultdict

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from bsq_ray.config import load_config

DRY_RUN = os.environ.get("GPU_DRY_RUN") == "1"
DEVICE = torch.device("cpu") if DRY_RUN else torch.device("cuda", 0)
# The GPU of the plans, for any GPU of the run.
PLANNED_GPU = "h100"
BATCH = 4 if DRY_RUN else 32

_BLOCKS = ("width=32", "layers=1", "heads=2")
_SHRUNK = {
    "tokenizer": [
        "model.image_size=32",
        "model.decoder.head_hidden_dim=32",
        "loss.adversarial.channel_base=256",
        "loss.adversarial.channel_max=16",
        "loss.perceptual_network=alex",
        *(f"model.{part}.{size}" for part in ("encoder", "decoder") for size in _BLOCKS),
    ],
    "token model": ["model.grid=[1,4,4]", *(f"model.{size}" for size in _BLOCKS)],
}
# Groups of kernels by parts of their names, the first match counts.
_KERNEL_GROUPS = {
    "convolution": ("conv", "cudnn", "implicit", "dgrad", "wgrad", "fprop"),
    "attention": ("flash", "fmha", "attention", "efficient"),
    "matrix product": ("gemm", "cutlass", "mm", "nvjet"),
    "low-pass filter": ("blur",),
    "optimizer": ("adam", "multi_tensor"),
    "normalization": ("norm",),
    "reduction": ("reduce", "sum", "mean"),
    "copy": ("copy", "memcpy", "memset", "cat"),
}


def load_gpu_preset(name, *overrides):
    """Load a preset for a GPU; in a dry run shrunk, with the batch size of a dry run."""
    if not DRY_RUN:
        return load_config(name, [*overrides])
    stage = "tokenizer" if load_config(name).stage == "tokenizer" else "token model"
    return load_config(name, [*overrides, f"training.batch_size={BATCH}", *_SHRUNK[stage]])


def autocast(enabled=True):
    return torch.autocast(DEVICE.type, torch.bfloat16, enabled=enabled)


def synchronize():
    if not DRY_RUN:
        torch.cuda.synchronize()


def milliseconds(call, times, warm=3):
    """Return the median time of a call in ms, by GPU events on a GPU."""
    for _ in range(warm):
        call()
    durations = []
    for _ in range(times):
        if DRY_RUN:
            start_s = time.perf_counter()
            call()
            durations.append(1000 * (time.perf_counter() - start_s))
            continue
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        call()
        end.record()
        torch.cuda.synchronize()
        durations.append(start.elapsed_time(end))
    return statistics.median(durations)


def _profile_kernels(call):
    """Return (name, ms) of each kernel of a call; operators in a dry run."""
    activity = ProfilerActivity.CPU if DRY_RUN else ProfilerActivity.CUDA
    with profile(activities=[activity]) as profiled:
        call()
        synchronize()
    kind = DeviceType.CPU if DRY_RUN else DeviceType.CUDA
    events = [event for event in profiled.events() if event.device_type == kind and not event.is_user_annotation]
    return [
        (event.name, (event.self_cpu_time_total if DRY_RUN else event.self_device_time_total) / 1000)
        for event in events
    ]


def busy_milliseconds(call):
    """Return the total time of the GPU kernels of a call, ms."""
    return sum(duration for _, duration in _profile_kernels(call))


def profile_step(call):
    """Return the kernels' ms by group, and the ms after which the host has started all of them."""
    groups = defaultdict(float)
    for name, duration in _profile_kernels(call):
        lowered = name.lower()
        matches = (group for group, parts in _KERNEL_GROUPS.items() if any(part in lowered for part in parts))
        groups[next(matches, "elementwise and other")] += duration
    synchronize()
    start = time.perf_counter()
    call()
    host_ms = 1000 * (time.perf_counter() - start)
    synchronize()
    return dict(groups), host_ms


def with_peak_memory(work):
    """Return the result of `work` and its peak memory in GB; None and 0 if the GPU's memory is insufficient."""
    gc.collect()
    if DRY_RUN:
        return work(), 0.0
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated(DEVICE)
    torch.cuda.reset_peak_memory_stats(DEVICE)
    try:
        result = work()
    except torch.OutOfMemoryError:
        return None, 0.0
    return result, (torch.cuda.max_memory_allocated(DEVICE) - before) / 1e9
