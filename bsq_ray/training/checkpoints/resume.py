"""Resuming a run from its newest intact checkpoint.

storage ──one worker per node──▶ local folder ──▶ (other world size: convert) ──▶ every worker restores
"""

from __future__ import annotations

from bsq_ray.data.data_source import DataSource
from bsq_ray.training.checkpoints.train_state import TrainState
from bsq_ray.training.checkpoints.writer import RunProgress, load_checkpoint
from bsq_ray.training.run_recorder import RunRecorder
from bsq_ray.training.run_spec import RunSpec, check_resumable
from bsq_ray.training.worker_context import WorkerContext


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
    with worker.node_local_dir() as (folder, owner_rank):
        local_result: tuple[RunProgress | None, list[str]] = (None, [])
        if worker.rank == owner_rank:
            local_result = recorder.retry(lambda: load_checkpoint(spec.out_url, folder))
        results_by_rank = worker.all_gather_object(local_result)
        progress, warnings = results_by_rank[owner_rank]
        if progress != results_by_rank[0][0]:
            raise RuntimeError(
                f"the nodes do not read the same newest checkpoint; put {spec.out_url} on storage shared by all"
            )
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
        if not same_world_size and worker.rank == owner_rank:
            train_state.to_universal(folder)
        worker.barrier()
        train_state.restore(folder, same_world_size)
        return progress
