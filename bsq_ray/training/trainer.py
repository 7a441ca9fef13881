"""Training loop, shared by all stages.

    ControlSync.send ─▶ batch ─▶ for each micro-batch and phase: freeze the other modules ─▶ loss ─▶ engine.backward
          ─▶ engine.step ─▶ EMA ─▶ ControlSync.receive ─▶ RunRecorder, CheckpointWriter, EvalLoop

The host enqueues a step while the device computes the previous one: it reads device values one step later, or at steps
that log, save or evaluate.

Independent of Ray: `WorkerContext` provides ranks and collectives, and its reporter receives the records.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Generator, Iterator

import torch

from bsq_ray import config
from bsq_ray.config.batch_split import split_batch
from bsq_ray.data.data_source import Batch
from bsq_ray.data.factory import build_source
from bsq_ray.data.stream import SkippedSamples, training_batches
from bsq_ray.runtime.precision import enable_strict_fp32
from bsq_ray.training.checkpoints.resume import resume_run
from bsq_ray.training.checkpoints.train_state import TrainState
from bsq_ray.training.checkpoints.writer import CheckpointWriter, RunProgress, newest_progress
from bsq_ray.training.control_sync import ControlState, ControlSync
from bsq_ray.training.ema import EMA
from bsq_ray.training.engines.engine import build_engine
from bsq_ray.training.eval_loop import EvalLoop
from bsq_ray.training.export import gather_weights, write_model
from bsq_ray.training.measurement import Measurement
from bsq_ray.training.monitoring.metrics_sinks import check_trackers
from bsq_ray.training.monitoring.throughput import StepTimer
from bsq_ray.training.nonfinite import NonFiniteDetector, PhaseLoss, PhaseResult, nan_gradient_if_nonfinite
from bsq_ray.training.optimizers.build import describe_optimizers
from bsq_ray.training.run_recorder import RunRecorder
from bsq_ray.training.run_spec import RunResult, RunSpec
from bsq_ray.training.scalar_means import ScalarMeans
from bsq_ray.training.schedule import learning_rate, schedule_factor
from bsq_ray.training.stages import Stage, build_stage
from bsq_ray.training.worker_context import ControlSignal, WorkerContext, autocast_precision


def run_training(spec: RunSpec, worker: WorkerContext) -> RunResult:
    """Train until the last step, the time limit or a control signal; resume if `spec.out_url` has a checkpoint.

    Always writes a checkpoint, and a model folder except after a resize signal.

    Raises:
        ValueError: the batch size is not divisible by the number of workers, the data set is missing, or the checkpoint
            belongs to another run.
        NonFiniteLossError: a loss or gradient is not finite; raised on all workers. The message contains step, loss
            term and samples.
        RuntimeError: too many samples cannot be read.
    """
    return Trainer(spec, worker).train()


class Trainer:
    """Builds a run from its specification, and resumes and trains it."""

    def __init__(self, spec: RunSpec, worker: WorkerContext) -> None:
        self.spec, self.worker = spec, worker
        self.training_config = spec.config.training
        check_trackers(self.training_config.trackers)
        self.recorder = RunRecorder(spec, worker)
        self.source = build_source(spec.config, spec.data_url)
        self.micro_batch, self.accumulation_steps = split_batch(spec.config, worker.world_size)
        self.precision = autocast_precision(self.training_config.engine.precision, worker.device)
        self.autocast = torch.autocast(worker.device.type, torch.bfloat16, enabled=self.precision == "bf16")
        enable_strict_fp32()
        torch.manual_seed(self.training_config.seed)
        # A resumed run loads its weights from the checkpoint, not from the initial model.
        has_checkpoint = bool(spec.init_url and self.recorder.retry(lambda: newest_progress(spec.out_url)))
        init_url = None if has_checkpoint else spec.init_url
        self.stage: Stage = build_stage(spec.config, self.source, worker.device, init_url)
        self.main_name = next(iter(self.stage.modules))
        self.nonfinite = NonFiniteDetector(worker.device)
        self.engines = {
            name: build_engine(
                module,
                self.training_config,
                micro_batch=self.micro_batch,
                accumulation_steps=self.accumulation_steps,
                device=worker.device,
                use_bf16=self.precision == "bf16",
                found_nonfinite=self.nonfinite.found,
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
            num_to_keep=self.training_config.keep_checkpoints,
            timeout_s=self.training_config.storage_timeout_s,
            on_published=self._on_checkpoint_published,
        )
        self.control = ControlSync(spec, worker, self.checkpoints)
        self.eval_loop = EvalLoop(
            spec,
            self.stage,
            engines=self.engines,
            source=self.source,
            micro_batch=self.micro_batch,
            autocast=self.autocast,
            precision=self.precision,
            recorder=self.recorder,
            worker=worker,
        )
        self.blocking_seconds = 0.0
        self.measurement: Measurement | None = None
        torch.manual_seed(self.training_config.seed + 1 + worker.rank)
        progress = resume_run(spec, worker, self.source, self.train_state, self.recorder, must_exist=has_checkpoint)
        self.step, self.elapsed = (progress.step, progress.elapsed) if progress else (0, 0.0)
        self.recorder.step = self.step
        self.recorder.open()
        self.skipped = SkippedSamples(spec.config.data.max_skipped_samples)

    def train(self) -> RunResult:
        """Run the training loop; see `run_training`."""
        training_config = self.training_config
        peak_lr = learning_rate(training_config.optimizer, training_config.batch_size)
        self._record_start(peak_lr)
        batches = self._train_batches()
        if self.step == 0:
            # Fail early if evaluation, metric networks or storage do not work.
            self.measurement = self.eval_loop.evaluate("raw")
        scalars = ScalarMeans()
        first_step = logged_step = self.step
        timer = StepTimer(self.elapsed)
        control = ControlState(ControlSignal.CONTINUE, self.control.progress(self.step, self.elapsed))
        should_stop = control.progress >= 1
        while not should_stop:
            self.control.send(timer.elapsed, self.nonfinite.found)
            with timer.data_wait_timer():
                batch = next(batches)
            lr = peak_lr * schedule_factor(training_config.schedule, self.step, training_config.steps, control.progress)
            self.stage.progress = control.progress
            self.train_step(batch, lr, scalars)
            self.step = self.recorder.step = self.step + 1
            self.elapsed = timer.elapsed
            control = self._receive_control()
            should_stop = control.should_stop
            if should_stop or self._reads_device():
                self._raise_if_nonfinite(bool(self.nonfinite.found))
            if self.step % training_config.log_every == 0 or should_stop:
                images_per_second = training_config.batch_size * (self.step - logged_step) / timer.lap()
                logged_step = self.step
                self.recorder.record_data_events(self.skipped)
                self.recorder.record_training(
                    scalars.pop(),
                    self.stage.pop_metrics(),
                    learning_rate=lr,
                    images_per_second=images_per_second,
                    data_wait=timer.data_wait,
                    seconds=self.elapsed,
                    progress=control.progress,
                )
            if self.step % training_config.checkpoint_every == 0 or should_stop:
                self._save_checkpoint()
            if should_stop:
                self.checkpoints.wait()
            with timer.excluded():
                if self.step % training_config.eval_every == 0 and not should_stop:
                    self.measurement = self.eval_loop.evaluate("raw")
                elif self.step % training_config.sample_every == 0 and not should_stop:
                    self.eval_loop.log_samples()
        step_seconds, data_wait = timer.step_seconds, timer.data_wait
        batches.close()
        if control.signal is not ControlSignal.RESIZE or control.progress >= 1:
            self._export()
        self.recorder.close()
        return RunResult(
            step=self.step,
            is_finished=control.progress >= 1,
            duration_s=self.elapsed,
            images_per_second=training_config.batch_size * (self.step - first_step) / step_seconds,
            data_wait_fraction=data_wait,
            skipped_samples=list(self.skipped.samples),
            metrics=dict(self.measurement.metrics) if self.measurement else {},
            measured_on=self.measurement.measured_on if self.measurement else "",
        )

    def train_step(self, batch: Batch, lr: float, scalars: ScalarMeans) -> None:
        """Enqueue one optimizer step per phase of this step, and add its scalars to `scalars`; read no device value.

        From the first loss or gradient on that is not finite, weights and optimizer state do not change.
        """
        losses: dict[str, list[PhaseLoss]] = defaultdict(list)
        batches = list(micro_batches(batch, self.accumulation_steps))
        with self.autocast:
            contexts = self.stage.prepare_step(batches, self.engines, self.step)
        for micro_batch, context in zip(batches, contexts, strict=True):
            for phase in self.stage.phases(self.step):
                engine = self.engines[phase]
                self.stage.select_phase(phase)
                with self.autocast:
                    output = self.stage.loss(phase, micro_batch, self.engines, context, self.step)
                context = output.context
                losses[phase].append(PhaseLoss(output.loss.detach(), output.scalars, micro_batch.keys))
                engine.backward(nan_gradient_if_nonfinite(output.loss))
                grad_norm = engine.step(lr)
                scalars.add(output.scalars)
                if grad_norm is not None:
                    scalars.add({f"grad_norm/{phase}": grad_norm})
                    self.nonfinite.add(PhaseResult(self.step + 1, phase, losses[phase], grad_norm))
        if self.ema is not None:
            with self.engines[self.main_name].gathered_parameters():
                self.ema.update(self.stage.modules[self.main_name])

    def _reads_device(self) -> bool:
        """Return True if the step just taken logs, saves, evaluates or writes sample images."""
        every = self.training_config
        intervals = (every.log_every, every.checkpoint_every, every.eval_every, every.sample_every)
        return any(self.step % interval == 0 for interval in intervals)

    def _raise_if_nonfinite(self, found: bool) -> None:
        """Wait for the checkpoint being written and raise the error, on all workers after the same step."""
        if found:
            self.checkpoints.wait()
            raise self.nonfinite.error(self.spec.out_url, self.worker)

    def _receive_control(self) -> ControlState:
        self._record_checkpoint_warnings()
        control = self.control.receive(self.step, self.elapsed)
        self._raise_if_nonfinite(control.found_nonfinite)
        return control

    def _train_batches(self) -> Generator[Batch, None, None]:
        return training_batches(
            self.source,
            self.spec.config.data,
            batch_size=self.training_config.batch_size,
            rank=self.worker.rank,
            world_size=self.worker.world_size,
            seed=self.training_config.seed,
            position=self.step * self.training_config.batch_size,
            executor=self.worker.executor,
            skipped=self.skipped,
        )

    def _record_start(self, peak_lr: float) -> None:
        self.recorder.record(
            kind="start",
            workers=self.worker.world_size,
            batch_size=self.training_config.batch_size,
            micro_batch_size=self.micro_batch,
            accumulation=self.accumulation_steps,
            learning_rate=peak_lr,
            precision=self.precision,
            optimizer=describe_optimizers(self.stage.modules, self.training_config.optimizer),
            device=str(self.worker.device),
            parameters=sum(value.numel() for value in self.stage.modules[self.main_name].parameters()),
            samples=self.source.num_samples,
            steps=self.training_config.steps,
        )
        for note in (*self.source.notes, *self.stage.notes):
            self.recorder.warn(note)

    def _save_checkpoint(self) -> None:
        """Save a checkpoint asynchronously; block only for the previous checkpoint and the copy to host memory."""
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

    def _record_checkpoint_warnings(self) -> None:
        for message in self.checkpoints.drain_warnings():
            self.recorder.warn(message)

    def _on_checkpoint_published(self, step: int, seconds: float) -> None:
        self._record_checkpoint_warnings()
        self.recorder.record(
            kind="checkpoint", checkpoint=step, seconds=seconds, blocking_seconds=self.blocking_seconds
        )
        self.recorder.flush()

    def _export(self) -> None:
        """Evaluate the final weights (EMA if enabled) and write the model folder."""
        states = gather_weights(self.engines)
        raw = exported = states.pop(self.main_name)
        if self.ema is not None:
            exported = {key: self.ema.average.get(key, value).to(value) for key, value in raw.items()}
            # Training has ended, so the EMA weights can replace the raw weights in the module.
            with self.engines[self.main_name].gathered_parameters(modify=True):
                self.stage.modules[self.main_name].load_state_dict(exported)
        self.measurement = self.eval_loop.evaluate("raw" if self.ema is None else "ema")
        measurement = self.measurement
        if self.worker.is_main:
            card_fields = {"trained on": f"{self.spec.data_url} ({self.source.hash[:12]})", "steps": str(self.step)}
            weights = exported, raw if self.ema else None
            bundled_models = self.stage.bundled_models()
            self.recorder.retry(
                lambda: write_model(
                    self.spec,
                    card_fields=card_fields,
                    measurement=measurement,
                    weights=weights,
                    extra_modules=states,
                    bundled_models=bundled_models,
                )
            )
        self.worker.barrier()


def micro_batches(batch: Batch, num_micro_batches: int) -> Iterator[Batch]:
    """Split a batch with stride `num_micro_batches`.

    Workers split the global batch by stride too. So with equal micro-batch size, each micro-batch has the same samples
    for any number of workers, and the discriminator's minibatch-stddev groups are the same.
    """
    for offset in range(num_micro_batches):
        yield batch.subset(slice(offset, None, num_micro_batches))
