"""Engines: who holds a module's gradients, optimiser state and their partition over workers.

A stage has an engine for each module it optimises. Two engines in one process are right only in one way: a call of
`engine(...)` is the only one before its `engine.backward(loss)`; a module that is called more than once in a step, or
through which `autograd.grad` runs, is called as `engine.module(...)`; and the graph that an engine goes back through
has no parameters of another engine in it, unless they are frozen.
"""

from __future__ import annotations

import atexit
import logging
import math
import os
import sys
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from bsq_ray import config
from bsq_ray.training.checkpoints.host_snapshot import Files, pickled


class Engine(ABC):
    """A module under optimisation.

    Attributes:
        module: the bare module.
    """

    module: nn.Module

    @abstractmethod
    def __call__(self, *inputs: Tensor) -> Any:
        """The module's forward pass, the one that `backward` belongs to."""

    @abstractmethod
    def backward(self, loss: Tensor) -> None:
        """Accumulates the gradient of this micro batch's loss."""

    @abstractmethod
    def step(self, learning_rate: float) -> float | None:
        """Ends a micro batch; after the last one of a step, averages over workers, clips and optimises.

        Returns:
            The gradient norm before clipping after the last micro batch, else None.
        """

    @abstractmethod
    def snapshot(self) -> Files:
        """A copy of this worker's part of the state, as files; every worker calls it."""

    @abstractmethod
    def convert(self, folder: Path) -> None:
        """Makes the files of all workers loadable for another number of them; one worker of a machine calls it."""

    @abstractmethod
    def load(self, folder: Path, same_world: bool) -> None:
        """Reads the files of `snapshot` by as many workers, or by another number of them and then converted."""

    @contextmanager
    def whole_parameters(self, change: bool = False) -> Iterator[None]:
        """Inside, `module`'s parameters are whole on every worker, whatever the partition; every worker calls it.

        Args:
            change: what the first worker writes into them stays, and all workers have it; the optimiser's own copy
                does not follow, so this is for the end of a training.
        """
        yield


def build_engine(
    module: nn.Module,
    section: config.Training,
    micro_batch: int,
    accumulation: int,
    device: torch.device,
    half: bool = False,
) -> Engine:
    """The engine of a configuration.

    Args:
        module: on `device`, with the same weights on every worker.
        micro_batch: images of one worker's micro batch.
        accumulation: micro batches of a step.
        half: compute in bf16; the weights stay fp32.
    """
    settings = section.optimizer
    optimizer = torch.optim.AdamW(
        sorted(module.parameters(), key=_unaligned),
        lr=settings.learning_rate_per_256,
        betas=settings.betas,
        weight_decay=settings.weight_decay,
        eps=settings.epsilon,
        fused=True,
    )
    if section.engine.kind == "ddp":
        return DataParallelEngine(module, optimizer, settings.gradient_clip, accumulation)
    if half:
        # DeepSpeed switches an outer autocast off around the forward passes of its engines, so it is put inside.
        module.forward = torch.autocast(device.type, torch.bfloat16)(module.forward)
    return DeepSpeedEngine(module, optimizer, section, micro_batch, accumulation, device)


def _unaligned(parameter: Tensor) -> bool:
    """Whether what follows it in ZeRO's flat buffer does not begin at 16 bytes, as compiled kernels expect of it."""
    return parameter.numel() * parameter.element_size() % 16 > 0


class DataParallelEngine(Engine):
    """Plain data parallelism: one all-reduce of all gradients at the end of a step."""

    def __init__(self, module: nn.Module, optimizer: torch.optim.Optimizer, clip: float, accumulation: int) -> None:
        self.module = module
        self.optimizer = optimizer
        self.clip = clip
        self.accumulation = accumulation
        self._micro_batches = 0
        if dist.is_initialized() and dist.get_world_size() > 1:
            for value in module.state_dict().values():
                dist.broadcast(value, 0)

    def __call__(self, *inputs: Tensor) -> Any:
        return self.module(*inputs)

    def backward(self, loss: Tensor) -> None:
        (loss / self.accumulation).backward()

    def step(self, learning_rate: float) -> float | None:
        self._micro_batches += 1
        if self._micro_batches % self.accumulation:
            return None
        parameters = [p for p in self.module.parameters() if p.grad is not None]
        _average_gradients(parameters)
        norm = _gradient_norm(parameters)
        if math.isfinite(norm):
            if 0 < self.clip < norm:
                nn.utils.clip_grads_with_norm_(parameters, self.clip, torch.tensor(norm))
            for group in self.optimizer.param_groups:
                group["lr"] = learning_rate
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return norm

    def snapshot(self) -> Files:
        if dist.is_initialized() and dist.get_rank() > 0:
            return {}
        return {"state.pt": pickled({"module": self.module.state_dict(), "optimizer": self.optimizer.state_dict()})}

    def convert(self, folder: Path) -> None:
        """Nothing to do: the state is the same for any number of workers."""

    def load(self, folder: Path, same_world: bool) -> None:
        state = torch.load(folder / "state.pt", map_location="cpu", weights_only=True)
        self.module.load_state_dict(state["module"])
        self.optimizer.load_state_dict(state["optimizer"])


class DeepSpeedEngine(Engine):
    """DeepSpeed ZeRO 0 to 3 around a module with fp32 weights; half precision comes from autocast around the losses."""

    def __init__(
        self,
        module: nn.Module,
        optimizer: torch.optim.Optimizer,
        section: config.Training,
        micro_batch: int,
        accumulation: int,
        device: torch.device,
    ) -> None:
        # Otherwise it tells on stdout that there is no GPU and no tensor parallelism.
        logging.getLogger("DeepSpeed").addFilter(lambda record: record.levelno > logging.WARNING)
        _choose_accelerator(device)
        import deepspeed

        join_process_group(device)
        self._settings: dict[str, Any] = {
            "train_micro_batch_size_per_gpu": micro_batch,
            "gradient_accumulation_steps": accumulation,
            # Always said: DeepSpeed's own default clips at 1.
            "gradient_clipping": section.optimizer.gradient_clip,
            "zero_optimization": {"stage": section.engine.zero_stage},
            # AdamW of PyTorch steps on the host too; DeepSpeed's own would have to be compiled on every machine.
            "zero_force_ds_cpu_optimizer": False,
            "zero_allow_untested_optimizer": True,
            "steps_per_print": sys.maxsize,
        }
        if section.engine.offload_optimizer:
            pinned = device.type == "cuda"
            self._settings["zero_optimization"]["offload_optimizer"] = {"device": "cpu", "pin_memory": pinned}
        self._stage = section.engine.zero_stage
        self._engine, *_ = deepspeed.initialize(model=module, optimizer=optimizer, config=self._settings)
        self.module = module

    def __call__(self, *inputs: Tensor) -> Any:
        return self._engine(*inputs)

    def backward(self, loss: Tensor) -> None:
        self._engine.backward(loss)

    def step(self, learning_rate: float) -> float | None:
        for group in self._engine.optimizer.param_groups:
            group["lr"] = learning_rate
        last = bool(self._engine.is_gradient_accumulation_boundary())
        norm: float | None = None
        if last and self._stage == 0:
            # Stage 0 does not tell its norm, nor does it stop at one that is not finite.
            norm = _gradient_norm([p for p in self.module.parameters() if p.grad is not None])
            if not math.isfinite(norm):
                return norm
        self._engine.step()
        return norm if norm is not None or not last else float(self._engine.get_global_grad_norm())

    def snapshot(self) -> Files:
        from deepspeed.runtime.checkpoint_engine import TorchCheckpointEngine

        files: Files = {}

        class Copying(TorchCheckpointEngine):
            def save(self, state_dict: Any, path: str) -> None:
                files[Path(path).relative_to(scratch).as_posix()] = pickled(state_dict)

        usual = self._engine.checkpoint_engine
        # DeepSpeed itself only puts small scripts there, for which there is no use here.
        with tempfile.TemporaryDirectory() as scratch:
            self._engine.checkpoint_engine = Copying()
            try:
                self._engine.save_checkpoint(scratch, tag="state")
            finally:
                self._engine.checkpoint_engine = usual
        return files

    def convert(self, folder: Path) -> None:
        if self._stage > 0:
            _make_universal(folder / "state", folder / "universal")

    def load(self, folder: Path, same_world: bool) -> None:
        universal = not same_world and self._stage > 0
        self._engine._config.load_universal_checkpoint = universal
        path, _ = self._engine.load_checkpoint(str(folder), tag="universal" if universal else "state")
        if path is None:
            raise RuntimeError(f"DeepSpeed could not load the checkpoint in {folder}")

    @contextmanager
    def whole_parameters(self, change: bool = False) -> Iterator[None]:
        if self._stage < 3:
            yield
            return
        import deepspeed

        with deepspeed.zero.GatheredParameters(list(self.module.parameters()), modifier_rank=0 if change else None):
            yield


def _choose_accelerator(device: torch.device) -> None:
    """Has DeepSpeed compute where the module is; by itself it takes a GPU wherever there is one.

    Raises:
        ValueError: it already computes on something else in this process.
    """
    given = "DS_ACCELERATOR" in os.environ
    # Read when DeepSpeed is imported. It does not stay, so that processes begun by this one choose for themselves.
    os.environ.setdefault("DS_ACCELERATOR", device.type)
    from deepspeed.accelerator import get_accelerator

    chosen = get_accelerator().device_name()
    if not given:
        del os.environ["DS_ACCELERATOR"]
    if chosen != device.type:
        raise ValueError(
            f"DeepSpeed computes on {chosen} in this process and cannot train on {device.type} too; begin another "
            "process, or give training.engine.kind=ddp"
        )


def join_process_group(device: torch.device) -> None:
    """Makes DeepSpeed use the process group that is there, or one of this process alone."""
    import deepspeed

    if not dist.is_initialized():
        os.environ.setdefault("LOCAL_RANK", "0")
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
        # NCCL complains of a process that ends without having left its group.
        atexit.register(dist.destroy_process_group)
    # The shared-memory operator is compiled on first use and serves only DeepSpeed's own launcher.
    sys.modules["deepspeed.comm.torch"].build_shm_op = lambda: None  # type: ignore[attr-defined]
    deepspeed.init_distributed(dist_backend=dist.get_backend(), auto_mpi_discovery=False, verbose=False)


def _average_gradients(parameters: list[nn.Parameter]) -> None:
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return
    gradients = [p.grad for p in parameters if p.grad is not None]
    flat = torch.cat([gradient.reshape(-1) for gradient in gradients])
    dist.all_reduce(flat)
    flat /= dist.get_world_size()
    for gradient, part in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(part.view_as(gradient))


def _gradient_norm(parameters: list[nn.Parameter]) -> float:
    return float(nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None]))


def _make_universal(source: Path, target: Path) -> None:
    """Converts a checkpoint for another number of workers, in a process of its own."""
    import subprocess

    command = [sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal", "--inject_missing_state"]
    command += ["--input_folder", str(source), "--output_folder", str(target), "--num_extract_workers", "1"]
    command += ["--num_merge_workers", "1"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"the checkpoint cannot be converted for another number of workers: {done.stderr[-500:]}")
