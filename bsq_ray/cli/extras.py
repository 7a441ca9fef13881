"""Check that the optional packages of a command are installed."""

from __future__ import annotations

from importlib.util import find_spec

# Name of the pip extra → modules that every command of the extra imports.
EXTRA_MODULES = {
    "train": ("pyarrow", "webdataset"),
    "eval": ("pyarrow", "lpips", "pytorch_msssim", "imagecodecs", "scipy", "sklearn", "matplotlib", "jinja2"),
    "tune": ("ray", "pyarrow", "optuna", "matplotlib"),
    "serve": ("ray", "fastapi"),
    "all": ("ray", "pyarrow", "webdataset", "lpips", "pytorch_msssim", "scipy", "matplotlib", "jinja2"),
}
# Module → extra, for modules that are imported only with some options.
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
        command: name of the command for the message, such as "data pack".
        extra: name of the extra, a key of `EXTRA_MODULES`.
        modules: additional modules that this call needs.

    Raises:
        MissingExtraError: a module is missing; the message contains the pip command.
    """
    for module in (*EXTRA_MODULES[extra], *modules):
        if find_spec(module) is None:
            raise MissingExtraError(_format_missing(f"bsq-ray {command}", module, extra))


def missing_extra_message(error: ImportError) -> str:
    """Return the message for a failed import of an optional package, or "" for any other module."""
    module = (error.name or "").partition(".")[0]
    extras = [extra for extra, modules in EXTRA_MODULES.items() if module in modules]
    extra = _OTHER_EXTRAS.get(module) or (extras[0] if extras else "")
    return _format_missing("this command", module, extra) if extra else ""


def _format_missing(subject: str, module: str, extra: str) -> str:
    return f"{subject} needs {_DISPLAY_NAMES.get(module, module)}: pip install 'bsq-ray[{extra}]'"
