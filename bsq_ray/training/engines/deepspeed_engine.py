"""DeepSpeed ZeRO stages 0 to 3, with fp32 weights and bf16 autocast."""

from __future__ import annotations

import atexit
import logging
import os
import re
import sys
import tempfile
from collections.abc import Collection, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
import torch.distributed as dist
from torch import Tensor, nn

from bsq_ray import config
from bsq_ray.runtime import _deepspeed_internals as internals
from bsq_ray.runtime import _zero_checkpoint_internals as zero_checkpoint
from bsq_ray.runtime._torch_internals import skip_steps_if_set
from bsq_ray.training.checkpoints.host_snapshot import FileWriters, safetensors_writer, torch_save_writer
from bsq_ray.training.engines.backward_buckets import BUCKET_ELEMENTS
from bsq_ray.training.engines.engine import COMMUNICATION_DTYPES, Engine, gradient_norm
from bsq_ray.training.engines.partition_buckets import PartitionBuckets
from bsq_ray.training.engines.repartition import repartition_groups, source_ranks

# Optimizer states of ZeRO, and weights of ZeRO-3.
_PARTITION_FILE = re.compile(r"zero_pp_rank_(\d+)_mp_rank_")
# Weights of ZeRO-3, of one worker, and those of the other stages.
_MODEL_FILE, _SHARED_MODEL_FILE = "zero_pp_rank_{}_mp_rank_00_model_states.pt", "mp_rank_00_model_states.pt"
# Folders of an engine's files: as written, and for another number of workers.
_WRITTEN, _REPARTITIONED = "state", "repartitioned"
# Parameters that are not trained, in a checkpoint.
_FROZEN_FILE = "frozen.safetensors"


class DeepSpeedEngine(Engine):
    """Training engine that wraps a module in DeepSpeed.

    Args:
        bucket_elements: number of elements that closes a bucket of gradients in ZeRO-1 and ZeRO-2.

    Raises:
        ValueError: DeepSpeed was already imported with another device type in this process.
    """

    def __init__(
        self,
        module: nn.Module,
        optimizer: torch.optim.Optimizer,
        training_config: config.TrainingConfig,
        micro_batch: int,
        accumulation_steps: int,
        found_nonfinite: Tensor,
        bucket_elements: int = BUCKET_ELEMENTS,
    ) -> None:
        device = found_nonfinite.device
        # Suppress DeepSpeed's messages on stdout that there is no GPU and no tensor parallelism.
        logging.getLogger("DeepSpeed").addFilter(lambda record: record.levelno > logging.WARNING)
        _select_accelerator(device)
        import deepspeed

        ensure_process_group(device)
        zero_stage = training_config.engine.zero_stage
        zero_config: dict[str, Any] = {"stage": zero_stage}
        if zero_stage in (1, 2):
            # All gradients in one bucket of their size: their averages are written to it in one call.
            zero_config["reduce_bucket_size"] = sum(
                parameter.numel() for parameter in module.parameters() if parameter.requires_grad
            )
            # Offloaded gradients are sent by one reduce per worker, with the same bytes as a reduce-scatter.
            zero_config["use_multi_rank_bucket_allreduce"] = False
        offloads = training_config.engine.offload_optimizer
        if offloads:
            zero_config["offload_optimizer"] = {"device": "cpu", "pin_memory": device.type == "cuda"}
        self._zero_stage = zero_stage
        self._accumulation_steps = accumulation_steps
        self._num_micro_batches = 0
        sends_in_backward = zero_stage in (1, 2) and not offloads
        # DeepSpeed gets the gradients of ZeRO-1 and ZeRO-2 after the last backward pass of a step, which sends them.
        # Offloaded ZeRO-2 would send those of each micro batch.
        self._accumulates = sends_in_backward or (zero_stage == 2 and accumulation_steps > 1)
        self._accumulation = ExitStack()
        ds_config = {
            "train_micro_batch_size_per_gpu": micro_batch,
            "gradient_accumulation_steps": 1 if self._accumulates else accumulation_steps,
            "communication_data_type": training_config.engine.communication_data_type,
            # Always set, because DeepSpeed clips at norm 1 by default.
            "gradient_clipping": training_config.optimizer.max_grad_norm,
            "zero_optimization": zero_config,
            # PyTorch's AdamW also runs on the host; DeepSpeed's CPU Adam would have to be compiled on every node.
            "zero_force_ds_cpu_optimizer": False,
            "zero_allow_untested_optimizer": True,
            "steps_per_print": sys.maxsize,
        }
        self._optimizer_device = torch.device("cpu") if offloads else device
        self.found_nonfinite = found_nonfinite
        self._grad_norm = torch.zeros((), device=device)
        internals.keep_gradient_norm_on_device()
        optimizer.register_step_pre_hook(self._skip_if_nonfinite)
        self._cached_source_ranks: dict[tuple[int, ...], set[int]] = {}
        self._frozen = {name: value for name, value in module.named_parameters() if not value.requires_grad}
        self._ds_engine, *_ = deepspeed.initialize(model=module, optimizer=optimizer, config=ds_config)
        slices: dict[nn.Parameter, list[internals.PartitionSlice]] = {}
        if sends_in_backward:
            by_parameter = internals.partition_slices(self._ds_engine)
            slices = {
                parameter: by_parameter[parameter] for parameter in module.parameters() if parameter in by_parameter
            }
        communication_dtype = COMMUNICATION_DTYPES[training_config.engine.communication_data_type]
        # Without slices it sends nothing.
        self._buckets = PartitionBuckets(slices, communication_dtype, bucket_elements)
        if sends_in_backward:
            internals.replace_gradient_averages(self._ds_engine, self._buckets.averages)
        self.module = module

    def __call__(self, *inputs: Tensor | tuple[Tensor, ...] | None) -> Any:
        return self._ds_engine(*inputs)

    def backward(self, loss: Tensor) -> None:
        if self._accumulates:
            if self._num_micro_batches % self._accumulation_steps == 0:
                self._accumulation.enter_context(self._ds_engine.coalesce_grad_reduction())
            loss = loss / self._accumulation_steps
        if (self._num_micro_batches + 1) % self._accumulation_steps == 0:
            self._buckets.start()
        try:
            self._ds_engine.backward(loss)
        except BaseException:
            # The other workers may not have failed. So nothing more is sent, not even when the engine is destroyed.
            self._buckets.cancel()
            raise

    def step(self, learning_rate: float) -> Tensor | None:
        self._num_micro_batches += 1
        is_last_micro_batch = self._num_micro_batches % self._accumulation_steps == 0
        if self._accumulates:
            if not is_last_micro_batch:
                return None
            # Passes the accumulated gradients to DeepSpeed.
            self._accumulation.close()
        for group in self._ds_engine.optimizer.param_groups:
            group["lr"] = learning_rate
        if is_last_micro_batch and self._zero_stage == 0:
            # Stage 0 does not return the gradient norm.
            self._grad_norm = gradient_norm([p for p in self.module.parameters() if p.grad is not None])
        self._ds_engine.step()
        return self._grad_norm if is_last_micro_batch else None

    def _skip_if_nonfinite(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        """Make a step of the inner optimizer change nothing from the first nonfinite gradient norm on."""
        if self._zero_stage > 0:
            self._grad_norm = internals.global_gradient_norm(self._ds_engine)
        self.found_nonfinite.logical_or_(~torch.isfinite(self._grad_norm))
        # An offloaded optimizer needs the flag on the host, where DeepSpeed has waited for the gradients already.
        skip_steps_if_set(optimizer, self.found_nonfinite.to(self._optimizer_device))

    def snapshot(self) -> FileWriters:
        files: FileWriters = {}
        # DeepSpeed itself writes only small helper scripts to this folder; they are not needed.
        with tempfile.TemporaryDirectory() as scratch:

            def capture(state: Any, path: str) -> None:
                files[Path(path).relative_to(scratch).as_posix()] = torch_save_writer(state)

            internals.capture_checkpoint(self._ds_engine, scratch, _WRITTEN, capture)
        if self._frozen:
            with self._gathered(list(self._frozen.values())):
                if dist.get_rank() == 0:
                    files[_FROZEN_FILE] = safetensors_writer({**self._frozen})
        return files

    def loads_file(self, name: str, ranks: Collection[int], old_world_size: int) -> bool:
        match = _PARTITION_FILE.search(name)
        # A run of another stage, whose files are not divided alike, is rejected after the download.
        return self._zero_stage == 0 or match is None or int(match[1]) in self._source_ranks(ranks, old_world_size)

    def _source_ranks(self, ranks: Collection[int], old_world_size: int) -> set[int]:
        """Return the ranks whose files of a checkpoint these ranks load."""
        world_size = dist.get_world_size()
        if old_world_size == world_size:
            return set(ranks)
        key = (*ranks, old_world_size)
        if key not in self._cached_source_ranks:
            groups = zero_checkpoint.flat_groups(self._ds_engine)
            sources = [source_ranks(groups, rank, old_world_size, world_size) for rank in ranks]
            self._cached_source_ranks[key] = set().union(*sources)
        return self._cached_source_ranks[key]

    def repartition(self, folder: Path, ranks: Collection[int], old_world_size: int) -> None:
        if self._zero_stage == 0:
            return
        groups = zero_checkpoint.flat_groups(self._ds_engine)
        world_size = dist.get_world_size()
        source, target = folder / _WRITTEN, folder / _REPARTITIONED
        target.mkdir()
        for rank in ranks:
            old_ranks = sorted(source_ranks(groups, rank, old_world_size, world_size))
            states = {old: zero_checkpoint.load_partition(_optimizer_file(source, old)) for old in old_ranks}
            tensors = {old: zero_checkpoint.flat_tensors(state) for old, state in states.items()}
            state = states[old_ranks[0]]
            new_tensors = repartition_groups(groups, rank, old_world_size, world_size, tensors)
            zero_checkpoint.replace_flat_tensors(state, new_tensors)
            old_name = _optimizer_file(source, old_ranks[0]).name
            torch.save(state, target / _PARTITION_FILE.sub(f"zero_pp_rank_{rank}_mp_rank_", old_name))
            if self._zero_stage == 3:
                old_name = _MODEL_FILE.format(old_ranks[0])
                zero_checkpoint.write_model_state(source / old_name, target / _MODEL_FILE.format(rank), world_size)
        if self._zero_stage < 3:
            zero_checkpoint.write_model_state(source / _SHARED_MODEL_FILE, target / _SHARED_MODEL_FILE, world_size)

    def load(self, folder: Path, same_world_size: bool) -> None:
        is_repartitioned = not same_world_size and self._zero_stage > 0
        tag = _REPARTITIONED if is_repartitioned else _WRITTEN
        path, _ = self._ds_engine.load_checkpoint(str(folder), tag=tag)
        if path is None:
            raise RuntimeError(f"DeepSpeed could not load the checkpoint in {folder}")
        if is_repartitioned and self._frozen:
            self._load_frozen(folder)

    def _load_frozen(self, folder: Path) -> None:
        """Load the frozen parameters, which repartitioned files do not contain."""
        tensors = safetensors.torch.load_file(folder / _FROZEN_FILE)
        with self._gathered(list(self._frozen.values()), modify=True), torch.no_grad():
            for name, parameter in self._frozen.items():
                parameter.copy_(tensors[name])

    @contextmanager
    def gathered_parameters(self, modify: bool = False) -> Iterator[None]:
        with self._gathered(list(self.module.parameters()), modify):
            yield

    @contextmanager
    def _gathered(self, parameters: list[nn.Parameter], modify: bool = False) -> Iterator[None]:
        if self._zero_stage < 3:
            yield
            return
        import deepspeed

        with deepspeed.zero.GatheredParameters(parameters, modifier_rank=0 if modify else None):
            yield


def run_forward_in_autocast(module: nn.Module, device: torch.device) -> None:
    """Register hooks that run the module's forward pass in bf16 autocast.

    DeepSpeed disables an outer autocast around the forward passes of its engines, so autocast must start inside. Unlike
    a wrapper module, hooks keep parameter names and `module.forward` unchanged.
    """
    contexts: list[torch.autocast] = []

    def enter(_module: nn.Module, _inputs: Any) -> None:
        contexts.append(torch.autocast(device.type, torch.bfloat16))
        contexts[-1].__enter__()

    def leave(_module: nn.Module, _inputs: Any, _output: Any) -> None:
        contexts.pop().__exit__(None, None, None)

    module.register_forward_pre_hook(enter)
    # `always_call` leaves the context even if the forward pass raises.
    module.register_forward_hook(leave, always_call=True)


def ensure_process_group(device: torch.device) -> None:
    """Initialize DeepSpeed with the existing process group, or with a new one of world size 1."""
    import deepspeed

    if not dist.is_initialized():
        os.environ.setdefault("LOCAL_RANK", "0")
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
        # NCCL warns if a process exits without destroying its group.
        atexit.register(dist.destroy_process_group)
    internals.disable_shared_memory_op()
    deepspeed.init_distributed(dist_backend=dist.get_backend(), auto_mpi_discovery=False, verbose=False)


def _select_accelerator(device: torch.device) -> None:
    """Make DeepSpeed use this device type; by default it uses a GPU if there is one.

    Raises:
        ValueError: DeepSpeed was already imported with another device type in this process.
    """
    is_set_by_user = "DS_ACCELERATOR" in os.environ
    # DeepSpeed reads the variable at import. It is removed afterward, so that child processes do not inherit it.
    os.environ.setdefault("DS_ACCELERATOR", device.type)
    from deepspeed.accelerator import get_accelerator

    accelerator = get_accelerator().device_name()
    if not is_set_by_user:
        del os.environ["DS_ACCELERATOR"]
    if accelerator != device.type:
        raise ValueError(
            f"DeepSpeed already uses {accelerator} in this process and cannot train on {device.type}; use a new "
            "process, or set training.engine.kind=ddp"
        )


def _optimizer_file(folder: Path, rank: int) -> Path:
    """Return a worker's file of optimizer states, whose name has a prefix that depends on the precision."""
    [path] = folder.glob(f"*zero_pp_rank_{rank}_mp_rank_*_optim_states.pt")
    return path
