"""Train with two workers on the cluster of this head node, each too large to share a node with the other.

python one_worker_per_node.py SHARDS OUT key=value …
"""

import sys

from small_runs import PRESET, SMALL

from bsq_ray.config import load_config
from bsq_ray.training.launch import train
from bsq_ray.training.worker_resources import ResourceBudget

if __name__ == "__main__":
    shards, out, *overrides = sys.argv[1:]
    run_config = load_config(PRESET, [*SMALL, *overrides])
    # Both nodes share the cores of one machine.
    resource_budget = ResourceBudget(resources_per_worker={"CPU": 3}, concurrent_runs=2)
    train(run_config, shards, out, num_workers=2, address="auto", resume=True, on_record=print, budget=resource_budget)
