"""Format a plan as a text table."""

from __future__ import annotations

import io

from bsq_ray.planning.planner import Plan


def format_plan(plan: Plan) -> str:
    """Return the plan as a plain-text table, at most 100 characters wide, followed by advice if it does not fit."""
    from rich.console import Console
    from rich.table import Table

    table = Table(
        title=f"{plan.name} on {plan.num_gpus} x {plan.gpu.product_name}", show_header=False, title_justify="left"
    )
    for label, value in _rows(plan):
        table.add_row(label, value)
    text = io.StringIO()
    Console(file=text, width=100, color_system=None).print(table)
    for change in plan.advice:
        text.write(f"to fit into memory: {change}\n")
    return text.getvalue()


def _rows(plan: Plan) -> list[tuple[str, str]]:
    memory, sample = plan.memory, plan.sample
    fit = "fits" if plan.has_enough_memory else "DOES NOT FIT"
    num_flops = sum(sample.flops.values())
    percentages = ", ".join(f"{name} {count / num_flops:.0%}" for name, count in sample.flops.items())
    parts = ("weights", "gradients", "optimizer", "ema", "buckets", "activations", "overhead")
    micro_batches = "1 micro batch" if plan.accumulation_steps == 1 else f"{plan.accumulation_steps} micro batches"
    return [
        ("parameters", ", ".join(f"{count / 1e6:.1f} M {name}" for name, count in sample.parameters.items())),
        ("batch per GPU", f"{plan.micro_batch_size} {sample.unit}, {micro_batches} per step"),
        ("memory per GPU", f"{_gib(memory.total)} of {plan.gpu.memory_gib:.0f} GiB: {fit}"),
        *((f"  {part}", _gib(getattr(memory, part))) for part in parts),
        ("operations per step", f"{plan.step_flops / 1e12:.4g} TFLOP: {percentages}"),
        (
            "time per step",
            f"{plan.step_s:.3g} s: computation {plan.compute_s:.3g}, communication {plan.communication_s:.3g}",
        ),
        ("throughput", f"{plan.samples_per_second:.4g} {sample.unit}/s"),
        ("network", f"{plan.communication_bytes / 1e9:.3g} GB sent by each GPU per step"),
        ("network-bound", _network_bound(plan)),
        ("data rate", f"{plan.data_bytes_per_second / 1e6:.4g} MB/s over all nodes"),
        ("duration", f"{plan.days:.2f} days"),
    ]


def _network_bound(plan: Plan) -> str:
    if plan.network_bound_gpus is None:
        return "at no valid number of GPUs with this global batch"
    return f"from {plan.network_bound_gpus} GPUs on with this global batch (communication > computation)"


def _gib(num_bytes: float) -> str:
    return f"{num_bytes / 2**30:.2f} GiB"
