"""A run of one or two workers on machines that come and go; a program of its own, because it has its own cluster.

head + second ─two workers─▶ the second is drained ─one─▶ a third comes ─two─▶ the third is killed ─one─▶ stop
"""

import json
import os
import subprocess
import sys
import threading
import time

os.environ.update(
    RAY_USAGE_STATS_ENABLED="0",
    RAY_AUTH_MODE="disabled",
    RAY_TRAIN_ENABLE_PREEMPTION_WATCHER="0",
    RAY_TRAIN_HEALTH_CHECK_INTERVAL_S="0.5",
    RAY_DATA_DISABLE_PROGRESS_BARS="1",
    RAY_CHDIR_TO_TRIAL_DIR="0",
    GLOO_SOCKET_IFNAME="lo",
)

import ray
from ray.cluster_utils import Cluster
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
from small_runs import PRESET, SMALL

from bsq_ray.config import load_config
from bsq_ray.training import capacity
from bsq_ray.training.launch import Interrupted, train

# As short as a test can wait.
capacity._PATIENCE, capacity._GROW_AFTER = 5.0, 3.0
NODE = {"num_cpus": 2, "object_store_memory": 150_000_000}
STEPS_BETWEEN = 6


class TrainingThread:
    """The training, in a thread, because only the main one may add machines."""

    def __init__(self, shards, out, overrides):
        self.records, self.stop = [], threading.Event()
        self.arguments = (load_config(PRESET, [*SMALL, *overrides]), shards, out, 2)
        self.thread = threading.Thread(target=self._train)
        self.thread.start()

    def _train(self):
        try:
            train(*self.arguments, min_workers=1, on_record=self.records.append, stop_event=self.stop)
        except Interrupted:
            return
        except Exception as error:
            self.records.append({"kind": "failed", "error": f"{type(error).__name__}: {error}"})

    def wait_for_group(self, group_number):
        """Until the `starts`-th group of workers has taken some steps."""
        deadline = time.monotonic() + 180
        while self.thread.is_alive() and time.monotonic() < deadline:
            start_indices = [n for n, record in enumerate(self.records) if record["kind"] == "start"]
            if len(start_indices) >= group_number:
                steps = [r for r in self.records[start_indices[group_number - 1] :] if r["kind"] == "training"]
                if len(steps) >= STEPS_BETWEEN:
                    return
            time.sleep(0.1)
        raise SystemExit(f"no {group_number}. group of workers: {self.records[-3:]}")


@ray.remote(num_cpus=1)
class CpuHolder:
    """Takes up a CPU."""

    def ready(self):
        return True


def hold_one_cpu(node):
    holder = CpuHolder.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False)).remote()
    ray.get(holder.ready.remote())
    return holder


def main(shards, out, *overrides):
    cluster = Cluster(initialize_head=True, head_node_args=NODE)
    ray.init(address=cluster.address, log_to_driver=False, logging_level="error")
    head = ray.get_runtime_context().get_node_id()
    second = cluster.add_node(**NODE)
    # So that both workers find their place on the other machine.
    holder = hold_one_cpu(head)
    run = TrainingThread(shards, out, overrides)
    try:
        run.wait_for_group(1)
        ray.kill(holder)
        drain(cluster.address, second.node_id)
        run.wait_for_group(2)
        cluster.remove_node(second)
        third = cluster.add_node(**NODE)
        holder = hold_one_cpu(head)
        run.wait_for_group(3)
        ray.kill(holder)
        cluster.remove_node(third, allow_graceful=False)
        run.wait_for_group(4)
        run.stop.set()
        run.thread.join(60)
    finally:
        with open(f"{out}/records.json", "w") as file:
            json.dump([r for r in run.records if r["kind"] != "result"], file)
        ray.shutdown()
        cluster.shutdown()


def drain(address, node):
    """What a hook of the machine does when its end is announced."""
    command = [sys.executable, "-m", "ray.scripts.scripts", "drain-node", "--address", address, "--node-id", node]
    command += ["--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "reclaimed"]
    subprocess.run([*command, "--deadline-remaining-seconds", "120"], check=True, stdout=subprocess.DEVNULL)


if __name__ == "__main__":
    main(*sys.argv[1:])
