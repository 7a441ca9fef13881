"""A model folder: what is written is what is read, and nothing else is accepted."""

import shutil
import sys
import types
from pathlib import Path

import pytest
import safetensors.torch
import torch
import yaml

from bsq_ray import Tokenizer, config, model_folder
from bsq_ray.model_ids import compute_tokens_id

SIZES = {"width": 16, "layers": 1, "heads": 2}


def small_tokenizer(seed=0, bits=6):
    torch.manual_seed(seed)
    keys = {
        "image_size": 16,
        "patch_size": 8,
        "encoder": SIZES,
        "decoder": SIZES | {"head_hidden_dim": 16},
        "quantizer": {"bits": bits},
    }
    return Tokenizer(config.TokenizerModelConfig.model_validate(keys))


IMAGES = torch.linspace(-1, 1, 3 * 16 * 16).reshape(1, 3, 16, 16)


@pytest.fixture
def folder(tmp_path):
    url = str(tmp_path / "small")
    raw_weights = small_tokenizer(seed=1).state_dict()
    small_tokenizer().save_pretrained(
        url, raw_weights=raw_weights, metrics={"psnr": 21.5}, card_fields={"data": "12 photos"}
    )
    return url


@pytest.mark.parametrize("scheme", ["path", "file", "s3"])
def test_model_folder_roundtrip_from_any_url(request, tmp_path, scheme):
    """A saved tokenizer gives the same reconstructions after loading from a path, a file URL, or S3."""
    parent = request.getfixturevalue("bucket") if scheme == "s3" else str(tmp_path)
    url = f"file://{parent}/m" if scheme == "file" else f"{parent}/m"
    saved = small_tokenizer()
    model_id = saved.save_pretrained(url)
    loaded = Tokenizer.from_pretrained(url)
    assert not loaded.training
    assert loaded.config == saved.config
    assert loaded.model_id == model_id
    assert len(model_id) == 64
    assert torch.equal(loaded.reconstruct(IMAGES), saved.reconstruct(IMAGES))


def test_model_folder_keeps_raw_and_ema_weights(folder):
    """Raw weights are stored next to the EMA weights and have another model id."""
    ema_tokenizer, raw_tokenizer = Tokenizer.from_pretrained(folder), Tokenizer.from_pretrained(folder, weights="raw")
    assert torch.equal(ema_tokenizer.to_code.weight, small_tokenizer(seed=0).to_code.weight)
    assert torch.equal(raw_tokenizer.to_code.weight, small_tokenizer(seed=1).to_code.weight)
    assert ema_tokenizer.model_id != raw_tokenizer.model_id


def test_model_folder_without_ema_removes_old_raw_weights(folder):
    """Without EMA the main weights are the raw ones, and an older raw-weights file is removed."""
    small_tokenizer(seed=2).save_pretrained(folder)
    for weights in ("ema", "raw"):
        loaded = Tokenizer.from_pretrained(folder, weights=weights)
        assert torch.equal(loaded.to_code.weight, small_tokenizer(seed=2).to_code.weight)


def test_load_model_folder_missing_raw_weights_raises(folder, tmp_path):
    (tmp_path / "small" / "model.plain.safetensors").unlink()
    with pytest.raises(ValueError, match="contains no raw weights"):
        model_folder.load_model_folder(folder, "raw")


def test_model_id_depends_on_weights_and_model_only():
    """The model id depends on weights and model configuration, not on training or gradient checkpointing."""

    def written_id(weights, **keys):
        run = config.TokenizerConfig.model_validate({"name": "m"} | keys)
        return model_folder.write_model_folder("memory://ids/m", config.dump_config(run), weights)

    weights = {"a": torch.arange(4.0), "b": torch.ones(2, 2, dtype=torch.bfloat16), "c": torch.tensor(3)}
    same = written_id(weights)
    assert written_id(dict(reversed(weights.items())), training={"steps": 7}, description="another") == same
    assert written_id(weights, model={"gradient_checkpointing": True}) == same
    assert written_id(weights, model={"quantizer": {"kind": "bsq", "keep": []}}) == same
    assert written_id(weights, model={"quantizer": {"kind": "bsq", "keep": [9, 18]}}) != same
    assert written_id(weights, model={"patch_size": 16}) != same
    assert written_id(weights | {"a": torch.arange(4.0).reshape(2, 2)}) != same
    assert written_id(weights | {"a": torch.arange(4.0) + 1e-6}) != same


def test_tokens_id_depends_on_encoder_and_quantizer_only():
    """The tokens id ignores decoder and training options; it covers what turns images into tokens."""

    def written_id(changed="", **keys):
        model = small_tokenizer().config.model_dump() | keys
        run = config.TokenizerConfig.model_validate({"name": "m", "model": model})
        tokenizer = Tokenizer(run.model)
        tokenizer.load_state_dict(weights)
        if changed:
            with torch.no_grad():
                tokenizer.get_parameter(changed).view(-1)[0] += 1e-6
        model_folder.write_model_folder("memory://ids/t", config.dump_config(run), tokenizer.state_dict())
        return model_folder.load_model_folder("memory://ids/t").tokens_id

    weights = small_tokenizer().state_dict()
    same, quantizer = written_id(), small_tokenizer().config.quantizer.model_dump()
    assert len(same) == 64
    assert written_id("decoder.head.0.bias") == written_id("from_code.weight") == same
    assert written_id(gradient_checkpointing=True) == same
    assert written_id(quantizer=quantizer | {"commitment_weight": 0.25, "entropy": {"weight": 0.5}}) == same
    assert written_id(quantizer=quantizer | {"kind": "lfq"}) != same
    assert written_id("encoder.patch_embedding.weight") != same
    assert written_id("to_code.bias") != same


def test_tokens_id_of_vq_covers_codebook_and_not_decoder():
    model = small_tokenizer().config.model_copy(update={"quantizer": config.VQConfig(kind="vq", codebook_size=16)})
    run, ids = config.TokenizerConfig(name="m", model=model), []
    tokenizer = Tokenizer(model)
    for changed in (tokenizer.from_code.weight, tokenizer.decoder.head[0].bias, tokenizer.quantizer.codebook):
        ids.append(compute_tokens_id(run, tokenizer.state_dict()))
        with torch.no_grad():
            changed.view(-1)[0] += 1
    ids.append(compute_tokens_id(run, tokenizer.state_dict()))
    assert ids[0] == ids[1] == ids[2] != ids[3]


def test_token_models_have_no_tokens_id():
    assert compute_tokens_id(config.PriorConfig(name="p"), {}) is None


def test_model_saved_again_keeps_id_of_older_folder(tmp_path):
    """Options that a folder was written without, such as `keep`, do not change its id at their default."""
    tokenizer = Tokenizer.from_pretrained(str(Path(__file__).parent / "golden/bsq-version-1/prior-1/tokenizer"))
    tokenizer.save_pretrained(str(tmp_path))
    assert "keep: []" in (tmp_path / "config.yaml").read_text()
    assert Tokenizer.from_pretrained(str(tmp_path)).model_id == tokenizer.model_id


def test_model_card_lists_size_rate_id_fields_and_metrics(folder, tmp_path):
    card = (tmp_path / "small" / "README.md").read_text()
    _, front, text = card.split("---\n", 2)
    assert yaml.safe_load(front)["library_name"] == "bsq_ray"
    assert "# small" in text
    assert Tokenizer.from_pretrained(folder).model_id in text
    assert "16 x 16 pixels" in text
    assert "4 per image" in text
    assert "0.09375 bits per pixel" in text
    assert "| data | 12 photos |" in text
    assert "| psnr | 21.5 |" in text


def test_model_folder_config_contains_every_key(folder, tmp_path):
    stored = yaml.safe_load((tmp_path / "small" / "config.yaml").read_text())
    assert stored["model"]["quantizer"]["entropy"]["estimate"] == "analytical"
    assert stored["training"]["optimizer"]["betas"] == [0.9, 0.99]


def test_load_model_folder_changed_weight_raises(folder, tmp_path):
    file = tmp_path / "small" / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with pytest.raises(ValueError, match=r"model.safetensors and .*config.yaml do not match"):
        Tokenizer.from_pretrained(folder)


def test_load_model_folder_checks_model_config_only(folder, tmp_path):
    """A changed model configuration is detected; a changed training configuration is accepted."""
    file = tmp_path / "small" / "config.yaml"
    text = file.read_text()
    file.write_text(text.replace("steps: 1000000", "steps: 5"))
    assert model_folder.load_model_folder(folder).config.training.steps == 5
    file.write_text(text.replace("causal: true", "causal: false"))
    with pytest.raises(ValueError, match="do not match"):
        Tokenizer.from_pretrained(folder)


def test_load_model_folder_damaged_weights_file_raises(folder, tmp_path):
    file = tmp_path / "small" / "model.safetensors"
    data = file.read_bytes()
    descriptions = {
        data[:-10]: "damaged or not a safetensors file",
        b"": "is empty",
        b"not a model at all": "is a text: not a model at all",
    }
    for damaged, description in descriptions.items():
        file.write_bytes(damaged)
        with pytest.raises(ValueError, match=description):
            model_folder.load_model_folder(folder)
    file.write_bytes(safetensors.torch.save({"a": torch.ones(1)}))
    with pytest.raises(ValueError, match="its metadata has no model id"):
        model_folder.load_model_folder(folder)


def test_load_weights_mismatch_lists_keys(folder):
    """Weights of another model are rejected, and the error lists missing, unexpected, and misshapen keys."""
    target = small_tokenizer(bits=8)
    weights = dict(target.state_dict())
    before = target.to_code.bias.clone()
    weights["to_code.bias"] = torch.zeros(6)
    weights["surplus"] = torch.zeros(1)
    del weights["encoder.patch_embedding.weight"]
    with pytest.raises(ValueError) as error:
        model_folder.load_weights(target, weights, "model M")
    assert "weights of model M do not match this model" in str(error.value)
    assert "missing: encoder.patch_embedding.weight" in str(error.value)
    assert "unexpected: surplus" in str(error.value)
    assert "to_code.bias is (6,) instead of (8,)" in str(error.value)
    assert torch.equal(target.to_code.bias, before)


def test_load_weights_long_key_list_is_truncated():
    target = small_tokenizer()
    with pytest.raises(ValueError, match=r"missing: .* and \d+ more"):
        model_folder.load_weights(target, {}, "nothing")


def test_load_model_folder_not_a_model_raises(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"is not a model folder: it has no config.yaml"):
        Tokenizer.from_pretrained(str(tmp_path))
    with pytest.raises(ValueError, match="model folder .*absent does not exist"):
        Tokenizer.from_pretrained(str(tmp_path / "absent"))
    # Looks like a hub id, and is not one where its first part is a folder.
    monkeypatch.chdir(tmp_path.parent)
    with pytest.raises(ValueError, match=f"^model folder {tmp_path.name}/tokenizer does not exist"):
        Tokenizer.from_pretrained(f"{tmp_path.name}/tokenizer")


def test_save_pretrained_to_s3_twice_removes_raw_weights(bucket):
    """Saving again to S3 replaces the weights and removes the older raw-weights file."""
    small_tokenizer().save_pretrained(f"{bucket}/m", raw_weights=small_tokenizer(seed=1).state_dict())
    small_tokenizer(seed=2).save_pretrained(f"{bucket}/m")
    loaded = Tokenizer.from_pretrained(f"{bucket}/m", weights="raw")
    assert torch.equal(loaded.to_code.weight, small_tokenizer(seed=2).to_code.weight)


def test_load_hub_id_without_client_names_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ValueError, match=r"model folder someone/bsq-18 does not exist; .* install huggingface_hub"):
        Tokenizer.from_pretrained("someone/bsq-18")


def test_load_hub_id_uses_huggingface_hub(folder, tmp_path, monkeypatch):
    def snapshot_download(repo_id, allow_patterns):
        if repo_id != "someone/bsq-18":
            raise OSError("404 no such repository")
        for name in allow_patterns:
            shutil.copy(f"{folder}/{name}", tmp_path)
        return str(tmp_path)

    client = types.ModuleType("huggingface_hub")
    client.snapshot_download = snapshot_download
    monkeypatch.setitem(sys.modules, "huggingface_hub", client)
    assert Tokenizer.from_pretrained("someone/bsq-18").model_id == Tokenizer.from_pretrained(folder).model_id
    with pytest.raises(ValueError, match="the model hub returned an error: 404 no such repository"):
        Tokenizer.from_pretrained("someone/else")


def test_load_model_folder_run_folder_names_model_folder(tmp_path):
    small_tokenizer().save_pretrained(str(tmp_path / "run" / "model"))
    (tmp_path / "run" / "config.yaml").write_text("stage: tokenizer\n")
    with pytest.raises(ValueError, match="run is a run folder; use its model folder .*run/model"):
        Tokenizer.from_pretrained(str(tmp_path / "run"))


def test_model_card_video_model_shows_frames_and_streaming(tmp_path):
    """The card of a video model shows its number of frames and how to stream."""
    sizes = {"width": 32, "layers": 1, "heads": 2}
    model = config.TokenizerModelConfig(
        image_size=32,
        frames=4,
        encoder=config.TransformerConfig(**sizes),
        decoder=config.DecoderConfig(**sizes, head_hidden_dim=32),
    )
    Tokenizer(model).save_pretrained(str(tmp_path))
    card = (tmp_path / "README.md").read_text()
    assert "tags: [video-tokenizer" in card
    assert "(B, 3, 1 to 4, 32, 32)" in card
    assert "encode_stream(chunks)" in card
    assert "16 per frame" in card
