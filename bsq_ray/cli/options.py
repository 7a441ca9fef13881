"""Options that several commands share, their parsers, and the progress bar."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Annotated, Any, Literal, cast, get_args

import typer

if TYPE_CHECKING:
    from bsq_ray.model_export import ExportDtype
    from bsq_ray.model_folder import WeightsKind

AddressOption = Annotated[
    str | None, typer.Option(help="Address of a Ray cluster. Default: start Ray on this machine for this call.")
]
WeightsOption = Annotated[str, typer.Option(help="Weights of the model folder: ema (averaged) or raw.")]
OverridesArgument = Annotated[
    list[str] | None, typer.Argument(help="Overrides key.path=value of any key of the configuration.")
]


def drop_none(**values: Any) -> dict[str, Any]:
    """Return the values that are not None, by name."""
    return {name: value for name, value in values.items() if value is not None}


def parse_ints(text: str, option: str) -> list[int]:
    """Parse integers with commas between them.

    Raises:
        ValueError: a part is not an integer.
    """
    try:
        return [int(part) for part in text.split(",") if part.strip()]
    except ValueError:
        raise ValueError(f"{option} {text} is not a list of integers; separate them by commas, such as 1,2") from None


def parse_floats(text: str, option: str) -> list[float]:
    """Parse numbers with commas between them.

    Raises:
        ValueError: a part is not a number.
    """
    try:
        return [float(part) for part in text.split(",") if part.strip()]
    except ValueError:
        raise ValueError(f"{option} {text} is not a list of numbers; write them as 0.1,0.2") from None


def parse_int_range(text: str, option: str) -> tuple[int, int]:
    """Parse a number, such as 8, or a range, such as 4-8, to its lowest and highest value.

    Raises:
        ValueError: the text is neither.
    """
    first, dash, last = text.partition("-")
    try:
        return int(first), int(last if dash else first)
    except ValueError:
        raise ValueError(f"{option} {text} is not a number or range; write 8 or 4-8") from None


def parse_weights(name: str) -> WeightsKind:
    """Parse the value of --weights.

    Raises:
        ValueError: the name is unknown.
    """
    from bsq_ray.model_folder import WeightsKind

    return cast("WeightsKind", _parse_choice("--weights", name, get_args(WeightsKind)))


def parse_dtype(name: str) -> ExportDtype:
    """Parse the value of --dtype.

    Raises:
        ValueError: the name is unknown.
    """
    from bsq_ray.model_export import ExportDtype

    return cast("ExportDtype", _parse_choice("--dtype", name, get_args(ExportDtype)))


def parse_device(name: str) -> Literal["auto", "cpu", "gpu"]:
    """Parse the value of --device.

    Raises:
        ValueError: the name is unknown.
    """
    return cast(Literal["auto", "cpu", "gpu"], _parse_choice("--device", name, ("auto", "cpu", "gpu")))


def _parse_choice(option: str, name: str, choices: Sequence[str]) -> str:
    if name not in choices:
        raise ValueError(f"unknown {option} {name}; choose {', '.join(choices[:-1])} or {choices[-1]}")
    return name


def resume_command(arguments: Sequence[str]) -> str:
    """Return the command line that resumes the call with these arguments."""
    return shlex.join(["bsq-ray", *(word for word in arguments if word != "--resume"), "--resume"])


def announce_ray(num_workers: int, address: str | None) -> None:
    """Print on stderr that the command starts or connects to Ray, which takes seconds; nothing without workers."""
    # `ray_session` itself names an address of the environment.
    if num_workers and (address or not os.environ.get("RAY_ADDRESS")):
        print(f"connecting to Ray at {address}" if address else "starting Ray", file=sys.stderr, flush=True)


class ProgressBar:
    """A progress bar on stderr; a single line if stderr is not a terminal.

    Call it with the completed and the total number of items; a total of 0 is unknown.
    """

    def __init__(self, label: str) -> None:
        from rich.console import Console
        from rich.progress import Progress

        self._label = label
        console = Console(file=sys.stderr)
        self._progress = Progress(console=console, transient=True, disable=not console.is_terminal)
        self._task = self._progress.add_task(label, total=None)

    # A terminal or pipe that is gone ends the display, not the work.
    def __enter__(self) -> ProgressBar:
        with suppress(OSError):
            self._progress.start()
            if not self._progress.console.is_terminal:
                self._progress.console.print(f"{self._label} …")
        return self

    def __exit__(self, *_: object) -> None:
        with suppress(OSError):
            self._progress.stop()

    def __call__(self, done: int, total: int) -> None:
        with suppress(OSError):
            self._progress.update(self._task, completed=done, total=total or None)
