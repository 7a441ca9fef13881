"""Starting a run: what must fit together, training on Ray's workers or in this process, and the summary."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from typing import Any

from bsq_ray import config, storage
from bsq_ray.data.factory import build_source, resolve_tokenizer
from bsq_ray.models.warm_start import initial_weights
from bsq_ray.runtime.ray_session import ray_session
from bsq_ray.runtime.signals import stop_on_signal
from bsq_ray.training.checkpoints.writer import list_checkpoints, newest_progress
from bsq_ray.training.monitoring.console import ProgressLine
from bsq_ray.training.monitoring.summary import RunSummary
from bsq_ray.training.ray_trainer import ResourceBudget, run_on_ray
from bsq_ray.training.run_spec import RunResult, RunSpec, check_resumable, valid_world_sizes
from bsq_ray.training.trainer import run_training
from bsq_ray.training.worker_context import ControlSignal, Device, WorkerContext, local_device


class Interrupted(RuntimeError):
    """The run was asked to stop, and what it did is saved; it can be resumed."""


def train(
    run_config: config.AnyConfig,
    data_url: str,
    out_url: str,
    num_workers: int,
    resume: bool = False,
    address: str | None = None,
    held_out_url: str | None = None,
    minutes: float | None = None,
    device: Device = "auto",
    min_workers: int | None = None,
    max_failures: int = 3,
    init_url: str | None = None,
    on_record: Callable[[dict[str, Any]], None] | None = None,
    stop_event: threading.Event | None = None,
    budget: ResourceBudget = ResourceBudget(),
) -> RunResult:
    """Trains a model and leaves `out_url/model`, checkpoints, logs and pictures; see `loop.Job`.

    Args:
        workers: processes to train with; 0 trains in this process, without Ray.
        resume: go on with the run in `out_url`.
        address: Ray cluster; None starts one on this machine for the time of the run.
        device: what each worker computes on: "gpu", "cpu", or "auto", which takes GPUs where the cluster has any, up or
            still to be brought up by its autoscaler.
        min_workers: the run goes on with as few when there is room for no more, and with more when there is; the global
            batch stays. None always trains with `workers`.
        max_failures: how often lost workers are replaced without a new checkpoint between.
        init_url: folder of a trained tokenizer whose weights a new run begins with.
        show: receives the run's records instead of the progress line.
        stop: asks the run to save and stop when it is set; None lets Ctrl-C and SIGTERM ask.
        share: what the run may take of the cluster.

    Raises:
        ValueError: configuration, data and folder do not fit together; nothing was started.
        Interrupted: it was asked to stop, and has saved.
        RuntimeError: the training failed; the message says why.
    """
    # Workers may run in another folder.
    data_url, out_url = storage.absolute(data_url), storage.absolute(out_url)
    if init_url and storage.exists(init_url):
        # Otherwise it may be a hub id.
        init_url = storage.absolute(init_url)
    run_config = resolve_tokenizer(run_config, data_url)
    spec = RunSpec(run_config, data_url, out_url, held_out_url and storage.absolute(held_out_url), minutes, init_url)
    world_sizes = valid_world_sizes(
        run_config.training, num_workers if min_workers is None else min_workers, num_workers
    )
    _validate(spec, resume)
    storage.write_bytes(storage.join(out_url, "config.yaml"), config.dump_config(run_config).encode())
    summary = RunSummary()
    with _console(on_record) as display:
        record_sink = summary.tracking(display)
        if num_workers == 0:
            with stop_on_signal(stop_event) as stop_requested:
                record_sink({"kind": "place", "step": 0, "out": out_url, "dashboard": ""})
                worker = WorkerContext(0, 1, local_device(device), "local", _LocalReporter(record_sink, stop_requested))
                result: RunResult | None = run_training(spec, worker)
        else:
            with (
                ray_session(address, include_dashboard=True) as dashboard,
                stop_on_signal(stop_event) as stop_requested,
            ):
                record_sink({"kind": "place", "step": 0, "out": out_url, "dashboard": dashboard})
                result = run_on_ray(spec, world_sizes, device, max_failures, record_sink, stop_requested, budget)
        if result is None:
            raise Interrupted("stopped before the workers began; nothing is lost")
        result = summary.complete(result)
        summary_fields = {
            **asdict(result),
            "restarts": len(result.restart_reasons),
            "restart_reasons": result.restart_reasons,
        }
        _write_summary({**summary_fields, "workers": num_workers, "minutes": minutes}, spec, record_sink)
    if not result.finished:
        raise Interrupted(f"stopped after step {result.step}; checkpoint and model are saved in {out_url}")
    return result


def _write_summary(summary_fields: dict[str, Any], spec: RunSpec, on_record: Callable[[dict[str, Any]], None]) -> None:
    write = partial(
        storage.write_bytes, storage.join(spec.out_url, "summary.json"), json.dumps(summary_fields, indent=1).encode()
    )
    timeout_s = spec.config.training.storage_timeout_s
    storage.retry_while_unavailable(
        write, timeout_s, lambda text: on_record({"kind": "warning", "step": 0, "text": text})
    )


def _validate(spec: RunSpec, resume: bool) -> None:
    """What can be known to be wrong before anything is started."""
    if spec.minutes is not None and spec.minutes <= 0:
        raise ValueError(f"minutes {spec.minutes} must be positive")
    source = build_source(spec.config, spec.data_url)
    for data_source in (source, build_source(spec.config, spec.held_out_url) if spec.held_out_url else source):
        if not data_source.num_samples:
            raise ValueError(f"{data_source.url} holds no samples")
    checkpoints = list_checkpoints(spec.out_url)
    if checkpoints and not resume:
        raise ValueError(
            f"{spec.out_url} already holds a run (checkpoint {checkpoints[-1]}); go on with it by --resume, "
            "or choose another --out"
        )
    progress = newest_progress(spec.out_url)
    if progress:
        check_resumable(progress, spec.config, source, spec.out_url)
    elif spec.init_url:
        initial_weights(
            config.require_stage(spec.config, config.TokenizerConfig, "--init: this run").model, spec.init_url
        )


@contextmanager
def _console(on_record: Callable[[dict[str, Any]], None] | None) -> Iterator[Callable[[dict[str, Any]], None]]:
    if on_record is not None:
        yield on_record
        return
    with ProgressLine() as line:
        yield line.show_record


class _LocalReporter:
    def __init__(self, on_record: Callable[[dict[str, Any]], None], stop_event: threading.Event) -> None:
        self.record = on_record
        self._stop_event = stop_event

    def control_signal(self) -> ControlSignal:
        return ControlSignal.STOP if self._stop_event.is_set() else ControlSignal.CONTINUE
