"""Importing checkpoints of the published reference code."""

import argparse
import os
import pathlib
import sys
from functools import partial

import pytest
import torch
from reference_checkpoints import (
    BITS,
    CONFIG,
    PATCH,
    SIDE,
    MaliciousObject,
    ReferenceTokenizer,
    checkpoint_contents,
    discriminator_logits,
    discriminator_tensors,
    prefixed,
    save_checkpoint,
    write_small_config,
)
from safetensors.torch import load_file
from torch import nn

from bsq_ray import Tokenizer, config, model_folder
from bsq_ray.import_bsq_vit import import_bsq_vit, read_checkpoint
from bsq_ray.models.discriminators import build_discriminator


@pytest.fixture
def save(tmp_path):
    return partial(save_checkpoint, tmp_path)


@pytest.fixture
def small_config(tmp_path):
    return write_small_config(tmp_path)


IMAGES = torch.rand(4, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0)) * 2 - 1


@pytest.mark.parametrize("prefix", ["module.", ""])
def test_import_reconstructions_match_reference(save, small_config, tmp_path, prefix):
    """Reconstructions match the reference code for EMA and raw weights."""
    out = str(tmp_path / "model")
    imported = import_bsq_vit(save(checkpoint_contents(prefix)), small_config, out)
    for weights, seed in (("ema", 1), ("raw", 0)):
        ours = Tokenizer.from_pretrained(out, weights).reconstruct(IMAGES)
        reference = ReferenceTokenizer(seed)(IMAGES)
        assert reference.std() > 0.3
        torch.testing.assert_close(ours, reference, rtol=0, atol=1e-4)
    assert imported.iteration == 7000
    assert not imported.has_discriminator
    assert imported.model_id == model_folder.load_model_folder(out).model_id
    card = (tmp_path / "model" / "README.md").read_text()
    assert "| imported from | checkpoint.pt |" in card
    assert "| training steps | 7000 |" in card


@pytest.mark.parametrize("prefix", ["", "module."])
def test_import_discriminator_logits_match_reference(save, small_config, tmp_path, prefix):
    """The discriminator is imported and gives the reference's logits."""
    tensors = discriminator_tensors()
    checkpoint = save(checkpoint_contents(state_dict_discriminator=prefixed(prefix, tensors)))
    imported = import_bsq_vit(checkpoint, small_config, str(tmp_path / "model"))
    assert imported.has_discriminator
    ours = build_discriminator(config.load_config(small_config).loss.adversarial, SIDE)
    ours.load_state_dict(load_file(tmp_path / "model" / "discriminator.safetensors"))
    expected = discriminator_logits(tensors, IMAGES)
    assert expected.std() > 0.01
    torch.testing.assert_close(ours(IMAGES)[0], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("b8.conv1.bias"), r"checkpoint\.pt \(state_dict_discriminator\) .*missing: b8\.conv1\.bias"),
        (lambda t: t.update({"b8.conv2.bias": torch.ones(1)}), r"unexpected: b8\.conv2\.bias"),
        (
            lambda t: t.update({"b4.out.weight": torch.ones(2, 32)}),
            r"b4\.out\.weight is \(2, 32\) instead of",
        ),
        (lambda t: t["b16.skip.resample_filter"].mul_(2), r"b16\.skip\.resample_filter is not the low-pass filter"),
    ],
)
def test_import_mismatched_discriminator_raises(save, small_config, tmp_path, change, message):
    tensors = discriminator_tensors()
    change(tensors)
    with pytest.raises(ValueError, match=message):
        import_bsq_vit(
            save(checkpoint_contents(state_dict_discriminator=tensors)), small_config, str(tmp_path / "model")
        )
    assert not (tmp_path / "model").exists()


def test_import_raw_weights_only_on_request(save, small_config, tmp_path):
    """A checkpoint without EMA weights is rejected unless raw weights are requested."""
    out = str(tmp_path / "model")
    checkpoint = save(checkpoint_contents(ema_state_dict=None))
    with pytest.raises(ValueError, match="contains no averaged weights; import its raw weights instead"):
        import_bsq_vit(checkpoint, small_config, out)
    assert not os.path.exists(out)
    import_bsq_vit(checkpoint, small_config, out, weights="raw")
    torch.testing.assert_close(
        Tokenizer.from_pretrained(out).reconstruct(IMAGES), ReferenceTokenizer(0)(IMAGES), rtol=0, atol=1e-4
    )


def test_import_from_url_matches_local_import(save, small_config, tmp_path):
    import fsspec

    with fsspec.open("memory://reference/checkpoint.pt", "wb") as file:
        file.write(pathlib.Path(save(checkpoint_contents())).read_bytes())
    remote = import_bsq_vit("memory://reference/checkpoint.pt", small_config, "memory://reference/model")
    local = import_bsq_vit(str(tmp_path / "checkpoint.pt"), small_config, str(tmp_path / "model"))
    assert remote == local


def test_import_preserves_bit_order(save, small_config, tmp_path):
    """Imported models keep the order of bits, so tokens can be compared bit by bit."""
    import_bsq_vit(save(checkpoint_contents()), small_config, str(tmp_path / "model"))
    reference = ReferenceTokenizer(1)
    patches = nn.functional.unfold(IMAGES, PATCH, stride=PATCH).transpose(1, 2)
    v = reference.quant_embed(reference.encoder.body(reference.encoder.conv1(patches)))
    bits = Tokenizer.from_pretrained(str(tmp_path / "model")).encode(IMAGES).bits_BNL
    assert torch.equal(bits, v > 0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("module.quant_embed.bias"), r"missing: to_code\.bias"),
        (lambda t: t.update({"module.quant_embed.scale": torch.ones(1)}), r"unexpected: to_code\.scale"),
        (lambda t: t.update({"module.loss.logvar": torch.ones(1)}), r"unexpected: loss\.logvar"),
        (lambda t: t.update({"stray": torch.ones(1)}), r"missing: .*unexpected: module\.decoder"),
        (lambda t: t.clear(), r"missing: "),
    ],
)
def test_import_missing_or_extra_weights_writes_nothing(save, small_config, tmp_path, change, message):
    """Missing or extra weights raise an error, and no folder is written."""
    parts = checkpoint_contents()
    change(parts["state_dict"])
    with pytest.raises(ValueError, match=message):
        import_bsq_vit(save(parts), small_config, str(tmp_path / "model"))
    assert not (tmp_path / "model").exists()


def test_import_wrong_size_names_both_shapes(save, small_config, tmp_path):
    """A checkpoint of another size is rejected, and the error names both shapes."""
    checkpoint = save(checkpoint_contents())
    (tmp_path / "other.yaml").write_text(CONFIG.replace(f"bits: {BITS}", "bits: 18"))
    with pytest.raises(ValueError, match=r"to_code\.bias is \(12,\) instead of \(18,\)"):
        import_bsq_vit(checkpoint, str(tmp_path / "other.yaml"), str(tmp_path / "model"))


@pytest.mark.parametrize(
    ("function", "name"),
    [(os.system, "posix.system"), (os.makedirs, "os.makedirs"), (eval, "builtins.eval"), (getattr, "builtins.getattr")],
)
def test_import_malicious_pickle_is_rejected_without_running(save, small_config, tmp_path, function, name):
    """A checkpoint that would run code is rejected, and none of it runs."""
    evidence = tmp_path / "evidence"
    argument = {os.system: f"touch {evidence}", os.makedirs: str(evidence)}.get(
        function, f"open({str(evidence)!r}, 'w')"
    )
    checkpoint = save(checkpoint_contents(args=MaliciousObject(function, argument)))
    with pytest.raises(ValueError, match=f"is rejected: it has objects that would run or import {name}"):
        import_bsq_vit(checkpoint, small_config, str(tmp_path / "model"))
    assert not evidence.exists()


def test_read_checkpoint_does_not_import_script_objects(save):
    checkpoint = save(checkpoint_contents())
    parts = read_checkpoint(checkpoint, "checkpoint.pt")
    assert "omegaconf" not in sys.modules
    assert not isinstance(parts["args"], argparse.Namespace)
    assert vars(parts["config"]) == {}


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda data: data[: len(data) // 2], "is not a file written by torch.save"),
        (lambda data: b"\x80\x02}.", "is not a file written by torch.save"),
        (lambda data: b"", "is empty"),
        (lambda data: b"<!DOCTYPE html><html>Log in</html>", "is a web page"),
        (lambda data: b"version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 1\n", "is a Git LFS pointer"),
    ],
)
def test_import_damaged_or_foreign_file_raises(save, small_config, tmp_path, damage, message):
    path = pathlib.Path(save(checkpoint_contents()))
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match=f"checkpoint.pt {message}"):
        import_bsq_vit(str(path), small_config, str(tmp_path / "model"))


def test_import_checkpoint_without_expected_keys_raises(save, small_config, tmp_path):
    with pytest.raises(ValueError, match="contains a list, not the dictionary of a checkpoint"):
        import_bsq_vit(save([1, 2]), small_config, str(tmp_path / "model"))
    with pytest.raises(ValueError, match="contains no weights state_dict; its keys are model, epoch"):
        import_bsq_vit(save({"model": {}, "epoch": 1}), small_config, str(tmp_path / "model"))
    with pytest.raises(ValueError, match="contains no weights state_dict"):
        import_bsq_vit(save({"state_dict": {"a": 1}}), small_config, str(tmp_path / "model"))
    with pytest.raises(ValueError, match=r"cannot read /nowhere/checkpoint\.pt: it does not exist"):
        import_bsq_vit("/nowhere/checkpoint.pt", small_config, str(tmp_path / "model"))


def test_small_config_parameter_count_matches_reference(small_config):
    """The small configuration has as many parameters as the reference tokenizer of this test."""
    model = config.load_config(small_config).model
    with torch.device("meta"):
        ours = sum(p.numel() for p in Tokenizer(model).parameters())
    assert ours == sum(p.numel() for p in ReferenceTokenizer(0).parameters())
