"""Importing checkpoints in torch's old format, and files that are no checkpoints of `torch.save`.

Add a case: a row of `LEGACY` (change of the content), or of `WRONG_CHECKPOINTS` (function that writes it, message).
"""

import copy
import os
import pathlib
import threading
import zipfile
from collections import OrderedDict
from functools import partial

import numpy as np
import pytest
import torch
from reference_checkpoints import MaliciousObject, checkpoint_contents, save_checkpoint, write_small_config
from safetensors.torch import save_file
from torch import nn

from bsq_ray.import_bsq_vit import import_bsq_vit, read_checkpoint


@pytest.fixture
def save(tmp_path):
    return partial(save_checkpoint, tmp_path)


@pytest.fixture
def small_config(tmp_path):
    return write_small_config(tmp_path)


def save_legacy(monkeypatch, save, parts):
    """Save a checkpoint in the format of torch before 1.6."""
    torch_save = torch.save
    monkeypatch.setattr(torch, "save", lambda *args: torch_save(*args, _use_new_zipfile_serialization=False))
    return save(parts)


def halve(parts):
    for key in ("state_dict", "ema_state_dict"):
        parts[key] = {name: tensor.half() for name, tensor in parts[key].items()}
    return parts


def as_parameters(parts):
    parts["state_dict"] = OrderedDict(
        (name, nn.Parameter(tensor, requires_grad=False)) for name, tensor in parts["state_dict"].items()
    )
    return parts


def as_views(parts):
    """Return the weights as views of one storage, as optimizers with flat buffers leave them."""
    for key in ("state_dict", "ema_state_dict"):
        shapes = {name: tensor.shape for name, tensor in parts[key].items()}
        flat = torch.cat([tensor.flatten().float() for tensor in parts[key].values()])
        pieces = flat.split([shape.numel() for shape in shapes.values()])
        parts[key] = {name: piece.view(shapes[name]) for name, piece in zip(shapes, pieces, strict=True)}
    return parts


LEGACY = {
    "objects of the script": lambda parts: parts,
    "half precision": halve,
    "parameters in order": as_parameters,
    "views of one storage": as_views,
    "numpy values": lambda parts: parts | {"lr": np.float64(0.1), "state": np.arange(3)},
}


@pytest.mark.parametrize("change", LEGACY.values(), ids=LEGACY)
def test_read_checkpoint_legacy_equals_current_format(save, monkeypatch, change):
    """A checkpoint of torch before 1.6 has the same weights as one of the current format."""
    # Tensors of the current format are mapped from the file, which is written again below.
    current = copy.deepcopy(read_checkpoint(save(change(checkpoint_contents())), "checkpoint.pt"))
    legacy = read_checkpoint(save_legacy(monkeypatch, save, change(checkpoint_contents())), "checkpoint.pt")
    assert legacy.keys() == current.keys()
    for key in ("state_dict", "ema_state_dict"):
        assert list(legacy[key]) == list(current[key])
        assert all(torch.equal(legacy[key][name], current[key][name]) for name in current[key])


def test_import_legacy_file_of_a_gpu_is_read_on_the_cpu(save, small_config, tmp_path, monkeypatch):
    current = import_bsq_vit(save(checkpoint_contents()), small_config, str(tmp_path / "current"))
    path = pathlib.Path(save_legacy(monkeypatch, save, checkpoint_contents()))
    path.write_bytes(path.read_bytes().replace(b"X\x03\0\0\0cpu", b"X\x06\0\0\0cuda:0"))
    assert import_bsq_vit(str(path), small_config, str(tmp_path / "gpu")) == current


def write_script(path):
    torch.jit.save(torch.jit.script(nn.Linear(2, 2)), path)


def write_zip(path):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("model/weights.pt", b"x")


def write_arrays(path):
    with open(path, "wb") as file:
        np.savez(file, a=1)


def write_changed_entry(path, offset, value):
    """Write a checkpoint, and change a byte of the first entry in the central directory of its zip file."""
    torch.save({"a": torch.zeros(1000)}, path)
    content = bytearray(pathlib.Path(path).read_bytes())
    content[content.index(b"PK\1\2") + offset] = value
    pathlib.Path(path).write_bytes(content)


def test_read_checkpoint_of_a_later_zip_version_is_read(tmp_path):
    """A zip file that Python's library does not read is left to torch."""
    write_changed_entry(tmp_path / "checkpoint.pt", 6, 99)
    assert list(read_checkpoint(str(tmp_path / "checkpoint.pt"), "checkpoint.pt")) == ["a"]


# Files in place of a checkpoint, and the message.
WRONG_CHECKPOINTS = {
    "legacy, protocol 3": (
        lambda path: torch.save({}, path, pickle_protocol=3, _use_new_zipfile_serialization=False),
        "is written with pickle protocol 3; load it with",
    ),
    "legacy, protocol 4": (
        lambda path: torch.save({"a": 1}, path, pickle_protocol=4, _use_new_zipfile_serialization=False),
        "is written with pickle protocol 4; load it with",
    ),
    "protocol 5": (lambda path: torch.save({"a": 1}, path, pickle_protocol=5), "default `pickle_protocol`"),
    "legacy module": (
        lambda path: torch.save(nn.Linear(2, 2), path, _use_new_zipfile_serialization=False),
        "is rejected: it has objects that would run or import torch.nn.modules.linear.Linear$",
    ),
    "script": (write_script, "checkpoint.pt.*torchscript"),
    "zip": (write_zip, "is a zip file, but not one that torch.save wrote; unpack it first"),
    "damaged directory": (lambda path: write_changed_entry(path, 0, 0), "cannot read the checkpoint .*checkpoint.pt: "),
    "damaged name": (lambda path: write_changed_entry(path, 46, 255), "cannot read the checkpoint .*checkpoint.pt: "),
    "arrays": (write_arrays, "is a zip file, but not one"),
    "safetensors": (lambda path: save_file({"a": torch.zeros(9)}, path), "is a safetensors file, which has weights"),
    "with headers": (
        lambda path: pathlib.Path(path).write_bytes(b"HTTP/1.1 200 OK\r\n\r\n" + bytes(5000)),
        "is the response of a server with its headers: HTTP/1.1 200 OK; download",
    ),
}


@pytest.mark.parametrize("case", WRONG_CHECKPOINTS)
def test_import_wrong_checkpoint_is_described(small_config, tmp_path, case):
    write, message = WRONG_CHECKPOINTS[case]
    path = str(tmp_path / "checkpoint.pt")
    write(path)
    with pytest.raises(ValueError, match=message) as raised:
        import_bsq_vit(path, small_config, str(tmp_path / "model"))
    assert path in str(raised.value)


def test_import_from_pipe_equals_import_from_file(save, small_config, tmp_path):
    path = save(checkpoint_contents())
    from_file = import_bsq_vit(path, small_config, str(tmp_path / "file"))
    os.mkfifo(tmp_path / "pipe")
    writer = threading.Thread(target=lambda: (tmp_path / "pipe").write_bytes(pathlib.Path(path).read_bytes()))
    writer.start()
    assert import_bsq_vit(str(tmp_path / "pipe"), small_config, str(tmp_path / "piped")) == from_file
    writer.join()


@pytest.mark.parametrize("function", [os.system, os.makedirs, eval])
def test_import_malicious_legacy_pickle_is_rejected_without_running(
    save, small_config, tmp_path, monkeypatch, function
):
    evidence = tmp_path / "evidence"
    argument = {os.system: f"touch {evidence}", os.makedirs: str(evidence)}.get(
        function, f"open({str(evidence)!r}, 'w')"
    )
    checkpoint = save_legacy(monkeypatch, save, checkpoint_contents(args=MaliciousObject(function, argument)))
    with pytest.raises(ValueError, match="is rejected: it has objects that would run or import"):
        import_bsq_vit(checkpoint, small_config, str(tmp_path / "model"))
    assert not evidence.exists()


@pytest.mark.parametrize("size", [20, 100, 500, 2000])
def test_import_truncated_legacy_file_raises(save, small_config, tmp_path, monkeypatch, size):
    path = pathlib.Path(save_legacy(monkeypatch, save, checkpoint_contents()))
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(ValueError, match="cannot read the checkpoint .*checkpoint.pt|is not a file"):
        import_bsq_vit(str(path), small_config, str(tmp_path / "model"))
