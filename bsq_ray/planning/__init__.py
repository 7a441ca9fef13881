"""Estimate the requirements of a run before it starts: memory, time, data rate, network traffic."""

from bsq_ray.planning.plan_table import format_plan
from bsq_ray.planning.planner import Plan, make_plan

__all__ = ["Plan", "format_plan", "make_plan"]
