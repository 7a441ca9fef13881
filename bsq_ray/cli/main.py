"""The `bsq-ray` command: parses the arguments, calls one function, prints the result.

Results go to stdout, progress and errors to stderr. Exit status: 0 done, 1 the work failed, 2 the input or the call is
wrong, 130 stopped after saving. A command imports its packages when it runs, so that `--help` is fast.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Annotated, Any

import typer

from bsq_ray.cli import data, demos, evaluate, inference, models, serve, sweep, train
from bsq_ray.cli.extras import MissingExtraError, missing_extra_message
from bsq_ray.runtime.standard_streams import prepare_standard_streams

app = typer.Typer(
    invoke_without_command=True, add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None
)
data_app = typer.Typer(invoke_without_command=True, help="Pack images or videos into shards, and inspect shards.")
evaluate_app = typer.Typer(invoke_without_command=True, help="Evaluate a trained model.")

app.command("quickstart")(demos.quickstart)
app.command("demo-generate")(demos.demo_generate)
app.command("demo-compress")(demos.demo_compress)
app.add_typer(data_app, name="data")
data_app.command("pack")(data.data_pack)
data_app.command("index")(data.data_index)
data_app.command("inspect")(data.data_inspect)
app.command("plan")(train.plan_run)
app.command("train")(train.train)
app.command("sweep")(sweep.sweep)
app.command("tokenize")(data.tokenize_images)
app.add_typer(evaluate_app, name="evaluate")
evaluate_app.command("reconstruction")(evaluate.evaluate_reconstruction)
evaluate_app.command("generation")(evaluate.evaluate_generation)
evaluate_app.command("compression")(evaluate.evaluate_compression)
app.command("reconstruct")(inference.reconstruct)
app.command("generate")(inference.generate)
app.command("compress")(inference.compress)
app.command("decompress")(inference.decompress)
app.command("serve")(serve.serve)
app.command("models")(models.models)
app.command("export")(models.export)
app.command("pretrain")(models.pretrain)
app.command("info")(inference.info)
app.command("import-reference")(inference.import_reference)


@app.callback()
def options(
    context: typer.Context,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """Train, evaluate and serve Binary Spherical Quantization (BSQ) visual tokenizers on Ray."""
    print_help_without_command(context)


@data_app.callback()
@evaluate_app.callback()
def print_help_without_command(context: typer.Context) -> None:
    if context.invoked_subcommand is None:
        print(context.get_help())
        raise typer.Exit(2)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a command and exit with its status; errors become one line on stderr.

    Args:
        arguments: words after `bsq-ray`; None takes those of the process.
    """
    prepare_standard_streams()
    words = list(sys.argv[1:] if arguments is None else arguments)
    # Accepted at any position, because people append it to a command that has just failed.
    debug = "--debug" in words
    status, message = _run([word for word in words if word != "--debug"], debug)
    if message:
        print(message, file=sys.stderr)
    sys.exit(status)


def _run(arguments: list[str], debug: bool) -> tuple[int, str]:
    """Return the exit status and the line for stderr of a command."""
    command: Any = typer.main.get_command(app)
    try:
        code = command.main(args=arguments, prog_name="bsq-ray", standalone_mode=False, obj=arguments)
    except (KeyboardInterrupt, typer.Abort):
        return 130, "bsq-ray: interrupted"
    except Exception as error:
        if isinstance(error, _usage_error_type()):
            return 2, f"bsq-ray: {error.format_message()}"  # type: ignore[attr-defined]
        if debug:
            raise
        return _format_error(error)
    return (code if isinstance(code, int) else 0), ""


def _usage_error_type() -> type[Exception]:
    """Return the base class of parsing errors: that of click, or of the copy that newer versions of typer contain."""
    base = typer.BadParameter.__base__
    assert base is not None
    return base


def _format_error(error: Exception) -> tuple[int, str]:
    """Return the exit status and the line for an exception of a command."""
    text = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, MissingExtraError):
        return 2, text
    if isinstance(error, ImportError) and (message := missing_extra_message(error)):
        return 2, f"bsq-ray: {message}"
    if isinstance(error, ValueError):
        return 2, f"bsq-ray: {text}"
    # Here, because the module imports torch; an exception of it can only be raised if it is imported already.
    if "bsq_ray.training.launch" in sys.modules:
        from bsq_ray.training.launch import Interrupted

        if isinstance(error, Interrupted):
            return 130, f"bsq-ray: {text}"
    hint = "" if isinstance(error, RuntimeError) else f" ({type(error).__name__}; --debug shows the traceback)"
    return 1, f"bsq-ray: {text}{hint}"
