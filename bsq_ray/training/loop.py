"""The one training loop. Stages differ; schedule, engines, EMA, log, checkpoints and resuming are here.

    batch ─▶ for each micro batch, for each phase: freeze the others ─▶ loss ─▶ engine.backward ─▶ engine.step
          ─▶ EMA ─▶ log, checkpoint, evaluation, pictures

Knows nothing of Ray: `Worker` says who this process is, its reporter whom to tell.
"""

from __future__ import annotations

import json
import time
from collections import defaultdict
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from bsq_ray import config, hub, storage
from bsq_ray.data.source import Batch
from bsq_ray.data.sources import open_source
from bsq_ray.data.stream import Damage, evaluation_batches, training_batches
from bsq_ray.training.checkpoint import Progress, load_checkpoint, newest_progress, save_checkpoint
from bsq_ray.training.ema import EMA
from bsq_ray.training.engine import build_engine
from bsq_ray.training.job import Job, NonFinite, Result, check_same_run, split_batch
from bsq_ray.training.log import Log
from bsq_ray.training.schedule import learning_rate, schedule_factor
from bsq_ray.training.stages import Stage, build_stage
from bsq_ray.training.worker import Worker, autocast_precision

_Sums = dict[str, list[Tensor | float]]


def run(job: Job, worker: Worker) -> Result:
    """Trains until the end, the time limit, or a request to stop; always leaves a checkpoint and a model folder.

    Goes on from the newest whole checkpoint in `job.out_url`, if there is one.

    Raises:
        ValueError: batch and workers do not fit, the data set is missing, or the checkpoint is of another run.
        NonFinite: naming the step, the term and the samples; all workers raise it together.
        RuntimeError: too many samples are damaged.
    """
    return _Run(job, worker).train()


@dataclass(frozen=True)
class _Loss:
    """The loss of a phase on one micro batch."""

    total: Tensor
    scalars: dict[str, Tensor]
    keys: list[str]


class _Run:
    def __init__(self, job: Job, worker: Worker) -> None:
        self.job, self.worker = job, worker
        self.log: Log | None = None
        self.section = job.config.training
        self.source = open_source(job.config, job.data_url)
        self.micro_batch, self.accumulation = split_batch(self.section, worker.world)
        self.precision = autocast_precision(self.section.engine.precision, worker.device)
        torch.manual_seed(self.section.seed)
        # A run that goes on has its weights in the checkpoint.
        init_url = None if newest_progress(job.out_url) else job.init_url
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
        self.step = 0
        self.elapsed = 0.0
        self.figures: dict[str, float] = {}
        torch.manual_seed(self.section.seed + 1 + worker.rank)
        self._resume()
        self.log = Log(job.out_url, self.step) if worker.first else None
        self.damage = Damage(job.config.data.max_damaged)

    def train(self) -> Result:
        section = self.section
        peak = learning_rate(section.optimizer, section.batch_size)
        self._say_start(peak)
        batches = self._batches()
        if self.step == 0:
            # What would fail after an hour fails now: the evaluation, its networks, and writing to the folder.
            self._evaluate("plain")
        sums: _Sums = defaultdict(list)
        began, first_step, waited = time.monotonic(), self.step, 0.0
        logged, logged_step = began, self.step
        before = self.elapsed
        _, progress = self._agree()
        stopped = progress >= 1
        while not stopped:
            asked = time.monotonic()
            batch = next(batches)
            waited += time.monotonic() - asked
            rate = peak * schedule_factor(section.schedule, self.step, section.steps, progress)
            self._optimise(batch, rate, sums)
            self.step += 1
            self.elapsed = before + time.monotonic() - began
            stop, progress = self._agree()
            stopped = stop or progress >= 1
            if self.step % section.log_every == 0 or stopped:
                now = time.monotonic()
                speed = section.batch_size * (self.step - logged_step) / (now - logged)
                logged, logged_step = now, self.step
                self._log_training(sums, rate, speed, waited / (now - began), progress)
                sums.clear()
            if self.step % section.checkpoint_every == 0 or stopped:
                self._save()
            if self.step % section.evaluate_every == 0 and not stopped:
                self._evaluate("plain")
            elif self.step % section.sample_every == 0 and not stopped:
                self._picture()
        seconds = max(time.monotonic() - began, 1e-9)
        batches.close()
        self._export()
        if self.log:
            self.log.close()
        return Result(
            step=self.step,
            finished=progress >= 1,
            seconds=self.elapsed,
            images_per_second=section.batch_size * (self.step - first_step) / seconds,
            data_wait=waited / seconds,
            damaged=list(self.damage.found),
            figures=dict(self.figures),
        )

    def _optimise(self, batch: Batch, rate: float, sums: _Sums) -> None:
        """One step of every engine whose phase it is."""
        losses: dict[str, list[_Loss]] = defaultdict(list)
        for number, micro in enumerate(micro_batches(batch, self.accumulation)):
            carry: dict[str, Any] = {}
            for phase in self.stage.phases(self.step):
                engine = self.engines[phase]
                with self._only(phase):
                    with self._autocast():
                        loss, scalars = self.stage.loss(phase, micro, self.engines, carry, self.step)
                    losses[phase].append(_Loss(loss.detach(), scalars, micro.keys))
                    engine.backward(loss)
                    if number == self.accumulation - 1:
                        self._refuse_non_finite(losses[phase])
                    norm = engine.step(rate)
                for name, value in scalars.items():
                    sums[name].append(value)
                if norm is not None:
                    sums[f"gradient_{phase}"].append(norm)
                    if norm != norm or norm == float("inf"):
                        self._stop_on(f"the gradient of the {phase}", batch.keys)
        if self.ema is not None:
            with self.engines[self.main].whole_parameters():
                self.ema.update(self.stage.modules[self.main])

    def _refuse_non_finite(self, losses: list[_Loss]) -> None:
        """Stops all workers together if the loss of any of them is not finite."""
        bad = not bool(torch.isfinite(torch.stack([loss.total for loss in losses])).all())
        [anywhere] = self.worker.greatest([float(bad)])
        if not anywhere:
            return
        found = [loss for loss in losses if not bool(torch.isfinite(loss.total))]
        terms = {
            name for loss in found for name, value in loss.scalars.items() if not bool(torch.isfinite(value).all())
        }
        told = sorted({term for part in self.worker.gather(sorted(terms)) for term in part})
        self._stop_on(f"the loss ({', '.join(told)})", [key for loss in found for key in loss.keys])

    def _stop_on(self, what: str, keys: list[str]) -> None:
        """Every worker comes here at the same step, with the keys it suspects."""
        suspected = [key for part in self.worker.gather(keys) for key in part]
        url = storage.join(self.job.out_url, "nonfinite.json")
        if self.worker.first:
            record = {"step": self.step + 1, "what": what, "keys": suspected}
            storage.write_bytes(url, json.dumps(record, indent=1).encode())
        named = ", ".join(suspected[:4]) + (f" and {len(suspected) - 4} more" if len(suspected) > 4 else "")
        raise NonFinite(
            f"step {self.step + 1}: {what} is not finite; the batch was {named} (all in {url}). The weights were not "
            "changed by it; try a lower training.optimizer.learning_rate_per_256, a training.optimizer.gradient_clip, "
            "or training.engine.precision=fp32"
        )

    def _agree(self) -> tuple[bool, float]:
        """Whether to stop, and how far the run is: the first worker decides, so that all do the same."""
        stop, progress = 0.0, 0.0
        if self.worker.first:
            stop = float(self.worker.reporter.stop_requested())
            progress = self.step / self.section.steps
            if self.job.minutes is not None:
                progress = max(progress, self.elapsed / (60 * self.job.minutes))
        stop, progress = self.worker.greatest([stop, min(1.0, progress)])
        return stop > 0, progress

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
            damage=self.damage,
        )

    def _held_out(self, batches: int) -> Iterator[Batch]:
        """The same held-out images each time; every worker sees all of them, so that no engine waits for another."""
        source = open_source(self.job.config, self.job.held_out_url) if self.job.held_out_url else self.source
        limit = batches * self.micro_batch
        return evaluation_batches(source, self.micro_batch, limit, Damage(limit))

    def _evaluate(self, weights: hub.Weights) -> None:
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
        self._say(kind="evaluation", weights=weights, images=images, **self.figures)
        if self.log and picture is not None:
            self.log.picture(f"step-{self.step:07d}", picture)

    def _picture(self) -> None:
        with self._autocast():
            for batch in self._held_out(1):
                _, pixels = self.stage.evaluate(batch, self.engines)
                if self.log:
                    self.log.picture(f"step-{self.step:07d}", pixels)

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
            samples=self.source.samples,
            steps=self.section.steps,
        )
        for note in self.source.notes:
            self._say(kind="warning", text=note)

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
        progress = Progress(
            self.step,
            self.step * self.section.batch_size,
            self.elapsed,
            self.worker.world,
            self.source.hash,
            config.dump_config(self.job.config),
        )
        began = time.monotonic()
        save_checkpoint(self.job.out_url, progress, self.worker, self._write, self.section.keep_checkpoints)
        self._say(kind="checkpoint", seconds=time.monotonic() - began)
        if self.log:
            self.log.flush()

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
        worker = self.worker
        with worker.node_folder() as (folder, filler):
            found = load_checkpoint(self.job.out_url, folder) if worker.rank == filler else (None, [])
            loaded = worker.gather(found)
            progress, warnings = loaded[filler]
            if progress != loaded[0][0]:
                raise RuntimeError("the machines do not read the same newest checkpoint; is the folder shared by all?")
            for warning in warnings:
                self._say(kind="warning", text=warning)
            if progress is None:
                return
            check_same_run(progress, self.job.config, self.source, self.job.out_url)
            same_world = progress.world == worker.world
            if not same_world and worker.rank == filler:
                for name, engine in self.engines.items():
                    engine.convert(folder / name)
            worker.barrier()
            for name, engine in self.engines.items():
                engine.load(folder / name, same_world)
            if self.ema is not None:
                self.ema.load_state_dict(safetensors.torch.load_file(folder / "ema.safetensors"))
            if same_world:
                self._restore_generators(folder / f"rng-{worker.rank}.pt")
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
                states[name] = {key: value.detach().cpu().clone() for key, value in engine.module.state_dict().items()}
        plain = averaged = states.pop(self.main)
        if self.ema is not None:
            averaged = {key: self.ema.average[key].to(value) for key, value in plain.items()}
            # Training is over, so the engine can show what the averaged weights are worth.
            with self.engines[self.main].whole_parameters(change=True):
                self.stage.modules[self.main].load_state_dict(averaged)
        self._evaluate("plain" if self.ema is None else "ema")
        if self.worker.first:
            url = storage.join(self.job.out_url, "model")
            facts = {"trained on": f"{self.job.data_url} ({self.source.hash[:12]})", "steps": str(self.step)}
            facts |= {"initialised from": self.job.init_url} if self.job.init_url else {}
            text = config.dump_config(self.job.config)
            hub.write_model_folder(url, text, averaged, plain if self.ema else None, self.figures, facts)
            for name, state in states.items():
                storage.write_bytes(storage.join(url, f"{name}.safetensors"), safetensors.torch.save(state))
            for name, companion in self.stage.companions().items():
                storage.copy_folder(companion, storage.join(url, name))
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
        yield batch.part(slice(first, None, count))
