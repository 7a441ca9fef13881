"""The `bsq-ray` command: parses, calls one function, prints.

Results go to stdout, progress and errors to stderr. Exit status: 0 done, 1 the work failed, 2 the input or the call was
wrong, 130 interrupted after saving. What a command needs is imported when it runs, so that `--help` is quick.
"""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)
data_app = typer.Typer(no_args_is_help=True, help="Pack images into shards, and look at what is packed.")
evaluate_app = typer.Typer(no_args_is_help=True, help="Measure a trained model.")
app.add_typer(data_app, name="data")
app.add_typer(evaluate_app, name="evaluate")

Address = Annotated[str | None, typer.Option(help="Ray cluster; default: one on this machine, for the call.")]
Weights = Annotated[str, typer.Option(help="ema or plain weights of the model folder.")]


@app.callback()
def options(
    debug: Annotated[bool, typer.Option("--debug", help="Show where an error came from.")] = False,
) -> None:
    """Train and use Binary Spherical Quantization tokenizers, on a laptop or on a Ray cluster."""


@app.command()
def quickstart(
    images: Annotated[Path | None, typer.Option(help="Your own folder of photographs.")] = None,
    out: Annotated[Path, typer.Option(help="Folder for everything it makes.")] = Path("quickstart"),
    minutes: Annotated[float, typer.Option(help="Minutes of training.")] = 6.0,
) -> None:
    """Train a small tokenizer on real photographs and show what it can do."""
    from bsq_ray.quickstart import run_quickstart

    done = run_quickstart(images, out, minutes)
    print(done.summary)


@app.command("demo-generate")
def demo_generate(
    images: Annotated[Path | None, typer.Option(help="Your own folder, with a subfolder for each class.")] = None,
    out: Annotated[Path, typer.Option(help="Folder for everything it makes.")] = Path("demo-generate"),
    minutes: Annotated[float, typer.Option(help="Minutes of training.")] = 16.0,
) -> None:
    """Train a tokenizer and a masked language model on labelled photographs, and draw images of the classes."""
    from bsq_ray.demo_generate import run_demo

    print(run_demo(images, out, minutes).summary)


@data_app.command("pack")
def data_pack(
    src: Annotated[str, typer.Argument(help="Folder or URL of images; its first level of folders names the classes.")],
    dest: Annotated[str, typer.Argument(help="Folder or URL for the shards.")],
    kind: Annotated[str, typer.Option(help="images.")] = "images",
    shard_mb: Annotated[float, typer.Option(help="Size of a shard, MB.")] = 100.0,
    max_side: Annotated[int | None, typer.Option(help="Shrink images with a longer side to it.")] = None,
    seed: Annotated[int, typer.Option(help="Of the shuffle over shards.")] = 0,
    workers: Annotated[int | None, typer.Option(help="Tasks at once; 0 packs without Ray.")] = None,
    address: Address = None,
) -> None:
    """Pack a folder of images into WebDataset shards with a manifest."""
    from bsq_ray.data.pack import pack_images

    if kind != "images":
        raise ValueError(f"--kind {kind} is not known; this version packs images")
    with _bar("packing") as bar:
        report = pack_images(src, dest, shard_mb, max_side, seed, workers, address, bar)
    manifest = report.manifest
    print(f"{manifest.samples} images in {len(manifest.shards)} shards of {len(manifest.classes)} classes in {dest}")
    if report.damaged:
        print(f"{len(report.damaged)} files could not be decoded; they are listed in {dest}/damaged.txt")
    if report.ignored:
        print(f"{report.ignored} files are no images and were left out")


@data_app.command("index")
def data_index(url: Annotated[str, typer.Argument(help="Folder or URL of WebDataset .tar shards.")]) -> None:
    """Write the manifest for WebDataset shards that were made elsewhere."""
    from bsq_ray.data.pack import index_shards

    with _bar("indexing") as bar:
        manifest = index_shards(url, bar)
    print(f"{manifest.samples} images in {len(manifest.shards)} shards; wrote {url}/manifest.parquet")


@data_app.command("inspect")
def data_inspect(
    dest: Annotated[str, typer.Argument(help="Folder or URL of packed shards.")],
    sheet: Annotated[str, typer.Option(help="Where the contact sheet goes.")] = "contact-sheet.png",
) -> None:
    """Count, check and show a packed data set."""
    from bsq_ray.data.inspect import inspect_shards

    found = inspect_shards(dest, sheet)
    manifest = found.manifest
    size = sum(shard.bytes for shard in manifest.shards) / 1e6
    print(f"{manifest.samples} images, {len(manifest.shards)} shards, {size:.1f} MB, hash {manifest.hash[:12]}")
    for name, count in sorted(found.per_class.items(), key=lambda item: -item[1])[:20]:
        print(f"  {name}: {count}")
    if len(found.per_class) > 20:
        print(f"  and {len(found.per_class) - 20} more classes")
    for side, (low, middle, high) in {"width": found.widths, "height": found.heights}.items():
        print(f"{side} {low} to {high} px, median {middle} ({found.measured} images measured)")
    print(f"contact sheet: {sheet}")
    for fault in found.faults:
        print(f"fault: {fault}")
    if found.faults:
        raise RuntimeError(f"{dest} has {len(found.faults)} faults, listed above")


@app.command()
def train(
    stage: Annotated[str, typer.Argument(help="tokenizer, masked-lm or prior.")],
    config: Annotated[str, typer.Option(help="Preset name or YAML file.")],
    data: Annotated[str, typer.Option(help="Packed training images, or a token table.")],
    out: Annotated[str, typer.Option(help="Folder or URL of the run.")],
    workers: Annotated[int, typer.Option(help="Training processes; 0 trains without Ray.")] = 1,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in --out.")] = False,
    held_out: Annotated[str | None, typer.Option(help="Packed images for evaluations along the way.")] = None,
    minutes: Annotated[float | None, typer.Option(help="Time limit; the schedule then follows the clock.")] = None,
    address: Address = None,
    overrides: Annotated[list[str] | None, typer.Argument(help="key.path=value, any key of the configuration.")] = None,
) -> None:
    """Train a model."""
    from bsq_ray.config import load_config
    from bsq_ray.training.launch import Interrupted
    from bsq_ray.training.launch import train as launch

    run = load_config(config, overrides or [])
    if stage != run.stage:
        raise ValueError(f"stage '{stage}' is not that of {config}, which is {run.stage}")
    try:
        result = launch(run, data, out, workers, resume, address, held_out, minutes)
    except Interrupted as stop:
        again = [argument for argument in sys.argv[1:] if argument != "--resume"]
        told = str(stop).split(";")[0]
        command = shlex.join(["bsq-ray", *again, "--resume"])
        raise Interrupted(f"{told}; checkpoint and model are saved in {out}. Go on with: {command}") from None
    figures = ", ".join(f"{name} {value:.4g}" for name, value in result.figures.items())
    print(f"trained {result.step} steps at {result.images_per_second:.1f} images/s; {figures}")
    print(f"model: {out.rstrip('/')}/model")


@evaluate_app.command("reconstruction")
def evaluate_reconstruction(
    model: Annotated[str, typer.Option(help="Model folder.")],
    data: Annotated[str, typer.Option(help="Packed images.")],
    out: Annotated[str, typer.Option(help="Folder or URL for the results.")],
    workers: Annotated[int, typer.Option(help="Measuring processes; 0 measures without Ray.")] = 1,
    weights: Weights = "ema",
    batch_size: Annotated[int, typer.Option(help="Images at once.")] = 32,
    limit: Annotated[int | None, typer.Option(help="Only the first so many images.")] = None,
    max_damaged: Annotated[int, typer.Option(help="Images that may be unreadable.")] = 0,
    published: Annotated[bool, typer.Option("--published", help="Show published figures beside.")] = False,
    address: Address = None,
) -> None:
    """PSNR, SSIM, LPIPS, rFID, KID and code usage, beside the trivial codec at the same bits."""
    from bsq_ray.evaluation.reconstruction import evaluate_reconstruction as evaluate

    kind = _weights(weights)
    with _bar("measuring") as bar:
        evaluate(model, data, out, workers, address, kind, batch_size, limit, published, max_damaged, bar)
    from bsq_ray import storage

    print(storage.read_bytes(storage.join(out, "results.md")).decode(), end="")
    print(f"\nresults: {out.rstrip('/')}/results.json, results.md, reconstructions.png")


@evaluate_app.command("generation")
def evaluate_generation(
    model: Annotated[str, typer.Option(help="Model folder of a masked language model.")],
    data: Annotated[str, typer.Option(help="Packed real images.")],
    out: Annotated[str, typer.Option(help="Folder or URL for the results.")],
    workers: Annotated[int, typer.Option(help="Drawing and measuring processes; 0 works without Ray.")] = 1,
    count: Annotated[int | None, typer.Option(help="Images to draw; default: as many as there are real ones.")] = None,
    steps: Annotated[int | None, typer.Option(help="Forward passes of an image.")] = None,
    guidance: Annotated[float | None, typer.Option(help="Strength of classifier-free guidance.")] = None,
    seed: Annotated[int, typer.Option(help="Of the drawn images.")] = 0,
    known: Annotated[str | None, typer.Option(help="Packed images that show how classes look.")] = None,
    baseline: Annotated[str | None, typer.Option(help="Token table: a row of its per-position frequencies.")] = None,
    weights: Weights = "ema",
    address: Address = None,
) -> None:
    """FID, KID, precision, recall, and whether the classes can be told."""
    from bsq_ray import storage
    from bsq_ray.evaluation.generation import evaluate_generation as evaluate

    changes = _given(steps=steps, guidance=guidance)
    with _bar("drawing") as bar:
        kind = _weights(weights)
        evaluate(model, data, out, workers, address, count, changes, seed, known, baseline, kind, bar)
    print(storage.read_bytes(storage.join(out, "results.md")).decode(), end="")
    print(f"\nresults: {out.rstrip('/')}/results.json, results.md, samples.png")


@app.command("tokenize")
def tokenize_images(
    model: Annotated[str, typer.Option(help="Model folder of a tokenizer.")],
    data: Annotated[str, typer.Option(help="Packed images.")],
    out: Annotated[str, typer.Option(help="Folder or URL of the token table.")],
    workers: Annotated[int, typer.Option(help="Processes; 0 works without Ray.")] = 1,
    views: Annotated[int, typer.Option(help="Rows of each image: its centre, then random crops.")] = 1,
    scale: Annotated[float, typer.Option(help="Random crops come from images up to so many times larger.")] = 1.25,
    flip: Annotated[bool, typer.Option("--flip", help="Mirror half of the random crops.")] = False,
    batch_size: Annotated[int, typer.Option(help="Images at once.")] = 64,
    seed: Annotated[int, typer.Option(help="Of the random crops.")] = 0,
    address: Address = None,
) -> None:
    """Turn packed images into a token table; what is already there is not done again."""
    from bsq_ray.data.tokenize import tokenize

    with _bar("tokenizing") as bar:
        done = tokenize(model, data, out, workers, address, views, scale, flip, batch_size, seed, bar)
    print(f"{done.table.rows} rows in {len(done.table.parts)} parts ({done.made} made now) in {out}")
    for line in done.damaged:
        print(f"left out: {line}")


@app.command()
def generate(
    model: Annotated[str, typer.Option(help="Model folder of a masked language model.")],
    out: Annotated[str, typer.Option(help="Folder for the images.")],
    classes: Annotated[str, typer.Option(help="Numbers of classes, such as 1,2; default: all.")] = "",
    count: Annotated[int, typer.Option(help="Images of each class.")] = 8,
    steps: Annotated[int | None, typer.Option(help="Forward passes of an image.")] = None,
    guidance: Annotated[float | None, typer.Option(help="Strength of classifier-free guidance.")] = None,
    temperature: Annotated[float | None, typer.Option(help="Of the noise on confidences.")] = None,
    seed: Annotated[int, typer.Option(help="The same seed draws the same images.")] = 0,
    between: Annotated[bool, typer.Option("--between", help="Go from the first of two classes to the second.")] = False,
    image: Annotated[str | None, typer.Option(help="An image to fill in.")] = None,
    mask: Annotated[str | None, typer.Option(help="White where the image is to be drawn anew.")] = None,
    weights: Weights = "ema",
) -> None:
    """Draw images of classes, or fill in a part of one."""
    from bsq_ray.evaluation.drawing import Request, draw

    changes = _given(steps=steps, guidance=guidance, temperature=temperature)
    request = Request(_numbers(classes, "--classes"), count, seed, changes, between, image, mask)
    written = draw(model, out, request, _weights(weights))
    print(f"{written} images and sheet.png in {out}")


@app.command()
def reconstruct(
    model: Annotated[str, typer.Option(help="Model folder.")],
    image: Annotated[str, typer.Argument(metavar="IN", help="An image file.")],
    out: Annotated[Path, typer.Argument(metavar="OUT.png", help="Where the reconstruction goes.")],
    weights: Weights = "ema",
) -> None:
    """Encode and decode one image."""
    from bsq_ray.evaluation.single import reconstruct_file

    print(reconstruct_file(model, image, out, _weights(weights)))


@app.command()
def compress(
    model: Annotated[str, typer.Option(help="Model folder of a prior, or of a tokenizer (raw bits).")],
    image: Annotated[str, typer.Argument(metavar="IN", help="An image file, or - for the standard input.")],
    out: Annotated[str, typer.Argument(metavar="OUT.bsq", help="The file, or - for the standard output.")],
    weights: Weights = "ema",
) -> None:
    """Compress an image."""
    from bsq_ray.codec.files import compress_file

    print(compress_file(model, image, out, _weights(weights)), file=sys.stderr)


@app.command()
def decompress(
    model: Annotated[str, typer.Option(help="The model folder that the file was written with.")],
    source: Annotated[str, typer.Argument(metavar="IN.bsq", help="The file, or - for the standard input.")],
    out: Annotated[str, typer.Argument(metavar="OUT", help="A .png or .webp file, or - for PNG to standard output.")],
    region: Annotated[str | None, typer.Option(help="left,top,right,bottom in pixels: only this part.")] = None,
    max_pixels: Annotated[int, typer.Option(help="Larger images are refused.")] = 2**27,
    weights: Weights = "ema",
) -> None:
    """Decompress a .bsq file."""
    from bsq_ray.codec.files import decompress_file

    box = None
    if region is not None:
        edges = _numbers(region, "--region")
        if len(edges) != 4:
            raise ValueError(f"--region {region} are not four numbers: left,top,right,bottom")
        box = edges[0], edges[1], edges[2], edges[3]
    print(decompress_file(model, source, out, box, max_pixels, _weights(weights)), file=sys.stderr)


@app.command("import-reference")
def import_reference(
    checkpoint: Annotated[str, typer.Argument(help="Checkpoint of the published reference code.")],
    config: Annotated[str, typer.Option(help="Preset of the same model.")],
    out: Annotated[str, typer.Option(help="Model folder to write.")],
    weights: Weights = "ema",
) -> None:
    """Turn a checkpoint of the published reference code into a model folder, without running what it pickles."""
    from bsq_ray.reference import import_reference as convert

    imported = convert(checkpoint, config, out, _weights(weights))
    steps = f", {imported.iteration} steps" if imported.iteration is not None else ""
    print(f"imported model {imported.id[:12]}{steps} to {out}")


@app.command("plan")
def plan_run(
    config: Annotated[str, typer.Option(help="Preset name or YAML file.")],
    gpu: Annotated[str, typer.Option(help="a5000, a6000, a100-40, a100-80, h100, l4, a10g or 4090.")],
    gpus: Annotated[int, typer.Option(help="How many, one worker each.")],
    gpus_per_server: Annotated[int, typer.Option(help="Cards of one server.")] = 8,
    network_gbit: Annotated[float, typer.Option(help="Between servers, Gbit/s.")] = 25.0,
    efficiency: Annotated[float, typer.Option(help="Share of the card's peak that is reached.")] = 0.19,
    overrides: Annotated[list[str] | None, typer.Argument(help="key.path=value, any key of the configuration.")] = None,
) -> None:
    """Say what a training run needs before it is started: memory, time, data rate, network."""
    from bsq_ray.config import TokenizerConfig, expect, load_config
    from bsq_ray.planning import plan, render

    run = expect(load_config(config, overrides or []), TokenizerConfig, config)
    made = plan(run, gpu, gpus, network_gbit, gpus_per_server, efficiency)
    print(render(made), end="")


@app.command()
def info(
    what: Annotated[str, typer.Argument(metavar="M", help="Model folder, run folder, packed data set or preset.")],
) -> None:
    """Say what a folder or preset is."""
    from bsq_ray.evaluation.single import describe

    print(describe(what))


def _given(**values: Any) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None}


def _numbers(text: str, option: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",") if part.strip()]
    except ValueError:
        raise ValueError(f"{option} {text} are not numbers with commas between them, such as 1,2") from None


def _weights(name: str) -> Literal["ema", "plain"]:
    if name not in ("ema", "plain"):
        raise ValueError(f"--weights {name} is not known; choose ema or plain")
    return "plain" if name == "plain" else "ema"


class _Bar:
    """A progress bar on stderr, called with done and total."""

    def __init__(self, label: str) -> None:
        from rich.console import Console
        from rich.progress import Progress

        self._progress = Progress(console=Console(file=sys.stderr), transient=True)
        self._task = self._progress.add_task(label, total=None)

    def __enter__(self) -> _Bar:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def __call__(self, done: int, total: int) -> None:
        self._progress.update(self._task, completed=done, total=total)


def _bar(label: str) -> _Bar:
    return _Bar(label)


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
        kinds = {kind.__name__ for kind in type(error).__mro__}
        if "NoArgsIsHelpError" in kinds:
            print(error)
            return 2, ""
        if "ClickException" in kinds:
            return 2, error.format_message()  # type: ignore[attr-defined]
        if "Abort" in kinds:
            return 130, "interrupted"
        if debug:
            raise
        return _explain(error, kinds)
    return (code if isinstance(code, int) else 0), ""


def _explain(error: Exception, kinds: set[str]) -> tuple[int, str]:
    """Exit status and one line for what a command raised."""
    text = " ".join(str(error).split()) or type(error).__name__
    if "Interrupted" in kinds:
        return 130, text
    if isinstance(error, ValueError):
        return 2, text
    hint = "" if isinstance(error, RuntimeError) else f" ({type(error).__name__}; --debug shows where)"
    return 1, text + hint
