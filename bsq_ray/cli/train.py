"""Commands that train a model and plan a training run."""

from __future__ import annotations

from typing import Annotated

import typer

from bsq_ray.cli.extras import require_extra
from bsq_ray.cli.options import AddressOption, OverridesArgument, parse_device, parse_int_range, resume_command


def train(
    context: typer.Context,
    stage: Annotated[str, typer.Argument(help="Model to train: tokenizer, masked-lm or prior.")],
    config: Annotated[str, typer.Option(help="Preset name or YAML file.")],
    data: Annotated[str, typer.Option(help="Packed images or videos, a token table, or a YAML file of several.")],
    out: Annotated[str, typer.Option(help="Folder or URL of the run.")],
    workers: Annotated[
        str, typer.Option(help="Training processes, or a range such as 8-16. 0 trains without Ray.")
    ] = "1",
    resume: Annotated[
        bool, typer.Option("--resume", help="Resume the run in --out; start a new one if the folder is empty.")
    ] = False,
    held_out: Annotated[str | None, typer.Option(help="Packed data for evaluations during training.")] = None,
    minutes: Annotated[
        float | None, typer.Option(help="Time limit in minutes; the schedule then follows the time.")
    ] = None,
    init: Annotated[
        str | None, typer.Option(help="Model folder of initial weights, such as an image tokenizer for clips.")
    ] = None,
    device: Annotated[
        str, typer.Option(help="cpu, gpu, or auto: GPUs if the cluster has any or can start any.")
    ] = "auto",
    address: AddressOption = None,
    overrides: OverridesArgument = None,
) -> None:
    """Train a model. Ctrl-C saves the model; the same command with --resume continues."""
    min_workers, max_workers = parse_int_range(workers, "--workers")
    require_extra("train", "train", *(("ray",) if max_workers else ()))

    from bsq_ray.config import load_config
    from bsq_ray.training.launch import Interrupted
    from bsq_ray.training.launch import train as launch
    from bsq_ray.training.monitoring.summary import format_summary

    run_config = load_config(config, overrides or [])
    if stage != run_config.stage:
        raise ValueError(f"stage '{stage}' does not match {config}, whose stage is {run_config.stage}")
    if run_config.training.engine.kind == "deepspeed":
        require_extra("train", "train", "deepspeed")
    try:
        result = launch(
            run_config,
            data,
            out,
            max_workers,
            resume=resume,
            address=address,
            held_out_url=held_out,
            minutes=minutes,
            device=parse_device(device),
            min_workers=min_workers,
            init_url=init,
        )
    except Interrupted as stop:
        raise Interrupted(f"{stop}. Resume with: {resume_command(context.obj)}") from None
    print("\n".join(format_summary(result, out)))


def plan_run(
    config: Annotated[str, typer.Option(help="Preset name or YAML file.")],
    gpu: Annotated[str, typer.Option(help="GPU type: a5000, a6000, a100-40, a100-80, h100, l4, a10g or 4090.")],
    gpus: Annotated[int, typer.Option(help="Number of GPUs, one worker each.")],
    gpus_per_node: Annotated[int, typer.Option(help="GPUs of a node.")] = 8,
    network_gbit: Annotated[float, typer.Option(help="Bandwidth between nodes, Gbit/s.")] = 25.0,
    efficiency: Annotated[float, typer.Option(help="Fraction of the GPU's peak throughput that is reached.")] = 0.19,
    overrides: OverridesArgument = None,
) -> None:
    """Estimate memory, time, data rate and network traffic of a training run."""
    from bsq_ray.config import load_config
    from bsq_ray.planning import format_plan, make_plan

    run_config = load_config(config, overrides or [])
    run_plan = make_plan(
        run_config, gpu, gpus, network_gbit=network_gbit, gpus_per_node=gpus_per_node, efficiency=efficiency
    )
    print(format_plan(run_plan), end="")
