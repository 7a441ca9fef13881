"""The one training loop. Stages differ; schedule, engines, EMA, log, checkpoints and resuming are here.

    batch ─▶ for each micro batch, for each phase: freeze the others ─▶ loss ─▶ engine.backward ─▶ engine.step
          ─▶ EMA ─▶ log, checkpoint, evaluation, pictures

Knows nothing of Ray: `Worker` says who this process is, its reporter whom to tell.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor

from bsq_ray import config, model_folder, storage
from bsq_ray.data.data_source import Batch
from bsq_ray.data.factory import build_source
from bsq_ray.data.stream import SkippedSamples, evaluation_batches, training_batches
from bsq_ray.runtime.precision import strict_fp32
from bsq_ray.storage import Value
from bsq_ray.training.checkpoints.train_state import TrainState
from bsq_ray.training.checkpoints.writer import CheckpointWriter, RunProgress, load_checkpoint, newest_progress
from bsq_ray.training.ema import EMA
from bsq_ray.training.engines.engine import build_engine
from bsq_ray.training.export import write_model
from bsq_ray.training.monitoring.metrics_log import MetricsLog
from bsq_ray.training.monitoring.throughput import StepTimer
from bsq_ray.training.nonfinite import PhaseLoss, find_nonfinite, nonfinite_error
from bsq_ray.training.run_spec import RunResult, RunSpec, check_resumable, split_batch
from bsq_ray.training.schedule import learning_rate, schedule_factor
from bsq_ray.training.stages import Stage, build_stage
from bsq_ray.training.worker_context import ControlSignal, WorkerContext, autocast_precision

_ScalarHistory = dict[str, list[Tensor | float]]


def run_training(spec: RunSpec, worker: WorkerContext) -> RunResult:
    """Trains until the end, the time limit, or a wish to end before; always leaves a checkpoint, and a model folder
    unless the wish was to make room for others.

    Goes on from the newest whole checkpoint in `job.out_url`, if there is one.

    Raises:
        ValueError: batch and workers do not fit, the data set is missing, or the checkpoint is of another run.
        NonFinite: naming the step, the term and the samples; all workers raise it together.
        RuntimeError: too many samples are damaged.
    """
    return Trainer(spec, worker).train()


class Trainer:
    def __init__(self, spec: RunSpec, worker: WorkerContext) -> None:
        self.spec, self.worker = spec, worker
        self.metrics_log: MetricsLog | None = None
        self.step = 0
        self.training_config = spec.config.training
        self.source = build_source(spec.config, spec.data_url)
        self.micro_batch, self.accumulation_steps = split_batch(self.training_config, worker.world_size)
        self.precision = autocast_precision(self.training_config.engine.precision, worker.device)
        strict_fp32()
        torch.manual_seed(self.training_config.seed)
        # A run that goes on has its weights in the checkpoint.
        self.has_checkpoint = bool(spec.init_url and self._retry(lambda: newest_progress(spec.out_url)))
        init_url = None if self.has_checkpoint else spec.init_url
        self.stage: Stage = build_stage(spec.config, self.source, worker.device, init_url)
        self.main_name = next(iter(self.stage.modules))
        self.engines = {
            name: build_engine(
                module,
                self.training_config,
                self.micro_batch,
                self.accumulation_steps,
                worker.device,
                self.precision == "bf16",
            )
            for name, module in self.stage.modules.items()
        }
        self.ema: EMA | None = None
        if self.training_config.ema_decay:
            with self.engines[self.main_name].gathered_parameters():
                self.ema = EMA(self.stage.modules[self.main_name], self.training_config.ema_decay)
        self.train_state = TrainState(self.engines, self.ema, worker)
        self.checkpoints = CheckpointWriter(
            spec.out_url,
            worker,
            self.training_config.keep_checkpoints,
            self.training_config.storage_timeout_s,
            self._on_checkpoint_published,
        )
        self.elapsed = 0.0
        self.blocking_seconds = 0.0
        self.metrics: dict[str, float] = {}
        torch.manual_seed(self.training_config.seed + 1 + worker.rank)
        self._resume()
        self.metrics_log = self._retry(lambda: MetricsLog(spec.out_url, self.step)) if worker.is_main else None
        self.skipped = SkippedSamples(spec.config.data.max_skipped_samples)
        self.num_skips_logged = 0

    def train(self) -> RunResult:
        training_config = self.training_config
        peak_lr = learning_rate(training_config.optimizer, training_config.batch_size)
        self._record_start(peak_lr)
        batches = self._train_batches()
        if self.step == 0:
            # What would fail after an hour fails now: the evaluation, its networks, and writing to the folder.
            self._evaluate("plain")
        scalar_history: _ScalarHistory = defaultdict(list)
        first_step = logged_step = self.step
        timer = StepTimer(self.elapsed)
        signal, progress = self._sync_control()
        should_stop = progress >= 1
        while not should_stop:
            with timer.data_wait_timer():
                batch = next(batches)
            lr = peak_lr * schedule_factor(training_config.schedule, self.step, training_config.steps, progress)
            self.train_step(batch, lr, scalar_history)
            self.step += 1
            self.elapsed = timer.elapsed
            signal, progress = self._sync_control()
            should_stop = signal > ControlSignal.CONTINUE or progress >= 1
            if self.step % training_config.log_every == 0 or should_stop:
                images_per_second = training_config.batch_size * (self.step - logged_step) / timer.lap()
                logged_step = self.step
                self._log_data_events()
                self._log_training(scalar_history, lr, images_per_second, timer.data_wait, progress)
                scalar_history.clear()
            if self.step % training_config.checkpoint_every == 0 or should_stop:
                self._save_checkpoint()
            if should_stop:
                self.checkpoints.wait()
            with timer.excluded():
                if self.step % training_config.eval_every == 0 and not should_stop:
                    self._evaluate("plain")
                elif self.step % training_config.sample_every == 0 and not should_stop:
                    self._log_samples()
        step_seconds, data_wait = timer.step_seconds, timer.data_wait
        batches.close()
        if signal is not ControlSignal.RESIZE or progress >= 1:
            self._export()
        if self.metrics_log:
            self._retry(self.metrics_log.close)
        return RunResult(
            step=self.step,
            finished=progress >= 1,
            seconds=self.elapsed,
            images_per_second=training_config.batch_size * (self.step - first_step) / step_seconds,
            data_wait=data_wait,
            skipped_samples=list(self.skipped.samples),
            metrics=dict(self.metrics),
        )

    def train_step(self, batch: Batch, lr: float, scalar_history: _ScalarHistory) -> None:
        """One step of every engine whose phase it is."""
        losses: dict[str, list[PhaseLoss]] = defaultdict(list)
        for micro_index, micro_batch in enumerate(micro_batches(batch, self.accumulation_steps)):
            context: dict[str, Any] = {}
            for phase in self.stage.phases(self.step):
                engine = self.engines[phase]
                with self._freeze_others(phase):
                    with self._autocast():
                        loss, scalars = self.stage.loss(phase, micro_batch, self.engines, context, self.step)
                    losses[phase].append(PhaseLoss(loss.detach(), scalars, micro_batch.keys))
                    engine.backward(loss)
                    if micro_index == self.accumulation_steps - 1:
                        self._raise_if_nonfinite(find_nonfinite(losses[phase], self.worker))
                    grad_norm = engine.step(lr)
                for name, value in scalars.items():
                    scalar_history[name].append(value)
                if grad_norm is not None:
                    scalar_history[f"gradient_{phase}"].append(grad_norm)
                    if grad_norm != grad_norm or grad_norm == float("inf"):
                        self._raise_if_nonfinite((f"the gradient of the {phase}", batch.keys))
        if self.ema is not None:
            with self.engines[self.main_name].gathered_parameters():
                self.ema.update(self.stage.modules[self.main_name])

    def _raise_if_nonfinite(self, nonfinite: tuple[str, list[str]] | None) -> None:
        """Ends the run if something, seen on these samples, is not finite; all workers find it at the same step."""
        if nonfinite:
            self.checkpoints.wait()
            raise nonfinite_error(*nonfinite, self.step + 1, self.spec.out_url, self.worker)

    def _sync_control(self) -> tuple[ControlSignal, float]:
        """What is wished, and how far the run is: the first worker decides, so that all do the same.

        Also where all workers notice that the checkpoint being written is a step further.
        """
        signal, progress = ControlSignal.CONTINUE, 0.0
        if self.worker.is_main:
            signal = self.worker.reporter.control_signal()
            progress = self.step / self.training_config.steps
            if self.spec.minutes is not None:
                progress = max(progress, self.elapsed / (60 * self.spec.minutes))
        self._log_warnings()
        is_writing = float(self.checkpoints.is_busy)
        max_signal, progress, is_writing = self.worker.all_reduce_max([signal, min(1.0, progress), is_writing])
        if not is_writing:
            self.checkpoints.advance()
        return ControlSignal(int(max_signal)), progress

    def _train_batches(self) -> Generator[Batch, None, None]:
        return training_batches(
            self.source,
            self.spec.config.data,
            self.training_config.batch_size,
            self.worker.rank,
            self.worker.world_size,
            self.training_config.seed,
            position=self.step * self.training_config.batch_size,
            executor=self.worker.executor,
            skipped=self.skipped,
        )

    def _eval_batches(self, num_batches: int) -> Iterator[Batch]:
        """The same held-out images each time; every worker sees all of them, so that no engine waits for another."""
        source = build_source(self.spec.config, self.spec.held_out_url) if self.spec.held_out_url else self.source
        limit = num_batches * self.micro_batch
        skipped, num_images = SkippedSamples(limit), 0
        for batch in evaluation_batches(source, self.micro_batch, limit, skipped):
            num_images += len(batch.keys)
            yield batch
        if not num_images:
            raise ValueError(f"{source.url} has no readable image to evaluate on: {skipped.samples[-1]}")
        for text in skipped.retries:
            self._record(kind="warning", text=text)

    def _evaluate(self, weights: model_folder.WeightsKind) -> None:
        metric_sums: dict[str, float] = defaultdict(float)
        num_images, sample_image = 0, None
        with self._autocast():
            for batch in self._eval_batches(self.training_config.eval_batches):
                metrics, pixels = self.stage.evaluate(batch, self.engines)
                sample_image = pixels if sample_image is None else sample_image
                num_images += len(batch.keys)
                for name, value in metrics.items():
                    metric_sums[name] += value * len(batch.keys)
        self.metrics = {name: value / num_images for name, value in metric_sums.items()}
        self._record(kind="evaluation", weights=weights, images=num_images, **self.metrics)
        self._log_images(sample_image)

    def _log_samples(self) -> None:
        with self._autocast():
            for batch in self._eval_batches(1):
                _, pixels = self.stage.evaluate(batch, self.engines)
                self._log_images(pixels)

    def _log_images(self, pixels: Tensor | None) -> None:
        """Writes a picture, which is no reason to wait for storage that is away."""
        if self.metrics_log and pixels is not None:
            try:
                self.metrics_log.image(f"step-{self.step:07d}", pixels)
            except storage.StorageUnavailableError as error:
                self._record(kind="warning", text=f"{error}; the picture is left out")

    def _record_start(self, peak_lr: float) -> None:
        self._record(
            kind="start",
            workers=self.worker.world_size,
            batch_size=self.training_config.batch_size,
            micro_batch_size=self.micro_batch,
            accumulation=self.accumulation_steps,
            learning_rate=peak_lr,
            precision=self.precision,
            device=str(self.worker.device),
            parameters=sum(value.numel() for value in self.stage.modules[self.main_name].parameters()),
            samples=self.source.num_samples,
            steps=self.training_config.steps,
        )
        for note in self.source.notes:
            self._record(kind="warning", text=note)

    def _log_data_events(self) -> None:
        """What any worker met while it read: damaged samples, not too many of all together, and failing storage."""
        new_skips, retries = self.skipped.samples[self.num_skips_logged :], self.skipped.retries
        [any_rank] = self.worker.all_reduce_max([float(len(new_skips) + len(retries))])
        if any_rank:
            events_by_rank = self.worker.all_gather_object((new_skips, retries))
            skipped_samples = list(dict.fromkeys(text for texts, _ in events_by_rank for text in texts))
            for text in (text for _, texts in events_by_rank for text in texts):
                self._record(kind="warning", text=text)
            if skipped_samples:
                self._record(kind="damaged", samples=skipped_samples)
            self.skipped.add(skipped_samples)
        self.num_skips_logged = len(self.skipped.samples)
        self.skipped.retries.clear()

    def _log_training(
        self, scalar_history: _ScalarHistory, lr: float, images_per_second: float, data_wait: float, progress: float
    ) -> None:
        names = sorted(scalar_history)
        local_means = [
            float(torch.stack([torch.as_tensor(v, dtype=torch.float64) for v in scalar_history[n]]).mean())
            for n in names
        ]
        metrics = dict(zip(names, self.worker.all_reduce_mean(local_means), strict=True))
        stage_metrics = self.stage.pop_metrics()
        metrics |= dict(zip(stage_metrics, self.worker.all_reduce_mean(list(stage_metrics.values())), strict=True))
        self._record(
            kind="training",
            **metrics,
            learning_rate=lr,
            images_per_second=images_per_second,
            data_wait=data_wait,
            seconds=self.elapsed,
            progress=progress,
        )

    def _record(self, **record: Any) -> None:
        if not self.worker.is_main:
            return
        record = {"kind": record.pop("kind"), "step": self.step, **record}
        if self.metrics_log:
            self.metrics_log.write(record)
        self.worker.reporter.record(record)

    def _save_checkpoint(self) -> None:
        """Begins a checkpoint; the step is held up by the copy, and by the checkpoint before if it is not finished."""
        progress = RunProgress(
            self.step,
            self.step * self.training_config.batch_size,
            self.elapsed,
            self.worker.world_size,
            self.source.hash,
            config.dump_config(self.spec.config),
        )
        start = time.monotonic()
        self.checkpoints.wait()
        self.checkpoints.save(progress, self.train_state.snapshot())
        self.blocking_seconds = time.monotonic() - start

    def _log_warnings(self) -> None:
        for text in self.checkpoints.drain_warnings():
            self._record(kind="warning", text=text)

    def _on_checkpoint_published(self, step: int, seconds: float) -> None:
        self._log_warnings()
        self._record(kind="checkpoint", checkpoint=step, seconds=seconds, stall=self.blocking_seconds)
        if self.metrics_log:
            with suppress(storage.StorageUnavailableError):
                self.metrics_log.flush()

    def _resume(self) -> None:
        worker = self.worker
        with worker.node_local_dir() as (folder, owner_rank):
            local_result: tuple[RunProgress | None, list[str]] = (None, [])
            if worker.rank == owner_rank:
                local_result = self._retry(lambda: load_checkpoint(self.spec.out_url, folder))
            results_by_rank = worker.all_gather_object(local_result)
            progress, warnings = results_by_rank[owner_rank]
            if progress != results_by_rank[0][0]:
                raise RuntimeError("the machines do not read the same newest checkpoint; is the folder shared by all?")
            for warning in warnings:
                self._record(kind="warning", text=warning)
            if progress is None and self.has_checkpoint and self.spec.init_url:
                raise ValueError(
                    f"no checkpoint in {self.spec.out_url} is whole, and the run began with other weights; remove its "
                    f"checkpoints to begin with {self.spec.init_url} again"
                )
            if progress is None:
                return
            check_resumable(progress, self.spec.config, self.source, self.spec.out_url)
            same_world_size = progress.world == worker.world_size
            if not same_world_size and worker.rank == owner_rank:
                self.train_state.to_universal(folder)
            worker.barrier()
            self.train_state.restore(folder, same_world_size)
            self.step, self.elapsed = progress.step, progress.elapsed

    def _retry(self, operation: Callable[[], Value]) -> Value:
        """Calls it again while storage is away."""
        return storage.retry_while_unavailable(
            operation, self.training_config.storage_timeout_s, lambda text: self._record(kind="warning", text=text)
        )

    def _export(self) -> None:
        """Evaluates the averaged weights and writes the model folder."""
        states: dict[str, dict[str, Tensor]] = {}
        for name, engine in self.engines.items():
            with engine.gathered_parameters():
                states[name] = {key: value.detach().cpu().clone() for key, value in engine.module.state_dict().items()}
        raw = published = states.pop(self.main_name)
        if self.ema is not None:
            published = {key: self.ema.average[key].to(value) for key, value in raw.items()}
            # Training is over, so the engine can show what the averaged weights are worth.
            with self.engines[self.main_name].gathered_parameters(modify=True):
                self.stage.modules[self.main_name].load_state_dict(published)
        self._evaluate("plain" if self.ema is None else "ema")
        if self.worker.is_main:
            card_fields = {"trained on": f"{self.spec.data_url} ({self.source.hash[:12]})", "steps": str(self.step)}
            weights = published, raw if self.ema else None
            bundled_models = self.stage.bundled_models()
            self._retry(lambda: write_model(self.spec, card_fields, self.metrics, weights, states, bundled_models))
        self.worker.barrier()

    @contextmanager
    def _freeze_others(self, phase: str) -> Iterator[None]:
        """Freezes every module but the one being optimised."""
        for name, module in self.stage.modules.items():
            module.requires_grad_(name == phase)
        yield

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.worker.device.type, torch.bfloat16, enabled=self.precision == "bf16")


def micro_batches(batch: Batch, num_micro_batches: int) -> Iterator[Batch]:
    """Every count-th sample each, as workers take theirs, so that the discriminator's groups stay as they are."""
    for offset in range(num_micro_batches):
        yield batch.subset(slice(offset, None, num_micro_batches))
