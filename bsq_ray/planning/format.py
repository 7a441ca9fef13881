"""A plan as text."""

from __future__ import annotations

import io

from bsq_ray.planning.planner import Plan


def format_plan(plan: Plan) -> str:
    """The plan as a table of plain text, at most 100 columns wide."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"{plan.name} on {plan.num_gpus} x {plan.gpu.title}", show_header=False, title_justify="left")
    for label, value in _rows(plan):
        table.add_row(label, value)
    text = io.StringIO()
    Console(file=text, width=100, color_system=None).print(table)
    for change in plan.advice:
        text.write(f"to make it fit: {change}\n")
    return text.getvalue()


def _rows(plan: Plan) -> list[tuple[str, str]]:
    memory, sample = plan.memory, plan.sample
    verdict = "fits" if plan.has_enough_memory else "DOES NOT FIT"
    operations = sum(sample.flops.values())
    shares = ", ".join(f"{name} {count / operations:.0%}" for name, count in sample.flops.items())
    parts = ("weights", "gradients", "optimizer", "average", "buckets", "activations", "overhead")
    return [
        ("parameters", ", ".join(f"{count / 1e6:.1f} M {name}" for name, count in sample.parameters.items())),
        ("batch of a GPU", f"{plan.micro_batch} {sample.unit}, {plan.accumulation} times a step"),
        ("memory of a GPU", f"{_gib(memory.total)} of {plan.gpu.memory_gib:.0f} GiB: {verdict}"),
        *((f"  {part}", _gib(getattr(memory, part))) for part in parts),
        ("operations of a step", f"{plan.step_flops / 1e12:.4g} TFLOP: {shares}"),
        (
            "time of a step",
            f"{plan.step_seconds:.3g} s: computing {plan.compute_seconds:.3g}, sending {plan.communication_seconds:.3g}",
        ),
        ("speed", f"{plan.samples_per_second:.4g} {sample.unit}/s"),
        ("network", f"{plan.communication_bytes / 1e9:.3g} GB sent by each GPU in a step"),
        ("data to read", f"{plan.data_bytes_per_second / 1e6:.4g} MB/s, all servers together"),
        ("time of the run", f"{plan.days:.2f} days"),
    ]


def _gib(size: float) -> str:
    return f"{size / 2**30:.2f} GiB"
