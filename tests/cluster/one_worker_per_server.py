"""Trains with two workers on the cluster whose head this is run on, each too large to share a server with the other.

python one_worker_per_server.py SHARDS OUT key=value …
"""

import sys

from small_runs import PRESET, SMALL

from bsq_ray.config import load_config
from bsq_ray.training.launch import train
from bsq_ray.training.ray_trainer import ResourceBudget

if __name__ == "__main__":
    shards, out, *overrides = sys.argv[1:]
    run_config = load_config(PRESET, [*SMALL, *overrides])
    # Both servers are one machine, whose cores they share.
    resource_budget = ResourceBudget(resources_per_worker={"CPU": 3}, concurrent_runs=2)
    train(run_config, shards, out, num_workers=2, address="auto", resume=True, on_record=print, budget=resource_budget)
