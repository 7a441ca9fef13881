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
from bsq_ray.training.monitoring.summary import Summary
from bsq_ray.training.ray_trainer import Share, run_on_ray
from bsq_ray.training.run_spec import Job, Result, check_same_run, possible_sizes
from bsq_ray.training.trainer import run
from bsq_ray.training.worker_context import Device, Wish, Worker, local_device


class Interrupted(RuntimeError):
    """The run was asked to stop, and what it did is saved; it can be resumed."""


def train(
    run_config: config.AnyConfig,
    data_url: str,
    out_url: str,
    workers: int,
    resume: bool = False,
    address: str | None = None,
    held_out_url: str | None = None,
    minutes: float | None = None,
    device: Device = "auto",
    min_workers: int | None = None,
    max_failures: int = 3,
    init_url: str | None = None,
    show: Callable[[dict[str, Any]], None] | None = None,
    stop: threading.Event | None = None,
    share: Share = Share(),
) -> Result:
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
    job = Job(run_config, data_url, out_url, held_out_url and storage.absolute(held_out_url), minutes, init_url)
    sizes = possible_sizes(run_config.training, workers if min_workers is None else min_workers, workers)
    _check(job, resume)
    storage.write_bytes(storage.join(out_url, "config.yaml"), config.dump_config(run_config).encode())
    summary = Summary()
    with _display(show) as shown:
        say = summary.heard(shown)
        if workers == 0:
            with stop_on_signal(stop) as asked:
                say({"kind": "place", "step": 0, "out": out_url, "dashboard": ""})
                worker = Worker(0, 1, local_device(device), "local", _LocalReporter(say, asked))
                result: Result | None = run(job, worker)
        else:
            with ray_session(address, dashboard=True) as dashboard, stop_on_signal(stop) as asked:
                say({"kind": "place", "step": 0, "out": out_url, "dashboard": dashboard})
                result = run_on_ray(job, sizes, device, max_failures, say, asked, share)
        if result is None:
            raise Interrupted("stopped before the workers began; nothing is lost")
        result = summary.complete(result)
        facts = {**asdict(result), "restarts": len(result.restarts), "restart_reasons": result.restarts}
        _write_summary({**facts, "workers": workers, "minutes": minutes}, job, say)
    if not result.finished:
        raise Interrupted(f"stopped after step {result.step}; checkpoint and model are saved in {out_url}")
    return result


def _write_summary(facts: dict[str, Any], job: Job, say: Callable[[dict[str, Any]], None]) -> None:
    write = partial(
        storage.write_bytes, storage.join(job.out_url, "summary.json"), json.dumps(facts, indent=1).encode()
    )
    patience = job.config.training.storage_patience
    storage.retry_while_unavailable(write, patience, lambda text: say({"kind": "warning", "step": 0, "text": text}))


def _check(job: Job, resume: bool) -> None:
    """What can be known to be wrong before anything is started."""
    if job.minutes is not None and job.minutes <= 0:
        raise ValueError(f"minutes {job.minutes} must be positive")
    source = build_source(job.config, job.data_url)
    for each in (source, build_source(job.config, job.held_out_url) if job.held_out_url else source):
        if not each.num_samples:
            raise ValueError(f"{each.url} holds no samples")
    checkpoints = list_checkpoints(job.out_url)
    if checkpoints and not resume:
        raise ValueError(
            f"{job.out_url} already holds a run (checkpoint {checkpoints[-1]}); go on with it by --resume, "
            "or choose another --out"
        )
    progress = newest_progress(job.out_url)
    if progress:
        check_same_run(progress, job.config, source, job.out_url)
    elif job.init_url:
        initial_weights(config.expect(job.config, config.TokenizerConfig, "--init: this run").model, job.init_url)


@contextmanager
def _display(show: Callable[[dict[str, Any]], None] | None) -> Iterator[Callable[[dict[str, Any]], None]]:
    if show is not None:
        yield show
        return
    with ProgressLine() as line:
        yield line.show


class _LocalReporter:
    def __init__(self, say: Callable[[dict[str, Any]], None], stop: threading.Event) -> None:
        self.record = say
        self._stop = stop

    def wish(self) -> Wish:
        return Wish.STOP if self._stop.is_set() else Wish.GO_ON
