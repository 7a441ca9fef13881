"""Start a training run: validate its input, train on Ray or in this process, write the summary.

train ─▶ RunSpec ─▶ validate ─┬─ num_workers > 0 ─▶ ray_trainer.run_on_ray ─┬─▶ RunResult ─▶ summary.json
                              └─ num_workers = 0 ─▶ trainer.run_training   ─┘
"""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from typing import Any

from bsq_ray import config, model_folder, storage
from bsq_ray.config.batch_split import check_discriminator_groups, split_batch, valid_world_sizes
from bsq_ray.data.batch_mixture import BatchMixtureSource
from bsq_ray.data.factory import build_source, resolve_tokenizer
from bsq_ray.data.mixture import is_mixture, store_mixture
from bsq_ray.model_ids import KeptTokens, compute_tokens_id
from bsq_ray.models.warm_start import initial_weights
from bsq_ray.runtime.ray_session import ray_session
from bsq_ray.runtime.signals import stop_on_signal
from bsq_ray.training.checkpoints.writer import list_checkpoints, newest_progress
from bsq_ray.training.monitoring.console import ProgressLine
from bsq_ray.training.monitoring.metrics_sinks import check_trackers
from bsq_ray.training.monitoring.summary import RunSummary
from bsq_ray.training.ray_trainer import run_on_ray
from bsq_ray.training.run_spec import RunResult, RunSpec, check_resumable
from bsq_ray.training.stages import find_stage_class
from bsq_ray.training.trainer import run_training
from bsq_ray.training.worker_context import ControlSignal, Device, RecordSink, WorkerContext, local_device
from bsq_ray.training.worker_resources import ResourceBudget


class Interrupted(RuntimeError):
    """A stop request ended the run; its state is saved and it can be resumed."""


def train(
    run_config: config.AnyConfig,
    data_url: str,
    out_url: str,
    num_workers: int,
    *,
    resume: bool = False,
    address: str | None = None,
    held_out_url: str | None = None,
    minutes: float | None = None,
    device: Device = "auto",
    min_workers: int | None = None,
    max_failures: int = 3,
    init_url: str | None = None,
    on_record: RecordSink | None = None,
    stop_event: threading.Event | None = None,
    budget: ResourceBudget = ResourceBudget(),
) -> RunResult:
    """Train a model; write `out_url/model`, checkpoints, logs and sample images. See `run_spec.RunSpec`.

    Args:
        num_workers: number of training processes; 0 trains in this process, without Ray.
        resume: resume the run in `out_url`.
        address: Ray cluster; None starts Ray on this node for the duration of the run.
        device: device of each worker: "gpu", "cpu", or "auto", which uses GPUs if the cluster has any or its autoscaler
            can start some.
        min_workers: smallest number of workers of an elastic run. It shrinks when capacity is lost and grows when there
            is more; the global batch stays the same. None always trains with `num_workers`.
        max_failures: worker failures that are retried in a row, without a new checkpoint between them.
        init_url: folder of a trained tokenizer that provides the initial weights of a new run.
        on_record: receives the run's records; None shows a progress line.
        stop_event: requests that the run saves and stops; None makes Ctrl-C and SIGTERM request it.
        budget: resources of the run on a shared cluster.

    Raises:
        ValueError: configuration, data and folder do not fit together; nothing was started.
        Interrupted: the run was stopped and its state is saved.
        RuntimeError: the training failed; the message states why.
    """
    # Workers may have another working directory.
    data_url, out_url = storage.absolute(data_url), storage.absolute(out_url)
    init_url = init_url and model_folder.absolute_url(init_url)
    run_config = resolve_tokenizer(run_config, data_url)
    spec = RunSpec(run_config, data_url, out_url, held_out_url and storage.absolute(held_out_url), minutes, init_url)
    world_sizes = valid_world_sizes(run_config, num_workers if min_workers is None else min_workers, num_workers)
    spec = _store_mixtures(_validate(spec, world_sizes, resume))
    storage.write_text(storage.join(out_url, "config.yaml"), config.dump_config(run_config))
    summary = RunSummary()
    with _console(on_record) as console:
        record_sink = summary.tracking(console)
        result: RunResult | None
        if num_workers == 0:
            with stop_on_signal(stop_event) as stop_requested:
                result = _train_locally(spec, device, record_sink, stop_requested)
        else:
            with (
                ray_session(address, include_dashboard=True) as dashboard_url,
                stop_on_signal(stop_event) as stop_requested,
            ):
                record_sink({"kind": "place", "step": 0, "out": out_url, "dashboard": dashboard_url})
                result = run_on_ray(
                    spec,
                    world_sizes,
                    device=device,
                    max_failures=max_failures,
                    on_record=record_sink,
                    stop_event=stop_requested,
                    budget=budget,
                )
        if result is None:
            raise Interrupted("stopped before the workers started; nothing is lost")
        result = summary.complete(result)
        _write_summary(result, num_workers, spec, record_sink)
    if not result.is_finished:
        raise Interrupted(f"stopped after step {result.step}; checkpoint and model are saved in {out_url}")
    return result


def _store_mixtures(spec: RunSpec) -> RunSpec:
    """Store the files of mixtures in the run folder, where all workers can read them."""
    data_url, held_out_url = spec.data_url, spec.held_out_url
    if is_mixture(data_url):
        data_url = store_mixture(data_url, storage.join(spec.out_url, "data.yaml"))
    if held_out_url is not None and is_mixture(held_out_url):
        held_out_url = store_mixture(held_out_url, storage.join(spec.out_url, "held-out.yaml"))
    return replace(spec, data_url=data_url, held_out_url=held_out_url)


def _train_locally(spec: RunSpec, device: Device, on_record: RecordSink, stop_event: threading.Event) -> RunResult:
    on_record({"kind": "place", "step": 0, "out": spec.out_url, "dashboard": ""})
    worker = WorkerContext(0, 1, local_device(device), "local", _LocalReporter(on_record, stop_event))
    return run_training(spec, worker)


def _write_summary(result: RunResult, num_workers: int, spec: RunSpec, on_record: RecordSink) -> None:
    """Write summary.json; retry while storage is unavailable."""
    fields = {
        **asdict(result),
        "restarts": len(result.restart_reasons),
        "workers": num_workers,
        "minutes": spec.minutes,
    }
    url = storage.join(spec.out_url, "summary.json")
    storage.retry_while_unavailable(
        lambda: storage.write_text(url, json.dumps(fields, indent=1)),
        spec.config.training.storage_timeout_s,
        lambda text: on_record({"kind": "warning", "step": 0, "text": text}),
    )


def _validate(spec: RunSpec, world_sizes: Sequence[int], resume: bool) -> RunSpec:
    """Check everything that can be known to be wrong before anything is started.

    Args:
        world_sizes: numbers of workers that the run may have.

    Returns:
        The specification with the tokens that the run keeps.

    Raises:
        ValueError: configuration, data and folder do not fit together.
    """
    if spec.minutes is not None and spec.minutes <= 0:
        raise ValueError(f"minutes {spec.minutes} must be positive")
    check_trackers(spec.config.training.trackers)
    find_stage_class(spec.config)
    source = build_source(spec.config, spec.data_url)
    for data_source in (source, build_source(spec.config, spec.held_out_url) if spec.held_out_url else source):
        if not data_source.num_samples:
            raise ValueError(f"{data_source.url} contains no samples")
    # With crop sizes there are no groups to check.
    if isinstance(source, BatchMixtureSource):
        # The numbers of workers are valid for clips, of which the discriminator scores several frames each.
        for world_size in world_sizes:
            check_discriminator_groups(spec.config, split_batch(spec.config, max(1, world_size))[0], frames=1)
    checkpoints = list_checkpoints(spec.out_url)
    if checkpoints and not resume:
        raise ValueError(
            f"{spec.out_url} already contains a run (checkpoint {checkpoints[-1]}); resume it with --resume, "
            "or choose another --out"
        )
    progress = newest_progress(spec.out_url)
    if progress:
        check_resumable(progress, spec.config, source, spec.out_url)
    if isinstance(spec.config, config.TokenizerConfig) and spec.config.training.only == "decoder":
        return replace(spec, kept_tokens=_kept_tokens(spec.config, spec.init_url))
    if not progress and spec.init_url:
        initial_weights(
            config.require_stage(spec.config, config.TokenizerConfig, "--init: this run").model, spec.init_url
        )
    return spec


def _kept_tokens(run_config: config.TokenizerConfig, init_url: str | None) -> KeptTokens:
    """Return the tokens of the model that a training of the decoder starts from.

    Raises:
        ValueError: there is no such model, or the configuration would change its tokens.
    """
    if init_url is None:
        raise ValueError("training.only=decoder keeps the tokens of a trained model; name its folder with --init")
    folder = model_folder.load_model_folder(init_url)
    tokens_id = compute_tokens_id(run_config, initial_weights(run_config.model, init_url))
    if tokens_id is None or tokens_id != folder.tokens_id:
        raise ValueError(
            f"training.only=decoder keeps the tokens of {init_url}, but model.image_size, model.frames or model.causal "
            "differs from that model; use its values"
        )
    return KeptTokens(tokens_id, (folder.model_id, *folder.same_tokens))


@contextmanager
def _console(on_record: RecordSink | None) -> Iterator[RecordSink]:
    """Yield the sink for records: `on_record`, or a progress line."""
    if on_record is not None:
        yield on_record
        return
    with ProgressLine() as line:
        yield line.show_record


class _LocalReporter:
    """Reporter of a run in this process."""

    def __init__(self, on_record: RecordSink, stop_event: threading.Event) -> None:
        self._on_record = on_record
        self._stop_event = stop_event

    def record(self, record: dict[str, Any]) -> None:
        """Report one record of the run."""
        self._on_record(record)

    def control_signal(self) -> ControlSignal:
        """Return STOP once the stop event is set."""
        return ControlSignal.STOP if self._stop_event.is_set() else ControlSignal.CONTINUE
