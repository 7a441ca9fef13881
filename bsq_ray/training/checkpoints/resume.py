"""Resuming a run from its newest intact checkpoint.

storage ──one worker per node──▶ local folder ──▶ (other world size: repartition) ──▶ every worker restores

A node downloads what its own workers load. A file that one node finds damaged makes all nodes skip the checkpoint.
"""

from __future__ import annotations

from bsq_ray.data.data_source import DataSource
from bsq_ray.training.checkpoints.train_state import TrainState
from bsq_ray.training.checkpoints.writer import RunProgress, checkpoint_name, load_checkpoint
from bsq_ray.training.run_recorder import RunRecorder
from bsq_ray.training.run_spec import RunSpec, check_resumable
from bsq_ray.training.worker_context import NodeFolder, WorkerContext


def resume_run(
    spec: RunSpec,
    worker: WorkerContext,
    source: DataSource,
    train_state: TrainState,
    recorder: RunRecorder,
    *,
    must_exist: bool,
) -> RunProgress | None:
    """Restore the newest intact checkpoint into `train_state`; collective.

    Args:
        must_exist: the run was initialized from a model and has checkpoints, so its weights are in one of them.

    Returns:
        Progress of the checkpoint; None if there is none.

    Raises:
        ValueError: no checkpoint is intact although one must exist, or the checkpoint is of another run.
        RuntimeError: the nodes do not read the same checkpoint.
    """
    with worker.node_local_dir() as node:
        folder = node.path
        progress, warnings = _download_newest(spec.out_url, worker, node, train_state, recorder)
        for warning in warnings:
            recorder.warn(warning)
        if progress is None:
            if must_exist:
                raise ValueError(
                    f"no checkpoint in {spec.out_url} is intact, and the run started with other weights; remove its "
                    f"checkpoints to start again with {spec.init_url}"
                )
            return None
        check_resumable(progress, spec.config, source, spec.out_url)
        same_world_size = progress.world == worker.world_size
        if not same_world_size and worker.rank == node.owner_rank:
            train_state.repartition(folder, node.ranks, progress.world)
        worker.barrier()
        train_state.restore(folder, same_world_size)
        return progress


def _download_newest(
    out_url: str, worker: WorkerContext, node: NodeFolder, train_state: TrainState, recorder: RunRecorder
) -> tuple[RunProgress | None, list[str]]:
    """Download the newest checkpoint that no node finds damaged; collective.

    Returns:
        Progress of the checkpoint, None if there is none; and a warning for each damaged one.

    Raises:
        RuntimeError: the nodes do not read the same checkpoint.
    """

    def is_needed(progress: RunProgress, name: str) -> bool:
        return train_state.loads_file(name, node.ranks, progress.world)

    def download() -> tuple[RunProgress | None, dict[str, str]]:
        return load_checkpoint(out_url, node.path, is_needed, damaged)

    damaged: dict[str, str] = {}
    while True:
        local_result: tuple[RunProgress | None, dict[str, str]] = (None, {})
        if worker.rank == node.owner_rank:
            local_result = recorder.retry(download)
        results_by_rank = worker.all_gather_object((node.owner_rank, local_result))
        results = [result for rank, (owner_rank, result) in enumerate(results_by_rank) if rank == owner_rank]
        for _, node_damaged in results:
            damaged |= node_damaged
        chosen = [progress for progress, _ in results]
        if not any(progress is not None and checkpoint_name(progress.step) in damaged for progress in chosen):
            break
    if any(progress != chosen[0] for progress in chosen):
        raise RuntimeError(f"the nodes do not read the same newest checkpoint; put {out_url} on storage shared by all")
    return chosen[0], list(damaged.values())
