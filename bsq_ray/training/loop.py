"""The one training loop. Stages differ; schedule, engines, EMA, log, checkpoints and resuming are here.

    batch ─▶ for each micro batch, for each phase: freeze the others ─▶ loss ─▶ engine.backward ─▶ engine.step
          ─▶ EMA ─▶ log, pictures, evaluation, checkpoint

Knows nothing of Ray: `Worker` says who this process is, its reporter whom to tell.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections import defaultdict
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from bsq_ray import config, hub, storage
from bsq_ray.data.manifest import Manifest, read_manifest
from bsq_ray.data.stream import Batch, Damage, evaluation_batches, training_batches
from bsq_ray.training.checkpoint import Progress, load_checkpoint, save_checkpoint
from bsq_ray.training.ema import EMA
from bsq_ray.training.engine import build_engine
from bsq_ray.training.log import Log
from bsq_ray.training.schedule import learning_rate, schedule_factor
from bsq_ray.training.stages import Stage, build_stage
from bsq_ray.training.worker import Worker, autocast_precision


@dataclass(frozen=True)
class Job:
    """What to train, on what, and where the results go.

    Attributes:
        config: the run's configuration.
        data_url: packed training images.
        out_url: folder of the run.
        held_out_url: packed images for the evaluations along the way; None takes training images.
        minutes: time limit of the training; the schedule then follows the clock. None trains all steps.
    """

    config: config.TokenizerConfig
    data_url: str
    out_url: str
    held_out_url: str | None = None
    minutes: float | None = None


@dataclass
class Result:
    """How a run, or a part of it, ended.

    Attributes:
        step: steps taken.
        finished: whether it came to its end, rather than being asked to stop.
        seconds: time in training steps over all parts of the run.
        images_per_second: of this part, all workers together.
        data_wait: share of this part's time spent waiting for data, 0 to 1.
        damaged: samples that could not be read, as this worker saw them.
        figures: the last evaluation.
    """

    step: int
    finished: bool
    seconds: float
    images_per_second: float
    data_wait: float
    damaged: list[str] = field(default_factory=list)
    figures: dict[str, float] = field(default_factory=dict)


class NonFinite(RuntimeError):
    """A loss or gradient that is not a finite number; the weights were not touched by it."""


def run(job: Job, worker: Worker) -> Result:
    """Trains until the end, the time limit, or a request to stop; always leaves a checkpoint and a model folder.

    Goes on from the newest whole checkpoint in `job.out_url`, if there is one.

    Raises:
        ValueError: batch and workers do not fit, the data set is missing, or the checkpoint is of another run.
        NonFinite: naming the step, the term and the samples.
        RuntimeError: too many samples are damaged.
    """
    return _Run(job, worker).train()


class _Run:
    def __init__(self, job: Job, worker: Worker) -> None:
        self.job, self.worker = job, worker
        self.log: Log | None = None
        self.section = job.config.training
        self.manifest = read_manifest(job.data_url)
        self.micro_batch, self.accumulation = split_batch(self.section, worker.world)
        self.precision = autocast_precision(self.section.engine.precision, worker.device)
        torch.manual_seed(self.section.seed)
        self.stage: Stage = build_stage(job.config, worker.device)
        self.main = next(iter(self.stage.modules))
        self.engines = {
            name: build_engine(module, self.section, self.micro_batch, self.accumulation, worker.device)
            for name, module in self.stage.modules.items()
        }
        self.ema: EMA | None = None
        if self.section.ema_decay:
            with self.engines[self.main].whole_parameters():
                self.ema = EMA(self.stage.modules[self.main], self.section.ema_decay)
        self.step = 0
        self.elapsed = 0.0
        self.figures: dict[str, float] = {}
        torch.manual_seed(self.section.seed + 1 + worker.rank)
        self._resume()
        self.log = Log(job.out_url, self.step) if worker.first else None
        self.damage = Damage(job.config.data.max_damaged)

    def train(self) -> Result:
        section, worker = self.section, self.worker
        rate = learning_rate(section.optimizer, section.batch_size)
        self._say(
            kind="start",
            workers=worker.world,
            batch_size=section.batch_size,
            micro_batch_size=self.micro_batch,
            accumulation=self.accumulation,
            learning_rate=rate,
            precision=self.precision,
            device=str(worker.device),
            parameters=sum(p.numel() for p in self.stage.modules[self.main].parameters()),
            samples=self.manifest.samples,
            steps=section.steps,
        )
        if self.step == 0:
            # What would fail after an hour fails now: the evaluation, its networks, and writing to the folder.
            self._evaluate()
        batches = self._batches()
        sums: dict[str, list[Tensor | float]] = defaultdict(list)
        began, first_step, waited = time.monotonic(), self.step, 0.0
        logged = began
        before = self.elapsed
        finished = stopped = self._progress() >= 1
        while not stopped:
            asked = time.monotonic()
            batch = next(batches)
            waited += time.monotonic() - asked
            stop_wanted = worker.first and worker.reporter.stop_requested()
            [stop, progress] = worker.greatest([float(stop_wanted), self._progress() if worker.first else 0.0])
            factor = schedule_factor(section.schedule, self.step, section.steps, progress)
            self._optimise(batch, rate * factor, sums)
            self.step += 1
            self.elapsed = before + time.monotonic() - began
            [clock] = worker.greatest([self._progress() if worker.first else 0.0])
            finished = clock >= 1
            stopped = finished or bool(stop)
            if self.step % section.log_every == 0 or stopped:
                now = time.monotonic()
                speed = section.batch_size * len(sums["loss"]) / self.accumulation / (now - logged)
                logged = now
                self._log_training(sums, rate * factor, speed, waited / (now - began), clock)
                sums.clear()
            if self.step % section.evaluate_every == 0 or stopped:
                self._evaluate()
            elif self.step % section.sample_every == 0:
                self._picture()
            if self.step % section.checkpoint_every == 0 or stopped:
                self._save()
        seconds = max(time.monotonic() - began, 1e-9)
        batches.close()
        self._export()
        if self.log:
            self.log.close()
        speed = section.batch_size * (self.step - first_step) / seconds
        return Result(
            self.step, finished, self.elapsed, speed, waited / seconds, list(self.damage.found), dict(self.figures)
        )

    def _optimise(self, batch: Batch, rate: float, sums: dict[str, list[Tensor | float]]) -> None:
        phases = self.stage.phases(self.step)
        norms: dict[str, float | None] = {}
        for micro in _micro_batches(batch, self.micro_batch):
            carry: dict[str, Any] = {}
            for phase in phases:
                with self._only(phase), self._autocast():
                    loss, scalars = self.stage.loss(phase, micro, self.engines, carry, self.step)
                    self._refuse_non_finite(loss, scalars, micro)
                    self.engines[phase].backward(loss)
                    norms[phase] = self.engines[phase].step(rate)
                for name, value in scalars.items():
                    sums[name].append(value)
        for phase, norm in norms.items():
            if norm is not None:
                sums[f"gradient_{phase}"].append(norm)
                if not torch.isfinite(torch.tensor(norm)):
                    self._stop_on(f"the gradient of the {phase}", batch.keys)
        if self.ema is not None:
            with self.engines[self.main].whole_parameters():
                self.ema.update(self.stage.modules[self.main])

    def _refuse_non_finite(self, loss: Tensor, scalars: dict[str, Tensor], batch: Batch) -> None:
        bad = not bool(torch.isfinite(loss.detach()))
        [anywhere] = self.worker.greatest([float(bad)])
        if not anywhere:
            return
        terms = [name for name, value in scalars.items() if not bool(torch.isfinite(value))]
        self._stop_on(f"the loss ({', '.join(terms) or 'its sum'})" if bad else "another worker's loss", batch.keys)

    def _stop_on(self, what: str, keys: list[str]) -> None:
        """Every worker comes here at the same step."""
        everyone = [key for part in self.worker.gather(keys) for key in part]
        if self.worker.first:
            record = {"step": self.step, "what": what, "keys": everyone}
            storage.write_bytes(storage.join(self.job.out_url, "nonfinite.json"), json.dumps(record, indent=1).encode())
        named = ", ".join(everyone[:4]) + (f" and {len(everyone) - 4} more" if len(everyone) > 4 else "")
        raise NonFinite(
            f"step {self.step}: {what} is not finite; the batch was {named} (all in "
            f"{storage.join(self.job.out_url, 'nonfinite.json')}). The last checkpoint is untouched; try a lower "
            "training.optimizer.learning_rate_per_256, a training.optimizer.gradient_clip, or precision=fp32"
        )

    def _progress(self) -> float:
        share = self.step / self.section.steps
        if self.job.minutes is not None:
            share = max(share, self.elapsed / (60 * self.job.minutes))
        return min(1.0, share)

    def _batches(self) -> Generator[Batch, None, None]:
        run = self.job.config
        return training_batches(
            self.manifest,
            run.data,
            run.model.image_size,
            self.section.batch_size,
            self.worker.rank,
            self.worker.world,
            self.section.seed,
            position=self.step * self.section.batch_size,
            executor=self.worker.executor,
            damage=self.damage,
        )

    def _held_out(self, batches: int) -> Iterator[Batch]:
        """The same held-out images each time; every worker sees all of them, so that no engine waits for another."""
        run = self.job.config
        manifest: Manifest = self.manifest
        if self.job.held_out_url is not None:
            manifest = read_manifest(self.job.held_out_url)
        size = max(1, self.section.batch_size // self.worker.world)
        limit = batches * size
        return evaluation_batches(
            manifest, run.model.image_size, run.data.evaluation_filter, size, limit=limit, damage=Damage(limit)
        )

    def _evaluate(self) -> None:
        sums: dict[str, float] = defaultdict(float)
        images, picture = 0, None
        with self._autocast():
            for batch in self._held_out(self.section.evaluate_batches):
                figures, pixels = self.stage.evaluate(batch, self.engines)
                picture = pixels if picture is None else picture
                images += len(batch.keys)
                for name, value in figures.items():
                    sums[name] += value * len(batch.keys)
        if not images:
            raise ValueError(f"{self.job.held_out_url or self.job.data_url} has no readable image to evaluate on")
        self.figures = {name: value / images for name, value in sums.items()}
        self._say(kind="evaluation", images=images, **self.figures)
        if self.log and picture is not None:
            self.log.picture(f"step-{self.step:07d}", picture)

    def _picture(self) -> None:
        with self._autocast():
            for batch in self._held_out(1):
                _, pixels = self.stage.evaluate(batch, self.engines)
                if self.log:
                    self.log.picture(f"step-{self.step:07d}", pixels)

    def _log_training(
        self, sums: dict[str, list[Tensor | float]], rate: float, speed: float, data_wait: float, progress: float
    ) -> None:
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
        progress = Progress(
            self.step,
            self.step * self.section.batch_size,
            self.elapsed,
            self.worker.world,
            self.manifest.hash,
            config.dump_config(self.job.config),
        )
        began = time.monotonic()
        save_checkpoint(self.job.out_url, progress, self.worker, self._write, self.section.keep_checkpoints)
        if self.log:
            self.log.flush()
        self._say(kind="checkpoint", seconds=time.monotonic() - began)

    def _write(self, folder: Path) -> None:
        for name, engine in self.engines.items():
            engine.save(folder / name)
        generators = {"cpu": torch.get_rng_state()}
        if self.worker.device.type == "cuda":
            generators["cuda"] = torch.cuda.get_rng_state()
        torch.save(generators, folder / f"rng-{self.worker.rank}.pt")
        if self.worker.first and self.ema is not None:
            safetensors.torch.save_file(self.ema.state_dict(), folder / "ema.safetensors")

    def _resume(self) -> None:
        with tempfile.TemporaryDirectory() as scratch:
            warnings: list[str] = []
            progress = load_checkpoint(self.job.out_url, Path(scratch), warnings.append)
            for warning in warnings:
                self._say(kind="warning", text=warning)
            if progress is None:
                return
            check_same_run(progress, self.job.config, self.manifest, self.job.out_url)
            folder = Path(scratch) / "checkpoint"
            for name, engine in self.engines.items():
                engine.load(folder / name, progress.world == self.worker.world)
            if self.ema is not None:
                self.ema.load_state_dict(safetensors.torch.load_file(folder / "ema.safetensors"))
            if progress.world == self.worker.world:
                self._restore_generators(folder / f"rng-{self.worker.rank}.pt")
            self.step, self.elapsed = progress.step, progress.elapsed

    def _restore_generators(self, path: Path) -> None:
        generators = torch.load(path, weights_only=True)
        torch.set_rng_state(generators["cpu"])
        if self.worker.device.type == "cuda" and "cuda" in generators:
            torch.cuda.set_rng_state(generators["cuda"])

    def _export(self) -> None:
        """Writes the model folder: averaged weights, plain ones beside, and the other modules of the stage."""
        states: dict[str, dict[str, Tensor]] = {}
        for name, engine in self.engines.items():
            with engine.whole_parameters():
                if self.worker.first:
                    states[name] = {key: value.detach().cpu() for key, value in engine.module.state_dict().items()}
        if self.worker.first:
            url = storage.join(self.job.out_url, "model")
            plain = states.pop(self.main)
            averaged = {key: self.ema.average[key].to(value) for key, value in plain.items()} if self.ema else plain
            facts = {"trained on": f"{self.job.data_url} ({self.manifest.hash[:12]})", "steps": str(self.step)}
            text = config.dump_config(self.job.config)
            hub.write_model_folder(url, text, averaged, plain if self.ema else None, self.figures, facts)
            for name, state in states.items():
                data = safetensors.torch.save({key: value.contiguous() for key, value in state.items()})
                storage.write_bytes(storage.join(url, f"{name}.safetensors"), data)
        self.worker.barrier()

    @contextmanager
    def _only(self, phase: str) -> Iterator[None]:
        """Freezes every module but the one being optimised."""
        for name, module in self.stage.modules.items():
            module.requires_grad_(name == phase)
        yield

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.worker.device.type, torch.bfloat16, enabled=self.precision == "bf16")


def split_batch(section: config.Training, world: int) -> tuple[int, int]:
    """Micro batch and number of accumulations that make up each worker's share of the global batch.

    Raises:
        ValueError: the numbers do not divide; the message says what to change.
    """
    if section.batch_size % world:
        raise ValueError(
            f"training.batch_size {section.batch_size} cannot be shared evenly by {world} workers; "
            f"choose a multiple of {world} or another number of workers"
        )
    share = section.batch_size // world
    micro = min(section.micro_batch_size or share, share)
    if share % micro:
        raise ValueError(
            f"each of {world} workers takes {share} of {section.batch_size} images, which is not a multiple of "
            f"training.micro_batch_size {micro}"
        )
    return micro, share // micro


def check_same_run(progress: Progress, run: config.TokenizerConfig, manifest: Manifest, out_url: str) -> None:
    """Refuses to go on with a checkpoint of another model, another data set or another order of the data."""
    if progress.dataset != manifest.hash:
        raise ValueError(
            f"{out_url} was trained on another data set (hash {progress.dataset[:12]}, {manifest.url} has "
            f"{manifest.hash[:12]}); give the same --data, or another --out"
        )
    before = config.parse_config(progress.config, f"the checkpoint in {out_url}").model_dump()
    now = run.model_dump()
    decisive = {"model": None, "training": ("batch_size", "seed", "engine"), "data": ("lanes", "shuffle_window")}
    different = []
    for section, keys in decisive.items():
        for key in keys or now[section]:
            if before[section][key] != now[section][key] and key not in ("engine", "gradient_checkpointing"):
                different.append(f"{section}.{key} was {before[section][key]!r} and is {now[section][key]!r}")
    for key in ("kind", "zero_stage"):
        old, new = before["training"]["engine"][key], now["training"]["engine"][key]
        if old != new:
            different.append(f"training.engine.{key} was {old!r} and is {new!r}")
    if different:
        raise ValueError(f"{out_url} holds a run with another configuration: {'; '.join(different)}")


def _micro_batches(batch: Batch, size: int) -> Iterator[Batch]:
    for first in range(0, len(batch.keys), size):
        part = slice(first, first + size)
        yield Batch(batch.images_BCHW[part], batch.labels_B[part], batch.keys[part])
