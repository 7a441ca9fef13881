"""Every use of a private or undocumented API of Ray, one function each.

Each docstring states why the function exists, the Ray version in which the API was seen, and the closest public API.
tests/runtime/test_ray_internals.py has a contract test per function (`pytest -m internals`).
The linter rejects private APIs of Ray everywhere else.
"""

from __future__ import annotations

import re
import time
from collections.abc import Awaitable, Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ray.job_config import JobConfig
    from ray.tune.experiment import Trial
    from ray.util.placement_group import PlacementGroup


def draining_nodes() -> set[str]:
    """Return the IDs of nodes with a preemption notice: reclaimed spot nodes, or `ray drain-node`.

    Why: the driver resizes the run while its workers are still alive. Seen in Ray 2.60.
    Public API: `ray.train.get_preemption_info()` (alpha), which works only in workers and is a collective call.
    """
    from ray._private.state import state

    return set(state.get_draining_nodes())


def autoscaler_limits() -> dict[str, float] | None:
    """Return the maximum amount of each resource that the autoscaler can provide; None if it publishes no limits.

    Why: a request beyond the limits would wait forever. Seen in Ray 2.60. Public API: none.
    """
    from ray._private.state import state

    limits = state.get_max_resources_from_cluster_config()
    return None if limits is None else {name: float(amount) for name, amount in limits.items()}


def is_startup_timeout(error: BaseException) -> bool:
    """Return True if Ray Train failed because its workers could not be placed in time.

    Why: a run waits for missing capacity; any other startup error counts as a failure. Seen in Ray 2.60.
    Public API: only the wrapper `ray.train.ControllerError`; its message is parsed if the private class does not exist.
    """
    from ray.train import ControllerError

    if not isinstance(error, ControllerError):
        return False
    try:
        from ray.train.v2._internal.exceptions import WorkerGroupStartupTimeoutError
    except ImportError:
        return "worker group startup timed out" in str(error)
    return isinstance(error.controller_failure, WorkerGroupStartupTimeoutError)


def placement_groups_of_dead_actors() -> list[PlacementGroup]:
    """Return this job's placement groups whose creators were actors that are dead.

    Why: Ray keeps such a group until the job ends, so a killed trial would hold its resources. Seen in Ray 2.60.
    Public API: `ray.util.state.list_placement_groups` needs a dashboard and omits the creator; none removes by ID.
    """
    import ray
    from ray._private.state import state
    from ray._raylet import PlacementGroupID
    from ray.core.generated.gcs_pb2 import PlacementGroupTableData  # type: ignore[attr-defined]
    from ray.util.placement_group import PlacementGroup

    job_id = ray.get_runtime_context().get_job_id()
    groups = []
    for serialized_group in state._connect_and_get_accessor().get_placement_group_table():
        group = PlacementGroupTableData.FromString(serialized_group)
        # A group that the driver itself created has no creator among the actors.
        is_created_by_actor = not ray.ActorID(group.creator_actor_id).is_nil()
        is_orphaned = is_created_by_actor and group.creator_actor_dead and group.creator_job_id.hex() == job_id
        if is_orphaned and group.state != PlacementGroupTableData.REMOVED:
            groups.append(PlacementGroup(PlacementGroupID(group.placement_group_id)))
    return groups


def stub_trial(trial_id: str, config: dict[str, Any] | None = None) -> Trial:
    """Return a Tune trial that never runs, for replaying earlier reports to a scheduler.

    Why: a resumed sweep compares new trials with those that ended before. Seen in Ray 2.60.
    Public API: none; `Trial` is a developer API and its argument `stub` is undocumented.
    """
    from ray.tune.experiment import Trial

    return Trial("earlier", trial_id=trial_id, config=config, stub=True)


def trial_error_text(trial: Trial) -> str:
    """Return the text of all failures of a Tune trial so far, newest last; empty if it never failed.

    Why: while the sweep runs, it records why a trial is retried. Seen in Ray 2.60.
    Public API: `Result.error` of the final results, which omits errors of trials that were retried successfully.
    """
    return Path(trial.error_file).read_text() if trial.error_file else ""


def job_config_without_folder(folder: str) -> JobConfig:
    """Return the configuration of a job whose workers do not import modules from a folder.

    Why: Ray prepends the driver's working folder to `sys.path` of the workers, even if the driver's own path lacks it.
    A file `numpy.py` there would shadow NumPy and crash every worker. Seen in Ray 2.60.
    Public API: none; `runtime_env={"working_dir": …}` copies a folder to the workers.
    """
    from ray.job_config import JobConfig

    class ModulePath(list[str]):
        def extend(self, folders: Iterable[str]) -> None:
            super().extend(path for path in folders if path != folder)

    job_config = JobConfig()
    job_config._py_driver_sys_path = ModulePath()
    return job_config


def recent_worker_errors(max_age_s: float = 60.0) -> list[str]:
    """Return the last exception in each error log that a worker on this node wrote recently, newest first.

    Why: the exception that reports a dead worker only names log files. Seen in Ray 2.60.
    Public API: `ray.util.state.get_log`, which needs a dashboard and the worker's ID.
    """
    from ray._private.worker import _global_node

    if _global_node is None:
        return []
    oldest = time.time() - max_age_s
    files = [(path.stat().st_mtime, path) for path in Path(_global_node.get_logs_dir_path()).glob("worker-*.err")]
    lines = []
    for _, path in sorted((entry for entry in files if entry[0] >= oldest), reverse=True):
        error_lines = re.findall(r"^[\w.]*(?:Error|Exception)\b.*", path.read_text(errors="replace"), re.MULTILINE)
        lines += error_lines[-1:]
    return lines


def block_to_numpy(block: Any) -> dict[str, Any]:
    """Return the columns of a Ray Data block as NumPy arrays.

    Why: materialized blocks are read one at a time, without starting an execution. Seen in Ray 2.60.
    Public API: `Dataset.iter_batches(batch_format="numpy")`, which starts a thread and an execution per data set.
    """
    from ray.data.block import BlockAccessor

    columns = BlockAccessor.for_block(block).to_numpy()
    assert isinstance(columns, dict)
    return columns


def serve_http_callback_env() -> str:
    """Return the name of the environment variable with the import path of a function that returns proxy middlewares.

    Why: the limits on memory held by slow clients apply in the HTTP proxy of Ray Serve, as ASGI middlewares. Seen in
    Ray 2.60, undocumented.
    Public API: none; `serve.start(http_options=...)` accepts middlewares as pickled objects, `serve deploy` does not.
    """
    return "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH"


def disconnect_disabled_header() -> bytes:
    """Return the name of the HTTP header with which Ray Serve does not cancel a request when its client disconnects.

    Why: our middleware removes the header, so that a disconnect always cancels the request. Seen in Ray 2.60.
    Public API: none.
    """
    return b"x-request-disconnect-disabled"


def replace_receive_source(receive: Any, fetch_messages: Callable[[Any], Awaitable[Any]]) -> bool:
    """Replace the function with which a replica fetches the rest of a request body from the proxy.

    Why: a body that arrived with the request needs no second call to the proxy. Seen in Ray 2.60. Public API: none.

    Args:
        receive: ASGI receive callable of a replica.
        fetch_messages: called with Ray's request metadata; returns pickled ASGI messages, or never returns.

    Returns:
        False if `receive` is not Ray's object; it is then unchanged.
    """
    if not hasattr(receive, "_receive_asgi_messages"):
        return False
    receive._receive_asgi_messages = fetch_messages
    return True


def head_node_resource() -> str:
    """Return the name of the resource that only the head node of a cluster has.

    Why: `bsq-ray serve` prints the URL of the head node, where the HTTP proxy listens. Seen in Ray 2.60.
    Public API: the `is_head_node` field of `ray.util.state.list_nodes`, which needs a dashboard.
    """
    return "node:__internal_head__"
