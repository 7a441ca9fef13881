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
from bsq_ray.training.checkpoints.host_snapshot import FileWriters, torch_save_writer


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
    def snapshot(self) -> FileWriters:
        """A copy of this worker's part of the state, as files; every worker calls it."""

    @abstractmethod
    def to_universal(self, folder: Path) -> None:
        """Makes the files of all workers loadable for another number of them; one worker of a machine calls it."""

    @abstractmethod
    def load(self, folder: Path, same_world_size: bool) -> None:
        """Reads the files of `snapshot` by as many workers, or by another number of them and then converted."""

    @contextmanager
    def gathered_parameters(self, modify: bool = False) -> Iterator[None]:
        """Inside, `module`'s parameters are whole on every worker, whatever the partition; every worker calls it.

        Args:
            change: what the first worker writes into them stays, and all workers have it; the optimiser's own copy
                does not follow, so this is for the end of a training.
        """
        yield


def build_engine(
    module: nn.Module,
    training_config: config.TrainingConfig,
    micro_batch: int,
    accumulation_steps: int,
    device: torch.device,
    use_bf16: bool = False,
) -> Engine:
    """The engine of a configuration.

    Args:
        module: on `device`, with the same weights on every worker.
        micro_batch: images of one worker's micro batch.
        accumulation: micro batches of a step.
        half: compute in bf16; the weights stay fp32.
    """
    optimizer_config = training_config.optimizer
    optimizer = torch.optim.AdamW(
        sorted(module.parameters(), key=_is_unaligned),
        lr=optimizer_config.base_learning_rate,
        betas=optimizer_config.betas,
        weight_decay=optimizer_config.weight_decay,
        eps=optimizer_config.eps,
        fused=True,
    )
    if training_config.engine.kind == "ddp":
        return DataParallelEngine(module, optimizer, optimizer_config.max_grad_norm, accumulation_steps)
    if use_bf16:
        # DeepSpeed switches an outer autocast off around the forward passes of its engines, so it is put inside.
        module.forward = torch.autocast(device.type, torch.bfloat16)(module.forward)
    return DeepSpeedEngine(module, optimizer, training_config, micro_batch, accumulation_steps, device)


def _is_unaligned(parameter: Tensor) -> bool:
    """Whether what follows it in ZeRO's flat buffer does not begin at 16 bytes, as compiled kernels expect of it."""
    return parameter.numel() * parameter.element_size() % 16 > 0


class DataParallelEngine(Engine):
    """Plain data parallelism: one all-reduce of all gradients at the end of a step."""

    def __init__(
        self, module: nn.Module, optimizer: torch.optim.Optimizer, max_grad_norm: float, accumulation_steps: int
    ) -> None:
        self.module = module
        self.optimizer = optimizer
        self.max_grad_norm = max_grad_norm
        self.accumulation_steps = accumulation_steps
        self._num_micro_batches = 0
        if dist.is_initialized() and dist.get_world_size() > 1:
            for value in module.state_dict().values():
                dist.broadcast(value, 0)

    def __call__(self, *inputs: Tensor) -> Any:
        return self.module(*inputs)

    def backward(self, loss: Tensor) -> None:
        (loss / self.accumulation_steps).backward()

    def step(self, learning_rate: float) -> float | None:
        self._num_micro_batches += 1
        if self._num_micro_batches % self.accumulation_steps:
            return None
        parameters = [p for p in self.module.parameters() if p.grad is not None]
        _average_gradients(parameters)
        grad_norm = _gradient_norm(parameters)
        if math.isfinite(grad_norm):
            if 0 < self.max_grad_norm < grad_norm:
                nn.utils.clip_grads_with_norm_(parameters, self.max_grad_norm, torch.tensor(grad_norm))
            for group in self.optimizer.param_groups:
                group["lr"] = learning_rate
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return grad_norm

    def snapshot(self) -> FileWriters:
        if dist.is_initialized() and dist.get_rank() > 0:
            return {}
        return {
            "state.pt": torch_save_writer(
                {"module": self.module.state_dict(), "optimizer": self.optimizer.state_dict()}
            )
        }

    def to_universal(self, folder: Path) -> None:
        """Nothing to do: the state is the same for any number of workers."""

    def load(self, folder: Path, same_world_size: bool) -> None:
        state = torch.load(folder / "state.pt", map_location="cpu", weights_only=True)
        self.module.load_state_dict(state["module"])
        self.optimizer.load_state_dict(state["optimizer"])


class DeepSpeedEngine(Engine):
    """DeepSpeed ZeRO 0 to 3 around a module with fp32 weights; half precision comes from autocast around the losses."""

    def __init__(
        self,
        module: nn.Module,
        optimizer: torch.optim.Optimizer,
        training_config: config.TrainingConfig,
        micro_batch: int,
        accumulation_steps: int,
        device: torch.device,
    ) -> None:
        # Otherwise it tells on stdout that there is no GPU and no tensor parallelism.
        logging.getLogger("DeepSpeed").addFilter(lambda record: record.levelno > logging.WARNING)
        _set_accelerator(device)
        import deepspeed

        ensure_process_group(device)
        self._ds_config: dict[str, Any] = {
            "train_micro_batch_size_per_gpu": micro_batch,
            "gradient_accumulation_steps": accumulation_steps,
            # Always said: DeepSpeed's own default clips at 1.
            "gradient_clipping": training_config.optimizer.max_grad_norm,
            "zero_optimization": {"stage": training_config.engine.zero_stage},
            # AdamW of PyTorch steps on the host too; DeepSpeed's own would have to be compiled on every machine.
            "zero_force_ds_cpu_optimizer": False,
            "zero_allow_untested_optimizer": True,
            "steps_per_print": sys.maxsize,
        }
        if training_config.engine.offload_optimizer:
            pin_memory = device.type == "cuda"
            self._ds_config["zero_optimization"]["offload_optimizer"] = {"device": "cpu", "pin_memory": pin_memory}
        self._zero_stage = training_config.engine.zero_stage
        self._ds_engine, *_ = deepspeed.initialize(model=module, optimizer=optimizer, config=self._ds_config)
        self.module = module

    def __call__(self, *inputs: Tensor) -> Any:
        return self._ds_engine(*inputs)

    def backward(self, loss: Tensor) -> None:
        self._ds_engine.backward(loss)

    def step(self, learning_rate: float) -> float | None:
        for group in self._ds_engine.optimizer.param_groups:
            group["lr"] = learning_rate
        is_last_micro_batch = bool(self._ds_engine.is_gradient_accumulation_boundary())
        grad_norm: float | None = None
        if is_last_micro_batch and self._zero_stage == 0:
            # Stage 0 does not tell its norm, nor does it stop at one that is not finite.
            grad_norm = _gradient_norm([p for p in self.module.parameters() if p.grad is not None])
            if not math.isfinite(grad_norm):
                return grad_norm
        self._ds_engine.step()
        return (
            grad_norm
            if grad_norm is not None or not is_last_micro_batch
            else float(self._ds_engine.get_global_grad_norm())
        )

    def snapshot(self) -> FileWriters:
        from deepspeed.runtime.checkpoint_engine import TorchCheckpointEngine

        files: FileWriters = {}

        class CapturingCheckpointEngine(TorchCheckpointEngine):
            def save(self, state_dict: Any, path: str) -> None:
                files[Path(path).relative_to(scratch).as_posix()] = torch_save_writer(state_dict)

        original_engine = self._ds_engine.checkpoint_engine
        # DeepSpeed itself only puts small scripts there, for which there is no use here.
        with tempfile.TemporaryDirectory() as scratch:
            self._ds_engine.checkpoint_engine = CapturingCheckpointEngine()
            try:
                self._ds_engine.save_checkpoint(scratch, tag="state")
            finally:
                self._ds_engine.checkpoint_engine = original_engine
        return files

    def to_universal(self, folder: Path) -> None:
        if self._zero_stage > 0:
            _convert_to_universal(folder / "state", folder / "universal")

    def load(self, folder: Path, same_world_size: bool) -> None:
        use_universal = not same_world_size and self._zero_stage > 0
        self._ds_engine._config.load_universal_checkpoint = use_universal
        path, _ = self._ds_engine.load_checkpoint(str(folder), tag="universal" if use_universal else "state")
        if path is None:
            raise RuntimeError(f"DeepSpeed could not load the checkpoint in {folder}")

    @contextmanager
    def gathered_parameters(self, modify: bool = False) -> Iterator[None]:
        if self._zero_stage < 3:
            yield
            return
        import deepspeed

        with deepspeed.zero.GatheredParameters(list(self.module.parameters()), modifier_rank=0 if modify else None):
            yield


def _set_accelerator(device: torch.device) -> None:
    """Has DeepSpeed compute where the module is; by itself it takes a GPU wherever there is one.

    Raises:
        ValueError: it already computes on something else in this process.
    """
    is_preset = "DS_ACCELERATOR" in os.environ
    # Read when DeepSpeed is imported. It does not stay, so that processes begun by this one choose for themselves.
    os.environ.setdefault("DS_ACCELERATOR", device.type)
    from deepspeed.accelerator import get_accelerator

    accelerator = get_accelerator().device_name()
    if not is_preset:
        del os.environ["DS_ACCELERATOR"]
    if accelerator != device.type:
        raise ValueError(
            f"DeepSpeed computes on {accelerator} in this process and cannot train on {device.type} too; begin another "
            "process, or give training.engine.kind=ddp"
        )


def ensure_process_group(device: torch.device) -> None:
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


def _convert_to_universal(source: Path, target: Path) -> None:
    """Converts a checkpoint for another number of workers, in a process of its own."""
    import subprocess

    command = [sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal", "--inject_missing_state"]
    command += ["--input_folder", str(source), "--output_folder", str(target), "--num_extract_workers", "1"]
    command += ["--num_merge_workers", "1"]
    process = subprocess.run(command, capture_output=True, text=True, check=False)
    if process.returncode:
        raise RuntimeError(f"the checkpoint cannot be converted for another number of workers: {process.stderr[-500:]}")
