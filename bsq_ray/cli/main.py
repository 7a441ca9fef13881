"""The `bsq-ray` command: parses, calls one function, prints.

Results go to stdout, progress and errors to stderr. Exit status: 0 done, 1 the work failed, 2 the input or the call was
wrong, 130 interrupted after saving. What a command needs is imported when it runs, so that `--help` is quick.
"""

from __future__ import annotations

import sys
from typing import Annotated, Any

import typer

from bsq_ray.cli import data, demos, evaluate, inference, serve, sweep, train

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)
data_app = typer.Typer(no_args_is_help=True, help="Pack images into shards, and look at what is packed.")
evaluate_app = typer.Typer(no_args_is_help=True, help="Measure a trained model.")

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
app.command("info")(inference.info)
app.command("import-reference")(inference.import_reference)


@app.callback()
def options(
    debug: Annotated[bool, typer.Option("--debug", help="Show where an error came from.")] = False,
) -> None:
    """Train and use Binary Spherical Quantization tokenizers, on a laptop or on a Ray cluster."""


def main() -> None:
    """Entry point: runs the command and turns what goes wrong into a line and an exit status."""
    arguments = sys.argv[1:]
    # Accepted anywhere, because it is added to a command that has just failed.
    debug = "--debug" in arguments
    status, message = _run([argument for argument in arguments if argument != "--debug"], debug)
    if message:
        print(f"bsq-ray: {message}", file=sys.stderr)
    sys.exit(status)


def _run(arguments: list[str], debug: bool) -> tuple[int, str]:
    command: Any = typer.main.get_command(app)
    try:
        code = command.main(args=arguments, prog_name="bsq-ray", standalone_mode=False)
    except KeyboardInterrupt:
        return 130, "interrupted"
    except Exception as error:
        # By name: typer's own click and the click package have the same classes twice.
        class_names = {kind.__name__ for kind in type(error).__mro__}
        if "NoArgsIsHelpError" in class_names:
            print(error)
            return 2, ""
        if "ClickException" in class_names:
            return 2, error.format_message()  # type: ignore[attr-defined]
        if "Abort" in class_names:
            return 130, "interrupted"
        if debug:
            raise
        return _format_error(error, class_names)
    return (code if isinstance(code, int) else 0), ""


def _format_error(error: Exception, class_names: set[str]) -> tuple[int, str]:
    """Exit status and one line for what a command raised."""
    text = " ".join(str(error).split()) or type(error).__name__
    if "Interrupted" in class_names:
        return 130, text
    if isinstance(error, ValueError):
        return 2, text
    hint = "" if isinstance(error, RuntimeError) else f" ({type(error).__name__}; --debug shows where)"
    return 1, text + hint
