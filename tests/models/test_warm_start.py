"""A video model that begins as an image model."""

import pytest
import torch
from real_clips import street_clip

from bsq_ray import Tokenizer, config
from bsq_ray.models.warm_start import initial_weights, resize_positions

SIZES = {"width": 32, "layers": 2, "heads": 4}


def small_config(frames=1, image_size=32, **changes):
    keys = {"encoder": SIZES, "decoder": SIZES | {"head_hidden_dim": 32}, "quantizer": {"bits": 10}} | changes
    return config.TokenizerModelConfig.model_validate({"frames": frames, "image_size": image_size, **keys})


@pytest.fixture(scope="module")
def image_model(tmp_path_factory):
    """(url, tokenizer) of an image model with weights of some size everywhere."""
    torch.manual_seed(0)
    tokenizer = Tokenizer(small_config()).eval()
    with torch.no_grad():
        for parameter in tokenizer.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    url = str(tmp_path_factory.mktemp("image") / "model")
    tokenizer.save_pretrained(url)
    return url, tokenizer


def warm_started(model, url):
    tokenizer = Tokenizer(model).eval()
    tokenizer.load_state_dict(initial_weights(model, url))
    return tokenizer


@pytest.mark.parametrize("causal", [True, False])
def test_warm_start_one_frame_clip_matches_image_model(image_model, causal):
    """A one-frame clip gives the tokens and pixels of the image model."""
    url, image = image_model
    video, frame = warm_started(small_config(4, causal=causal), url), street_clip(1, 32)
    assert torch.equal(video.encode(frame).bits_BNL, image.encode(frame[:, :, 0]).bits_BNL)
    assert torch.equal(video.reconstruct(frame[:, :, 0]), image.reconstruct(frame[:, :, 0]))


def test_warm_start_causal_first_frame_matches_image_model(image_model):
    """In a causal model the first frame of any clip gives the tokens and pixels of the image model."""
    url, image = image_model
    video, clip = warm_started(small_config(4), url), street_clip(4, 32)
    expected = image.encode(clip[:, :, 0])
    assert torch.equal(video.encode(clip).bits_BNL[:, :16], expected.bits_BNL)
    first = video.reconstruct(clip)[:, :, 0]
    torch.testing.assert_close(first, image.decode(expected), rtol=0, atol=1e-6)


def test_warm_start_other_image_size_interpolates_positions(image_model):
    """Another image size interpolates the position embeddings and copies all other weights."""
    url, image = image_model
    weights = initial_weights(small_config(4, image_size=64), url)
    for name, value in image.state_dict().items():
        if not name.endswith("position"):
            assert torch.equal(weights[name], value), name
    position = weights["encoder.transformer.spatial_position"]
    assert position.shape == (64, 32)
    # Twice as fine: averaging 2 x 2 of them comes near to those of the image model.
    coarse = resize_positions(position, 4)
    image_position = image.encoder.transformer.spatial_position
    assert torch.corrcoef(torch.stack([coarse.flatten(), image_position.detach().flatten()]))[0, 1] > 0.9
    assert warm_started(small_config(4, image_size=64), url).reconstruct(street_clip(4, 64)).shape == (1, 3, 4, 64, 64)


def test_resize_positions_preserves_linear_ramp():
    row, column = torch.meshgrid(torch.arange(4.0), torch.arange(4.0), indexing="ij")
    fine = resize_positions(torch.stack([row.flatten(), column.flatten()], 1), 8).unflatten(0, (8, 8))
    inner = slice(2, 6)
    torch.testing.assert_close(fine[inner, 0, 0], torch.arange(8.0)[inner] / 2 - 0.25, rtol=0, atol=0.05)
    torch.testing.assert_close(fine[0, inner, 1], torch.arange(8.0)[inner] / 2 - 0.25, rtol=0, atol=0.05)


def test_warm_start_from_video_model_of_same_length(image_model, tmp_path):
    """A video model can start from another one with the same number of frames, and not from one with another
    number.
    """
    url, _ = image_model
    first = warm_started(small_config(4), url)
    torch.nn.init.normal_(first.encoder.transformer.temporal_position)
    first.save_pretrained(str(tmp_path / "video"))
    second = warm_started(small_config(4, causal=False), str(tmp_path / "video"))
    assert torch.equal(second.encoder.transformer.temporal_position, first.encoder.transformer.temporal_position)
    with pytest.raises(ValueError, match="model.frames is 4 there, where 1 or 8 would do"):
        initial_weights(small_config(8), str(tmp_path / "video"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"quantizer": {"bits": 12}}, "model.quantizer.bits is 10 there and 12 here"),
        ({"patch_size": 4}, "model.patch_size is 8 there and 4 here"),
        ({"encoder": SIZES | {"layers": 3}}, "model.encoder.layers is 2 there and 3 here"),
        ({"quantizer": {"kind": "fsq", "levels": [4] * 5}}, "model.quantizer.kind is bsq there and fsq here"),
    ],
    ids=["bits", "patches", "layers", "kind"],
)
def test_warm_start_mismatch_lists_differing_keys(image_model, changes, message):
    with pytest.raises(ValueError, match=f"cannot initialize this model: .*{message}"):
        initial_weights(small_config(4, **changes), image_model[0])


def test_warm_start_ignores_training_only_keys(image_model):
    quantizer = {
        "bits": 10,
        "commitment_weight": 0.25,
        "entropy": {"estimate": "group", "group_size": 5},
        "keep": [5, 10],
    }
    initial_weights(small_config(4, quantizer=quantizer, gradient_checkpointing=True), image_model[0])


def test_warm_start_not_a_model_folder_raises(tmp_path):
    with pytest.raises(ValueError, match="is not a model folder"):
        initial_weights(small_config(4), str(tmp_path))
