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
from bsq_ray.runtime.precision import whole_fp32
from bsq_ray.storage import Value
from bsq_ray.training.checkpoints.train_state import State
from bsq_ray.training.checkpoints.writer import CheckpointWriter, Progress, load_checkpoint, newest_progress
from bsq_ray.training.ema import EMA
from bsq_ray.training.engines.engine import build_engine
from bsq_ray.training.export import write_model
from bsq_ray.training.monitoring.metrics_log import Log
from bsq_ray.training.monitoring.throughput import Clock
from bsq_ray.training.nonfinite import Loss, non_finite, unlike_numbers
from bsq_ray.training.run_spec import Job, Result, check_same_run, split_batch
from bsq_ray.training.schedule import learning_rate, schedule_factor
from bsq_ray.training.stages import Stage, build_stage
from bsq_ray.training.worker_context import Wish, Worker, autocast_precision

_Sums = dict[str, list[Tensor | float]]


def run(job: Job, worker: Worker) -> Result:
    """Trains until the end, the time limit, or a wish to end before; always leaves a checkpoint, and a model folder
    unless the wish was to make room for others.

    Goes on from the newest whole checkpoint in `job.out_url`, if there is one.

    Raises:
        ValueError: batch and workers do not fit, the data set is missing, or the checkpoint is of another run.
        NonFinite: naming the step, the term and the samples; all workers raise it together.
        RuntimeError: too many samples are damaged.
    """
    return _Run(job, worker).train()


class _Run:
    def __init__(self, job: Job, worker: Worker) -> None:
        self.job, self.worker = job, worker
        self.log: Log | None = None
        self.step = 0
        self.section = job.config.training
        self.source = build_source(job.config, job.data_url)
        self.micro_batch, self.accumulation = split_batch(self.section, worker.world)
        self.precision = autocast_precision(self.section.engine.precision, worker.device)
        whole_fp32()
        torch.manual_seed(self.section.seed)
        # A run that goes on has its weights in the checkpoint.
        self.begun = bool(job.init_url and self._persistently(lambda: newest_progress(job.out_url)))
        init_url = None if self.begun else job.init_url
        self.stage: Stage = build_stage(job.config, self.source, worker.device, init_url)
        self.main = next(iter(self.stage.modules))
        self.engines = {
            name: build_engine(
                module, self.section, self.micro_batch, self.accumulation, worker.device, self.precision == "bf16"
            )
            for name, module in self.stage.modules.items()
        }
        self.ema: EMA | None = None
        if self.section.ema_decay:
            with self.engines[self.main].whole_parameters():
                self.ema = EMA(self.stage.modules[self.main], self.section.ema_decay)
        self.state = State(self.engines, self.ema, worker)
        self.checkpoints = CheckpointWriter(
            job.out_url, worker, self.section.keep_checkpoints, self.section.storage_patience, self._visible
        )
        self.elapsed = 0.0
        self.stall = 0.0
        self.figures: dict[str, float] = {}
        torch.manual_seed(self.section.seed + 1 + worker.rank)
        self._resume()
        self.log = self._persistently(lambda: Log(job.out_url, self.step)) if worker.first else None
        self.damage = SkippedSamples(job.config.data.max_damaged)
        self.damage_told = 0

    def train(self) -> Result:
        section = self.section
        peak = learning_rate(section.optimizer, section.batch_size)
        self._say_start(peak)
        batches = self._batches()
        if self.step == 0:
            # What would fail after an hour fails now: the evaluation, its networks, and writing to the folder.
            self._evaluate("plain")
        sums: _Sums = defaultdict(list)
        first_step = logged_step = self.step
        clock = Clock(self.elapsed)
        wish, progress = self._agree()
        stopped = progress >= 1
        while not stopped:
            with clock.waiting():
                batch = next(batches)
            rate = peak * schedule_factor(section.schedule, self.step, section.steps, progress)
            self._optimise(batch, rate, sums)
            self.step += 1
            self.elapsed = clock.elapsed
            wish, progress = self._agree()
            stopped = wish > Wish.GO_ON or progress >= 1
            if self.step % section.log_every == 0 or stopped:
                speed = section.batch_size * (self.step - logged_step) / clock.lap()
                logged_step = self.step
                self._tell_of_data()
                self._log_training(sums, rate, speed, clock.data_wait, progress)
                sums.clear()
            if self.step % section.checkpoint_every == 0 or stopped:
                self._save()
            if stopped:
                self.checkpoints.finish()
            with clock.aside():
                if self.step % section.evaluate_every == 0 and not stopped:
                    self._evaluate("plain")
                elif self.step % section.sample_every == 0 and not stopped:
                    self._picture()
        stepping, data_wait = clock.stepping, clock.data_wait
        batches.close()
        if wish is not Wish.MAKE_ROOM or progress >= 1:
            self._export()
        if self.log:
            self._persistently(self.log.close)
        return Result(
            step=self.step,
            finished=progress >= 1,
            seconds=self.elapsed,
            images_per_second=section.batch_size * (self.step - first_step) / stepping,
            data_wait=data_wait,
            damaged=list(self.damage.samples),
            figures=dict(self.figures),
        )

    def _optimise(self, batch: Batch, rate: float, sums: _Sums) -> None:
        """One step of every engine whose phase it is."""
        losses: dict[str, list[Loss]] = defaultdict(list)
        for number, micro in enumerate(micro_batches(batch, self.accumulation)):
            carry: dict[str, Any] = {}
            for phase in self.stage.phases(self.step):
                engine = self.engines[phase]
                with self._only(phase):
                    with self._autocast():
                        loss, scalars = self.stage.loss(phase, micro, self.engines, carry, self.step)
                    losses[phase].append(Loss(loss.detach(), scalars, micro.keys))
                    engine.backward(loss)
                    if number == self.accumulation - 1:
                        self._refuse_non_finite(unlike_numbers(losses[phase], self.worker))
                    norm = engine.step(rate)
                for name, value in scalars.items():
                    sums[name].append(value)
                if norm is not None:
                    sums[f"gradient_{phase}"].append(norm)
                    if norm != norm or norm == float("inf"):
                        self._refuse_non_finite((f"the gradient of the {phase}", batch.keys))
        if self.ema is not None:
            with self.engines[self.main].whole_parameters():
                self.ema.update(self.stage.modules[self.main])

    def _refuse_non_finite(self, found: tuple[str, list[str]] | None) -> None:
        """Ends the run if something, seen on these samples, is not finite; all workers find it at the same step."""
        if found:
            self.checkpoints.finish()
            raise non_finite(*found, self.step + 1, self.job.out_url, self.worker)

    def _agree(self) -> tuple[Wish, float]:
        """What is wished, and how far the run is: the first worker decides, so that all do the same.

        Also where all workers notice that the checkpoint being written is a step further.
        """
        wish, progress = Wish.GO_ON, 0.0
        if self.worker.first:
            wish = self.worker.reporter.wish()
            progress = self.step / self.section.steps
            if self.job.minutes is not None:
                progress = max(progress, self.elapsed / (60 * self.job.minutes))
        self._tell_warnings()
        busy = float(self.checkpoints.busy)
        greatest, progress, busy = self.worker.greatest([wish, min(1.0, progress), busy])
        if not busy:
            self.checkpoints.settle()
        return Wish(int(greatest)), progress

    def _batches(self) -> Generator[Batch, None, None]:
        return training_batches(
            self.source,
            self.job.config.data,
            self.section.batch_size,
            self.worker.rank,
            self.worker.world,
            self.section.seed,
            position=self.step * self.section.batch_size,
            executor=self.worker.executor,
            skipped=self.damage,
        )

    def _held_out(self, batches: int) -> Iterator[Batch]:
        """The same held-out images each time; every worker sees all of them, so that no engine waits for another."""
        source = build_source(self.job.config, self.job.held_out_url) if self.job.held_out_url else self.source
        limit = batches * self.micro_batch
        damage, images = SkippedSamples(limit), 0
        for batch in evaluation_batches(source, self.micro_batch, limit, damage):
            images += len(batch.keys)
            yield batch
        if not images:
            raise ValueError(f"{source.url} has no readable image to evaluate on: {damage.samples[-1]}")
        for text in damage.retries:
            self._say(kind="warning", text=text)

    def _evaluate(self, weights: model_folder.Weights) -> None:
        sums: dict[str, float] = defaultdict(float)
        images, picture = 0, None
        with self._autocast():
            for batch in self._held_out(self.section.evaluate_batches):
                figures, pixels = self.stage.evaluate(batch, self.engines)
                picture = pixels if picture is None else picture
                images += len(batch.keys)
                for name, value in figures.items():
                    sums[name] += value * len(batch.keys)
        self.figures = {name: value / images for name, value in sums.items()}
        self._say(kind="evaluation", weights=weights, images=images, **self.figures)
        self._show(picture)

    def _picture(self) -> None:
        with self._autocast():
            for batch in self._held_out(1):
                _, pixels = self.stage.evaluate(batch, self.engines)
                self._show(pixels)

    def _show(self, pixels: Tensor | None) -> None:
        """Writes a picture, which is no reason to wait for storage that is away."""
        if self.log and pixels is not None:
            try:
                self.log.picture(f"step-{self.step:07d}", pixels)
            except storage.StorageUnavailableError as error:
                self._say(kind="warning", text=f"{error}; the picture is left out")

    def _say_start(self, peak: float) -> None:
        self._say(
            kind="start",
            workers=self.worker.world,
            batch_size=self.section.batch_size,
            micro_batch_size=self.micro_batch,
            accumulation=self.accumulation,
            learning_rate=peak,
            precision=self.precision,
            device=str(self.worker.device),
            parameters=sum(value.numel() for value in self.stage.modules[self.main].parameters()),
            samples=self.source.num_samples,
            steps=self.section.steps,
        )
        for note in self.source.notes:
            self._say(kind="warning", text=note)

    def _tell_of_data(self) -> None:
        """What any worker met while it read: damaged samples, not too many of all together, and failing storage."""
        damaged, delays = self.damage.samples[self.damage_told :], self.damage.retries
        [something] = self.worker.greatest([float(len(damaged) + len(delays))])
        if something:
            everyones = self.worker.gather((damaged, delays))
            new = list(dict.fromkeys(text for texts, _ in everyones for text in texts))
            for text in (text for _, texts in everyones for text in texts):
                self._say(kind="warning", text=text)
            if new:
                self._say(kind="damaged", samples=new)
            self.damage.add(new)
        self.damage_told = len(self.damage.samples)
        self.damage.retries.clear()

    def _log_training(self, sums: _Sums, rate: float, speed: float, data_wait: float, progress: float) -> None:
        names = sorted(sums)
        local = [float(torch.stack([torch.as_tensor(v, dtype=torch.float64) for v in sums[n]]).mean()) for n in names]
        figures = dict(zip(names, self.worker.mean(local), strict=True))
        summary = self.stage.summarise()
        figures |= dict(zip(summary, self.worker.mean(list(summary.values())), strict=True))
        self._say(
            kind="training",
            **figures,
            learning_rate=rate,
            images_per_second=speed,
            data_wait=data_wait,
            seconds=self.elapsed,
            progress=progress,
        )

    def _say(self, **record: Any) -> None:
        if not self.worker.first:
            return
        record = {"kind": record.pop("kind"), "step": self.step, **record}
        if self.log:
            self.log.write(record)
        self.worker.reporter.record(record)

    def _save(self) -> None:
        """Begins a checkpoint; the step is held up by the copy, and by the checkpoint before if it is not finished."""
        progress = Progress(
            self.step,
            self.step * self.section.batch_size,
            self.elapsed,
            self.worker.world,
            self.source.hash,
            config.dump_config(self.job.config),
        )
        began = time.monotonic()
        self.checkpoints.finish()
        self.checkpoints.save(progress, self.state.snapshot())
        self.stall = time.monotonic() - began

    def _tell_warnings(self) -> None:
        for text in self.checkpoints.take_warnings():
            self._say(kind="warning", text=text)

    def _visible(self, step: int, seconds: float) -> None:
        self._tell_warnings()
        self._say(kind="checkpoint", checkpoint=step, seconds=seconds, stall=self.stall)
        if self.log:
            with suppress(storage.StorageUnavailableError):
                self.log.flush()

    def _resume(self) -> None:
        worker = self.worker
        with worker.node_folder() as (folder, filler):
            found: tuple[Progress | None, list[str]] = (None, [])
            if worker.rank == filler:
                found = self._persistently(lambda: load_checkpoint(self.job.out_url, folder))
            loaded = worker.gather(found)
            progress, warnings = loaded[filler]
            if progress != loaded[0][0]:
                raise RuntimeError("the machines do not read the same newest checkpoint; is the folder shared by all?")
            for warning in warnings:
                self._say(kind="warning", text=warning)
            if progress is None and self.begun and self.job.init_url:
                raise ValueError(
                    f"no checkpoint in {self.job.out_url} is whole, and the run began with other weights; remove its "
                    f"checkpoints to begin with {self.job.init_url} again"
                )
            if progress is None:
                return
            check_same_run(progress, self.job.config, self.source, self.job.out_url)
            same_world = progress.world == worker.world
            if not same_world and worker.rank == filler:
                self.state.convert(folder)
            worker.barrier()
            self.state.restore(folder, same_world)
            self.step, self.elapsed = progress.step, progress.elapsed

    def _persistently(self, operation: Callable[[], Value]) -> Value:
        """Calls it again while storage is away."""
        return storage.retry_while_unavailable(
            operation, self.section.storage_patience, lambda text: self._say(kind="warning", text=text)
        )

    def _export(self) -> None:
        """Evaluates the averaged weights and writes the model folder."""
        states: dict[str, dict[str, Tensor]] = {}
        for name, engine in self.engines.items():
            with engine.whole_parameters():
                states[name] = {key: value.detach().cpu().clone() for key, value in engine.module.state_dict().items()}
        plain = averaged = states.pop(self.main)
        if self.ema is not None:
            averaged = {key: self.ema.average[key].to(value) for key, value in plain.items()}
            # Training is over, so the engine can show what the averaged weights are worth.
            with self.engines[self.main].whole_parameters(change=True):
                self.stage.modules[self.main].load_state_dict(averaged)
        self._evaluate("plain" if self.ema is None else "ema")
        if self.worker.first:
            facts = {"trained on": f"{self.job.data_url} ({self.source.hash[:12]})", "steps": str(self.step)}
            weights = averaged, plain if self.ema else None
            companions = self.stage.companions()
            self._persistently(lambda: write_model(self.job, facts, self.figures, weights, states, companions))
        self.worker.barrier()

    @contextmanager
    def _only(self, phase: str) -> Iterator[None]:
        """Freezes every module but the one being optimised."""
        for name, module in self.stage.modules.items():
            module.requires_grad_(name == phase)
        yield

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.worker.device.type, torch.bfloat16, enabled=self.precision == "bf16")


def micro_batches(batch: Batch, count: int) -> Iterator[Batch]:
    """Every count-th sample each, as workers take theirs, so that the discriminator's groups stay as they are."""
    for first in range(count):
        yield batch.subset(slice(first, None, count))
