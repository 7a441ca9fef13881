"""Options that several commands share, and how they show that they are at work."""

from __future__ import annotations

import shlex
import sys
from typing import Annotated, Any, Literal, cast

import typer

AddressOption = Annotated[str | None, typer.Option(help="Ray cluster; default: one on this machine, for the call.")]
WeightsOption = Annotated[str, typer.Option(help="ema or plain weights of the model folder.")]
OverridesArgument = Annotated[list[str] | None, typer.Argument(help="key.path=value, any key of the configuration.")]


def drop_none(**values: Any) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None}


def parse_ints(text: str, option: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",") if part.strip()]
    except ValueError:
        raise ValueError(f"{option} {text} are not numbers with commas between them, such as 1,2") from None


def parse_int_range(text: str, option: str) -> tuple[int, int]:
    first, dash, last = text.partition("-")
    try:
        return int(first), int(last if dash else first)
    except ValueError:
        raise ValueError(f"{option} {text} is neither a number, such as 8, nor a range, such as 4-8") from None


def parse_weights(name: str) -> Literal["ema", "plain"]:
    if name not in ("ema", "plain"):
        raise ValueError(f"--weights {name} is not known; choose ema or plain")
    return "plain" if name == "plain" else "ema"


def parse_device(name: str) -> Literal["auto", "cpu", "gpu"]:
    if name not in ("auto", "cpu", "gpu"):
        raise ValueError(f"--device {name} is not known; choose auto, cpu or gpu")
    return cast(Literal["auto", "cpu", "gpu"], name)


def resume_command() -> str:
    """The command that goes on with what this one has begun."""
    arguments = [word for word in sys.argv[1:] if word != "--resume"]
    return shlex.join(["bsq-ray", *arguments, "--resume"])


class ProgressBar:
    """A progress bar on stderr, called with done and total, 0 where it is not known; without a terminal one line."""

    def __init__(self, label: str) -> None:
        from rich.console import Console
        from rich.progress import Progress

        self._label = label
        console = Console(file=sys.stderr)
        self._progress = Progress(console=console, transient=True, disable=not console.is_terminal)
        self._task = self._progress.add_task(label, total=None)

    def __enter__(self) -> ProgressBar:
        self._progress.start()
        if not self._progress.console.is_terminal:
            self._progress.console.print(f"{self._label} …")
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def __call__(self, done: int, total: int) -> None:
        self._progress.update(self._task, completed=done, total=total or None)


def progress_bar(label: str) -> ProgressBar:
    return ProgressBar(label)
