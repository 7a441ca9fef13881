"""What a run will need, before it is started: memory, time, data rate, network, days."""

from bsq_ray.planning.format import format_plan
from bsq_ray.planning.planner import Plan, make_plan

__all__ = ["Plan", "format_plan", "make_plan"]
