"""The command that runs a hyperparameter sweep."""

from __future__ import annotations

from typing import Annotated

import typer

from bsq_ray.cli.extras import require_extra
from bsq_ray.cli.options import AddressOption, parse_device, resume_command


def sweep(
    context: typer.Context,
    config: Annotated[str, typer.Option(help="YAML file of the sweep; jobs/sweeps/ has examples.")],
    data: Annotated[str, typer.Option(help="Packed training images or videos, or a token table.")],
    held_out: Annotated[str, typer.Option(help="Held-out data of the same kind, for the metrics.")],
    out: Annotated[str, typer.Option(help="Folder or URL of the sweep.")],
    workers: Annotated[int | None, typer.Option(help="Training processes of a trial; replaces budget.workers.")] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Resume the sweep in --out; start a new one if the folder is empty.")
    ] = False,
    stop_after: Annotated[float | None, typer.Option(help="Minutes after which the sweep saves and stops.")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu or gpu.")] = "auto",
    address: AddressOption = None,
) -> None:
    """Train a model with many values of its configuration, and compare the results."""
    require_extra("sweep", "tune")

    from bsq_ray.training.launch import Interrupted
    from bsq_ray.training.monitoring.console import ProgressLine
    from bsq_ray.tuning.results import markdown_table
    from bsq_ray.tuning.run_sweep import run_sweep
    from bsq_ray.tuning.sweep_config import load_sweep
    from bsq_ray.tuning.sweep_progress import SweepProgress

    if workers is not None and workers < 1:
        raise ValueError(f"--workers {workers} must be 1 or more; a trial trains on Ray")
    if stop_after is not None and stop_after <= 0:
        raise ValueError(f"--stop-after {stop_after:g} must be positive")
    sweep_config = load_sweep(config)
    if workers is not None:
        budget = sweep_config.budget.model_copy(update={"workers": workers})
        sweep_config = sweep_config.model_copy(update={"budget": budget})
    try:
        with ProgressLine() as progress_line:
            result = run_sweep(
                sweep_config,
                data,
                held_out,
                out,
                resume=resume,
                address=address,
                device=parse_device(device),
                stop_after_minutes=stop_after,
                on_event=SweepProgress(progress_line).on_event,
            )
    except Interrupted as stop:
        raise Interrupted(f"{stop}. Resume with: {resume_command(context.obj)}") from None
    print(markdown_table(result.study))
    folder = out.rstrip("/")
    print(f"\nbest: trial {result.best.number}, as a preset in {folder}/best.yaml")
    print(f"results: {folder}/README.md, results.parquet")
