"""Check of the optional packages that a command needs."""

from __future__ import annotations

from importlib.util import find_spec

# Extra of the installation → modules that all of its commands import.
EXTRA_MODULES = {
    "train": ("pyarrow", "webdataset"),
    "eval": ("pyarrow", "lpips", "pytorch_msssim", "imagecodecs", "scipy", "sklearn", "matplotlib", "jinja2"),
    "tune": ("ray", "pyarrow", "optuna", "matplotlib"),
    "serve": ("ray", "fastapi"),
    "all": ("ray", "pyarrow", "webdataset", "lpips", "pytorch_msssim", "scipy", "matplotlib", "jinja2"),
}
# Modules that only some calls of the commands import.
_OTHER_EXTRAS = {"ray": "train", "deepspeed": "train", "tensorboardX": "train", "bjontegaard": "eval"}
_DISPLAY_NAMES = {
    "ray": "Ray",
    "deepspeed": "DeepSpeed",
    "pyarrow": "PyArrow",
    "optuna": "Optuna",
    "fastapi": "FastAPI",
    "matplotlib": "Matplotlib",
    "scipy": "SciPy",
    "sklearn": "scikit-learn",
    "jinja2": "Jinja2",
    "pytorch_msssim": "pytorch-msssim",
}


class MissingExtraError(ValueError):
    """A command needs a package that is not installed."""


def require_extra(command: str, extra: str, *modules: str) -> None:
    """Check that the modules of an extra are installed.

    Args:
        command: name in the message, such as "data pack".
        extra: name of the extra, a key of `EXTRA_MODULES`.
        modules: modules beyond those of the table that this call needs.

    Raises:
        MissingExtraError: a module is missing; the message contains the pip command.
    """
    for module in (*EXTRA_MODULES[extra], *modules):
        if find_spec(module) is None:
            raise MissingExtraError(_format_missing(f"bsq-ray {command}", module, extra))


def missing_extra_message(error: ImportError) -> str:
    """Return the message for a failed import of an optional package; empty for any other import."""
    module = (error.name or "").partition(".")[0]
    extras = [extra for extra, modules in EXTRA_MODULES.items() if module in modules]
    extra = _OTHER_EXTRAS.get(module) or (extras[0] if extras else "")
    return _format_missing("this command", module, extra) if extra else ""


def _format_missing(subject: str, module: str, extra: str) -> str:
    return f"{subject} needs {_DISPLAY_NAMES.get(module, module)}: pip install 'bsq-ray[{extra}]'"
