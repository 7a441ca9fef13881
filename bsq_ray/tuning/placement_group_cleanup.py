"""Giving back what a killed trial held.

Ray frees a placement group when the job that made it ends, and a sweep is one job. Ray Train's own cleaner asks the
dashboard whether a training is alive, and a local Ray has none; the cluster's own table knows it too.
"""

from __future__ import annotations


def remove_orphaned_placement_groups() -> int:
    """Removes this job's placement groups whose creators were actors that are dead; returns how many there were."""
    import ray
    from ray._private.state import state
    from ray._raylet import PlacementGroupID
    from ray.core.generated.gcs_pb2 import PlacementGroupTableData
    from ray.util.placement_group import PlacementGroup, remove_placement_group

    job_id = ray.get_runtime_context().get_job_id()
    num_removed = 0
    for serialized_group in state._connect_and_get_accessor().get_placement_group_table():
        group = PlacementGroupTableData.FromString(serialized_group)
        # What the driver itself made has no creator among the actors.
        is_created_by_actor = not ray.ActorID(group.creator_actor_id).is_nil()
        is_orphaned = is_created_by_actor and group.creator_actor_dead and group.creator_job_id.hex() == job_id
        if is_orphaned and group.state != PlacementGroupTableData.REMOVED:
            remove_placement_group(PlacementGroup(PlacementGroupID(group.placement_group_id)))
            num_removed += 1
    return num_removed
