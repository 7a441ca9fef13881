"""The command that tunes."""

from __future__ import annotations

from typing import Annotated

import typer

from bsq_ray.cli.options import AddressOption, parse_device, resume_command


def sweep(
    config: Annotated[str, typer.Option(help="YAML file of the sweep; jobs/sweeps/ has examples.")],
    data: Annotated[str, typer.Option(help="Packed training images, or a token table.")],
    held_out: Annotated[str, typer.Option(help="What the trials are measured on.")],
    out: Annotated[str, typer.Option(help="Folder or URL of the sweep.")],
    workers: Annotated[
        int | None, typer.Option(help="Training processes of a trial, instead of budget.workers.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the sweep in --out.")] = False,
    stop_after: Annotated[float | None, typer.Option(help="Minutes after which it saves and stops.")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu or gpu.")] = "auto",
    address: AddressOption = None,
) -> None:
    """Train a model with many values of its configuration, and compare them."""
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
    sweep_config, device_kind = load_sweep(config), parse_device(device)
    if workers is not None:
        sweep_config = sweep_config.model_copy(
            update={"budget": sweep_config.budget.model_copy(update={"workers": workers})}
        )
    try:
        with ProgressLine() as progress_line:
            result = run_sweep(
                sweep_config,
                data,
                held_out,
                out,
                resume,
                address,
                device_kind,
                stop_after,
                SweepProgress(progress_line).on_event,
            )
    except Interrupted as stop:
        raise Interrupted(f"{stop}. Go on with: {resume_command()}") from None
    print(markdown_table(result.study))
    folder = out.rstrip("/")
    print(f"\nbest: trial {result.best.number}, as a preset in {folder}/best.yaml")
    print(f"results: {folder}/README.md, results.parquet")
