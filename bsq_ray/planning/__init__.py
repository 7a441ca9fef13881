"""What a run will need, before it is started: memory, time, data rate, network, days."""

from bsq_ray.planning.plan import Plan, plan
from bsq_ray.planning.table import render

__all__ = ["Plan", "plan", "render"]
