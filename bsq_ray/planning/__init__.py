"""What a run will need, before it is started: memory, time, data rate, network, days."""

from bsq_ray.planning.format import render
from bsq_ray.planning.planner import Plan, plan

__all__ = ["Plan", "plan", "render"]
