"""The command line: commands, options, exit statuses and error messages."""

import subprocess
import sys
import time
from pathlib import Path

import pytest

from bsq_ray.cli import extras, main
from bsq_ray.cli.options import resume_command

SWEEP = ["sweep", "--data", "x", "--held-out", "x", "--out", "y", "--config"]
DEMO_SWEEP = str(Path(__file__).parents[1] / "jobs" / "sweeps" / "demo.yaml")

TOKENIZE = ["tokenize", "--model", "a", "--data", "b", "--out", "c"]
RUN = ["--config", "imagenet128-bsq18", "--data", "x", "--out", "y"]
RECONSTRUCTION = ["evaluate", "reconstruction", "--model", "a", "--data", "b", "--out", "c"]


@pytest.fixture
def run_cli(monkeypatch, capsys):
    """Runs a command in this process: (exit status, stdout, stderr)."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["bsq-ray", *map(str, arguments)])
        with pytest.raises(SystemExit) as exit_:
            main.main()
        captured = capsys.readouterr()
        return exit_.value.code, captured.out, captured.err

    return run


def test_help_lists_expected_commands(run_cli):
    """A command is part of the contract: it is added or removed on purpose."""
    help_lines = run_cli("--help")[1].split("Commands:")[1].splitlines()
    assert {line.split()[0] for line in help_lines if line.startswith("  ") and line[2] != " "} == {
        "quickstart", "demo-generate", "demo-compress", "data", "train", "sweep", "tokenize", "evaluate", "reconstruct",
        "generate", "compress", "decompress", "plan", "import-reference", "info", "serve", "models", "export",
        "pretrain",
    }  # fmt: skip
    assert all(name in run_cli("data", "--help")[1] for name in ("pack", "index", "inspect"))
    assert all(name in run_cli("evaluate", "--help")[1] for name in ("reconstruction", "generation"))


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["nonsense"], "No such command 'nonsense'"),
        (["train"], "Missing argument 'stage'"),
        (["train", "tokenizer", "--config", "demmo", "--data", "x", "--out", "y"], "did you mean demo?"),
        (["train", "prior", "--config", "demo", "--data", "x", "--out", "y"], "stage 'prior' does not match demo"),
        (
            ["train", "tokenizer", "--config", "demo", "--data", "x", "--out", "y", "model.encoder.widht=3"],
            "unknown key model.encoder.widht; did you mean model.encoder.width?",
        ),
        (["train", "tokenizer", "--config", "demo", "--data", "/none", "--out", "y"], "is not a packed data set"),
        ([*SWEEP, "/none.yaml"], "cannot read /none.yaml: it does not exist"),
        ([*SWEEP, DEMO_SWEEP], "x is not a packed data set"),
        ([*SWEEP, DEMO_SWEEP, "--workers", "0"], "--workers 0 must be 1 or more; a trial trains on Ray"),
        ([*SWEEP, DEMO_SWEEP, "--stop-after", "0"], "--stop-after 0 must be positive"),
        (["data", "pack", "/none", "y"], "/none does not exist"),
        (["data", "pack", "/none", "y", "--kind", "sounds"], "unknown --kind sounds"),
        (["data", "inspect", "/none"], "is not a packed data set"),
        (["data", "index", "/none"], "contains no .tar shards"),
        (["evaluate", "reconstruction", "--model", "/none", "--data", "x", "--out", "y"], "/none"),
        (["reconstruct", "--model", "/none", "a.png", "b.png"], "/none"),
        (["reconstruct", "--model", "/none", "a.png", "b.png", "--weights", "other"], "choose ema or "),
        (["tokenize", "--model", "/none", "--data", "x", "--out", "y"], "/none"),
        (
            ["train", "masked-lm", "--config", "masked-lm-demo", "--data", "/none", "--out", "y"],
            "not a complete token table",
        ),
        (["train", "prior", "--config", "prior-demo", "--data", "/none", "--out", "y"], "not a complete token table"),
        (["evaluate", "generation", "--model", "/none", "--data", "x", "--out", "y"], "/none"),
        (["evaluate", "compression", "--model", "/none", "--data", "x", "--out", "y"], "/none"),
        (["generate", "--model", "/none", "--out", "y"], "/none"),
        (["generate", "--model", "/none", "--out", "y", "--classes", "1,b"], "--classes 1,b is not a list of integers"),
        (["compress", "--model", "/none", "a.png", "b.bsq"], "/none"),
        (["decompress", "--model", "/none", "b.bsq", "a.png"], "/none"),
        (["decompress", "--model", "/none", "b.bsq", "a.png", "--region", "1,2"], "is not four numbers"),
        (["demo-generate", "--images", "/none"], "/none does not exist"),
        (["demo-generate", "--minutes", "-1"], "--minutes -1.0 must be positive"),
        (["demo-compress", "--minutes", "0"], "--minutes 0.0 must be positive"),
        (["demo-compress", "--model", "photo-prior", "--train-images", "x"], "omit them with --model"),
        (["demo-compress", "--model", "photo-prior", "--minutes", "5"], "omit them with --model"),
        (["import-reference", "/none.pt", "--config", "demo", "--out", "y"], "/none.pt"),
        (["info", "/none"], "is not a model folder"),
        (["info", "demmo"], "a token table or a preset; did you mean demo?"),
        (["plan", "--config", "python.yaml", "--gpu", "a5000", "--gpus", "1"], "python.yaml is not a text file"),
        (["plan", "--config", "./", "--gpu", "a5000", "--gpus", "1"], "cannot read ./: Is a directory"),
        (["data", "pack", "a", "b", "--workers", "-1"], "Invalid value for '--workers'"),
        (
            ["tokenize", "--model", "a", "--data", "b", "--out", "c", "--batch-size", "0"],
            "Invalid value for '--batch-size'",
        ),
        (["tokenize", "--model", "a", "--data", "b", "--out", "c", "--scale", "0.5"], "Invalid value for '--scale'"),
        ([*RECONSTRUCTION, "--max-skipped-samples", "-1"], "Invalid value for '--max-skipped-samples'"),
        ([*RECONSTRUCTION, "--workers", "-1"], "Invalid value for '--workers'"),
        (["evaluate", "compression", "--model", "a", "--data", "b", "--out", "c", "--max-side", "0"], "'--max-side'"),
        (
            ["reconstruct", "--model", "a", "b.png", "b.xyz"],
            "b.xyz must end in .png (for an image) or .mp4 (for a video)",
        ),
        (["serve", "--model", "/none"], "model folder /none does not exist"),
        (["pretrain", "fotos"], "unknown recipe fotos; choose photo"),
        (["pretrain", "photo", "--minutes", "0"], "--minutes 0.0 must be positive"),
        (["pretrain", "photo", "--device", "tpu"], "unknown --device tpu; choose auto, cpu or gpu"),
        (["quickstart", "--minutes", "0"], "--minutes 0.0 must be positive"),
        (["quickstart", "--videos", "somewhere"], "--images excludes --video and --videos"),
        (["quickstart", "--video", "--images", "somewhere"], "give a folder of images, or --video"),
        (["data", "pack", "a", "b", "--kind", "sounds"], "unknown --kind sounds; choose images or videos"),
        (["data", "pack", "a", "b", "--min-frames", "4"], "--min-frames is for videos; add --kind videos"),
        (["quickstart", "--minutes", "x"], "Invalid value for '--minutes'"),
    ],
    ids=lambda value: " ".join(value)[:60] if isinstance(value, list) else "",
)
def test_cli_wrong_input_exits_with_status_2(run_cli, arguments, expected, tmp_path, monkeypatch):
    """Wrong input ends with exit status 2 and a one-line message on stderr."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "python.yaml").symlink_to(sys.executable)
    status, out, error = run_cli(*arguments)
    assert status == 2
    assert expected in error
    assert "Traceback" not in error
    assert out == ""


@pytest.mark.parametrize("arguments", [(), ("data",), ("evaluate",)], ids=" ".join)
def test_cli_without_command_prints_help(run_cli, arguments):
    """A call without a command prints the help and ends with exit status 2."""
    status, out, error = run_cli(*arguments)
    assert status == 2
    assert f"Usage: {' '.join(('bsq-ray', *arguments))} " in out
    assert error == ""


@pytest.mark.parametrize(
    ("arguments", "missing", "message"),
    [
        (["train", "tokenizer", *RUN], "ray", "bsq-ray train needs Ray: pip install 'bsq-ray[train]'"),
        (["train", "tokenizer", *RUN], "deepspeed", "bsq-ray train needs DeepSpeed: pip install 'bsq-ray[train]'"),
        (RECONSTRUCTION, "lpips", "bsq-ray evaluate reconstruction needs lpips: pip install 'bsq-ray[eval]'"),
        ([*SWEEP, DEMO_SWEEP], "optuna", "bsq-ray sweep needs Optuna: pip install 'bsq-ray[tune]'"),
        (["quickstart"], "jinja2", "bsq-ray quickstart needs Jinja2: pip install 'bsq-ray[all]'"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_cli_missing_extra_exits_with_status_2(run_cli, monkeypatch, arguments, missing, message):
    """A missing optional package ends with exit status 2 and the pip command."""
    find_spec = extras.find_spec
    monkeypatch.setattr(extras, "find_spec", lambda name: None if name == missing else find_spec(name))
    assert run_cli(*arguments) == (2, "", f"{message}\n")


def test_cli_failed_import_of_optional_package_names_its_extra(run_cli, monkeypatch):
    """An import error of an optional package becomes the pip command."""

    def fail(source):
        raise ModuleNotFoundError("No module named 'pyarrow'", name="pyarrow")

    monkeypatch.setattr("bsq_ray.cli.info.format_info", fail)
    status, _, error = run_cli("info", "demo")
    assert (status, error) == (2, "bsq-ray: this command needs PyArrow: pip install 'bsq-ray[train]'\n")


def test_resume_command_repeats_arguments():
    """The resume command repeats the arguments of the call and contains --resume once."""
    assert resume_command(["train", "--out", "a b", "--resume"]) == "bsq-ray train --out 'a b' --resume"


def test_cli_failed_work_exits_with_status_1(run_cli, monkeypatch):
    """Failed work ends with exit status 1, and --debug raises the original exception."""

    def fail(source):
        raise OSError("the disk is full")

    monkeypatch.setattr("bsq_ray.cli.info.format_info", fail)
    status, _, error = run_cli("info", "demo")
    assert status == 1
    assert "the disk is full (OSError; --debug shows the traceback)" in error
    monkeypatch.setattr(sys, "argv", ["bsq-ray", "info", "demo", "--debug"])
    with pytest.raises(OSError, match="the disk is full"):
        main.main()


def test_cli_interrupt_exits_with_status_130(run_cli, monkeypatch):
    """An interrupt ends with exit status 130."""

    def interrupt(source):
        raise KeyboardInterrupt

    monkeypatch.setattr("bsq_ray.cli.info.format_info", interrupt)
    assert run_cli("info", "demo")[0] == 130


@pytest.mark.integration
def test_cli_data_pack_and_inspect_listed_videos(run_cli, video_folders, tmp_path):
    """Videos of a list file are packed, filtered by length and inspected."""
    (tmp_path / "list.txt").write_text("bikes.mp4\nbigbuckbunny.mp4\n")
    options = ["--kind", "videos", "--list", tmp_path / "list.txt", "--min-frames", "140", "--max-side", "64"]
    status, out, error = run_cli("data", "pack", video_folders[0], tmp_path / "set", "--workers", "0", *options)
    assert status == 0, error
    assert out.startswith("videos 1, shards 1, classes 1, in ")
    assert "skipped 1 that are too short, listed in " in out
    status, out, _ = run_cli("data", "inspect", tmp_path / "set", "--sheet", tmp_path / "sheet.png")
    assert status == 0
    assert "frames 250 to 250, median 250; 0.2 minutes in total, 25 frames/s (1)" in out
    assert "1 videos, 1 shards" in run_cli("info", tmp_path / "set")[1]


def test_cli_data_pack_inspect_and_info(run_cli, photo_folders, tmp_path):
    """An image folder is packed, inspected and described, and a damaged shard is reported."""
    status, out, _ = run_cli("data", "pack", photo_folders[1], tmp_path / "set", "--workers", "0", "--max-side", "96")
    assert status == 0
    assert out.startswith("images 12, shards 1, classes 1, in ")
    status, out, _ = run_cli("data", "inspect", tmp_path / "set", "--sheet", tmp_path / "sheet.png")
    assert status == 0
    assert "12 images measured" in out
    assert (tmp_path / "sheet.png").exists()
    assert "packed data set" in run_cli("info", tmp_path / "set")[1]
    (tmp_path / "set" / "shard-000000.tar").write_bytes(b"")
    status, out, _ = run_cli("data", "inspect", tmp_path / "set", "--sheet", tmp_path / "sheet.png")
    assert status == 1
    assert "error: shard-000000.tar does not match the manifest" in out


@pytest.mark.parametrize(
    ("preset", "training"),
    [
        ("demo", "configured for 1,000 steps of 16 samples, ddp, precision auto"),
        ("demo-gan", "configured for 1,000 steps of 16 samples, deepspeed (ZeRO-1), precision auto"),
    ],
)
def test_cli_info_describes_training_of_preset(run_cli, preset, training):
    status, out, _ = run_cli("info", preset)
    assert status == 0
    assert training in out


def test_cli_help_imports_no_heavy_packages():
    """The help output imports none of torch, Ray, DeepSpeed and NumPy."""
    started_at = time.monotonic()
    script = "import sys; from bsq_ray.cli import main; sys.argv = ['bsq-ray', '--help']\ntry: main.main()\nfinally: "
    script += "print([name for name in ('torch', 'ray', 'deepspeed', 'numpy') if name in sys.modules])"
    completed = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert completed.stdout.strip().endswith("[]")
    print(f"help took {time.monotonic() - started_at:.2f} s")
