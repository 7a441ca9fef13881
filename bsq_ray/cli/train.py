"""Commands that train, and plan a training."""

from __future__ import annotations

from typing import Annotated

import typer

from bsq_ray.cli.options import AddressOption, OverridesArgument, parse_device, parse_int_range, resume_command


def train(
    stage: Annotated[str, typer.Argument(help="tokenizer, masked-lm or prior.")],
    config: Annotated[str, typer.Option(help="Preset name or YAML file.")],
    data: Annotated[str, typer.Option(help="Packed training images, or a token table.")],
    out: Annotated[str, typer.Option(help="Folder or URL of the run.")],
    workers: Annotated[str, typer.Option(help="Training processes, or a range: 8-16; 0 trains without Ray.")] = "1",
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in --out.")] = False,
    held_out: Annotated[str | None, typer.Option(help="Packed images for evaluations along the way.")] = None,
    minutes: Annotated[float | None, typer.Option(help="Time limit; the schedule then follows the clock.")] = None,
    init: Annotated[str | None, typer.Option(help="Tokenizer to begin with, such as the image model of clips.")] = None,
    device: Annotated[str, typer.Option(help="cpu, gpu, or auto: GPUs if the cluster has or can start any.")] = "auto",
    address: AddressOption = None,
    overrides: OverridesArgument = None,
) -> None:
    """Train a model."""
    from bsq_ray.config import load_config
    from bsq_ray.training.launch import Interrupted
    from bsq_ray.training.launch import train as launch
    from bsq_ray.training.monitoring.summary import format_summary

    min_workers, max_workers = parse_int_range(workers, "--workers")
    run_config = load_config(config, overrides or [])
    if stage != run_config.stage:
        raise ValueError(f"stage '{stage}' is not that of {config}, which is {run_config.stage}")
    try:
        result = launch(
            run_config,
            data,
            out,
            max_workers,
            resume,
            address,
            held_out,
            minutes,
            parse_device(device),
            min_workers,
            init_url=init,
        )
    except Interrupted as stop:
        raise Interrupted(f"{stop}. Go on with: {resume_command()}") from None
    print("\n".join(format_summary(result, out)))


def plan_run(
    config: Annotated[str, typer.Option(help="Preset name or YAML file.")],
    gpu: Annotated[str, typer.Option(help="a5000, a6000, a100-40, a100-80, h100, l4, a10g or 4090.")],
    gpus: Annotated[int, typer.Option(help="How many, one worker each.")],
    gpus_per_server: Annotated[int, typer.Option(help="Cards of one server.")] = 8,
    network_gbit: Annotated[float, typer.Option(help="Between servers, Gbit/s.")] = 25.0,
    efficiency: Annotated[float, typer.Option(help="Share of the card's peak that is reached.")] = 0.19,
    overrides: OverridesArgument = None,
) -> None:
    """Say what a training run needs before it is started: memory, time, data rate, network."""
    from bsq_ray.config import load_config
    from bsq_ray.planning import format_plan, make_plan

    run_plan = make_plan(load_config(config, overrides or []), gpu, gpus, network_gbit, gpus_per_server, efficiency)
    print(format_plan(run_plan), end="")
