"""Tokenizers with rotary positions take images of any size, and treat every part of an image alike."""

import pytest
import torch
from pydantic import ValidationError

from bsq_ray import Tokenizer, config
from bsq_ray.models.tokenizer import Tokens
from bsq_ray.models.warm_start import initial_weights

SIZES = {"width": 32, "layers": 2, "heads": 2}
PATCH, PERIOD, RADIUS = 8, 4, 2


def local_config(**changes):
    keys = {
        "image_size": 64, "position": "rotary", "attention_radius": RADIUS, "position_period": PERIOD,
        "encoder": SIZES, "decoder": SIZES | {"head_hidden_dim": 32}, "quantizer": {"bits": 10},
    }  # fmt: skip
    return config.TokenizerModelConfig.model_validate(keys | changes)


@pytest.fixture(scope="module")
def tokenizer():
    """A tokenizer in fp64 with weights of some size everywhere."""
    torch.manual_seed(0)
    tokenizer = Tokenizer(local_config()).double().eval()
    with torch.no_grad():
        for parameter in tokenizer.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return tokenizer


@pytest.fixture(scope="module", params=[RADIUS, None], ids=["local", "full attention"])
def video_tokenizer(request):
    """A causal tokenizer of clips of four frames, in fp64."""
    torch.manual_seed(0)
    tokenizer = Tokenizer(local_config(frames=4, attention_radius=request.param)).double().eval()
    with torch.no_grad():
        for parameter in tokenizer.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return tokenizer


def random_clips(frames, height, width):
    return torch.rand(2, 3, frames, height, width, generator=torch.Generator().manual_seed(0)).double() * 2 - 1


def random_images(height, width):
    return torch.rand(2, 3, height, width, generator=torch.Generator().manual_seed(0)).double() * 2 - 1


@pytest.mark.parametrize(("height", "width"), [(8, 8), (64, 64), (40, 152), (200, 96)])
def test_tokenizer_any_size_roundtrip(tokenizer, height, width):
    images = random_images(height, width)
    tokens = tokenizer.encode(images)
    assert tokens.grid == (1, height // PATCH, width // PATCH)
    assert tokens.bits_BNL.shape == (2, height * width // PATCH**2, 10)
    assert tokenizer.decode(tokens).shape == tokenizer.reconstruct(images).shape == images.shape


def test_features_of_interior_are_those_of_larger_image(tokenizer):
    """Far enough from the borders of a crop, features do not depend on what surrounds it."""
    images, period, margin = random_images(320, 256), PERIOD * PATCH, 2 * RADIUS
    whole = tokenizer.features(images).unflatten(1, (40, 32))
    top, left = 2 * period, period
    part = tokenizer.features(images[:, :, top : top + 160, left : left + 192]).unflatten(1, (20, 24))
    expected = whole[:, 8 : 8 + 20, 4 : 4 + 24]
    inside = slice(margin, -margin)
    torch.testing.assert_close(part[:, inside, inside], expected[:, inside, inside], rtol=1e-10, atol=1e-12)
    assert (part - expected)[:, 0].abs().max() > 1e-3


def test_encode_stream_of_any_size_encodes_each_frame(tokenizer):
    images = random_images(40, 72)
    [tokens] = list(tokenizer.encode_stream([images.unsqueeze(2).expand(-1, -1, 3, -1, -1)]))
    assert tokens.grid == (3, 5, 9)
    for bits_BNL in tokens.bits_BNL.chunk(3, 1):
        assert torch.equal(bits_BNL, tokenizer.encode(images).bits_BNL)
    [pixels] = list(tokenizer.decode_stream([tokens]))
    torch.testing.assert_close(pixels[:, :, 1], tokenizer.reconstruct(images).float())


def test_gradients_of_any_size_reach_every_parameter():
    tokenizer = Tokenizer(local_config(gradient_checkpointing=True))
    output = tokenizer(random_images(72, 136).float())
    (output.images.square().mean() + output.quantized.loss).backward()
    assert all(parameter.grad is not None for parameter in tokenizer.parameters())


def test_gradient_checkpointing_of_local_attention_changes_nothing():
    gradients = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        tokenizer = Tokenizer(local_config(gradient_checkpointing=checkpointing))
        tokenizer(random_images(64, 64).float()).images.square().mean().backward()
        gradients.append(tokenizer.to_code.weight.grad)
    assert torch.equal(*gradients)


@pytest.mark.parametrize(("height", "width"), [(64, 64), (40, 152), (160, 136)])
def test_clips_of_any_size_stream_as_in_one_pass(video_tokenizer, height, width):
    """Tokens and pixels of frames that arrive in parts are those of one pass."""
    clips = random_clips(4, height, width)
    tokens = video_tokenizer.encode(clips)
    assert tokens.grid == (4, height // PATCH, width // PATCH)
    parts = list(video_tokenizer.encode_stream([clips[:, :, :1], clips[:, :, 1:3], clips[:, :, 3]]))
    assert torch.equal(torch.cat([part.bits_BNL for part in parts], 1), tokens.bits_BNL)
    decoded = torch.cat(list(video_tokenizer.decode_stream(parts)), 2)
    torch.testing.assert_close(decoded, video_tokenizer.decode(tokens), rtol=0, atol=1e-6)


def test_clips_longer_than_the_window_slide(video_tokenizer):
    """Each frame is that of one pass over its window."""
    clips = random_clips(7, 40, 72)
    streamed = [part.bits_BNL for part in video_tokenizer.encode_stream(clips.split(1, 2), overlap=2)]
    for start in (0, 2):
        window = video_tokenizer.encode(clips[:, :, start : start + 4]).bits_BNL.chunk(4, 1)
        for frame in (2, 3):
            assert torch.equal(streamed[start + frame], window[frame])


@pytest.mark.parametrize("radius", [RADIUS, None])
def test_frames_depend_on_their_distance(radius):
    """Without positions in time, a model that sees all frames would only reorder the features of reordered frames."""
    torch.manual_seed(0)
    tokenizer = Tokenizer(local_config(frames=4, causal=False, attention_radius=radius)).double().eval()
    with torch.no_grad():
        for parameter in tokenizer.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    clips, order = random_clips(4, 40, 72), [2, 0, 3, 1]
    features = tokenizer.features(clips).unflatten(1, (4, -1))
    reordered = tokenizer.features(clips[:, :, order]).unflatten(1, (4, -1))
    assert (reordered - features[:, order]).abs().amax((0, 2, 3)).min() > 1e-4


def test_frames_depend_on_earlier_frames_alone(video_tokenizer):
    clips = random_clips(4, 40, 72)
    features = video_tokenizer.features(clips).unflatten(1, (4, -1))
    earlier = clips.clone()
    earlier[:, :, 0] *= -1
    assert (video_tokenizer.features(earlier).unflatten(1, (4, -1)) - features).abs().amax((0, 2, 3)).min() > 1e-4
    later = clips.clone()
    later[:, :, 3] *= -1
    assert torch.equal(video_tokenizer.features(later).unflatten(1, (4, -1))[:, :3], features[:, :3])


def test_stream_with_frames_of_another_size_raises(video_tokenizer):
    parts = [random_clips(1, 40, 72), random_clips(1, 72, 40)]
    with pytest.raises(ValueError, match="started with frames of 9 x 5 tokens but got 5 x 9; start another stream"):
        list(video_tokenizer.encode_stream(parts))


@pytest.mark.parametrize("causal", [True, False])
def test_gradients_of_clips_of_any_size_reach_every_parameter(causal):
    tokenizer = Tokenizer(local_config(frames=3, causal=causal, gradient_checkpointing=True))
    output = tokenizer(random_clips(3, 72, 136).float())
    (output.images.square().mean() + output.quantized.loss).backward()
    assert all(parameter.grad is not None for parameter in tokenizer.parameters())


def test_image_model_initializes_video_model(tokenizer, tmp_path):
    """The first frame of a clip is reconstructed as by the image model, and so is an image."""
    url = str(tmp_path / "model")
    Tokenizer(tokenizer.config).save_pretrained(url)
    source, target = Tokenizer.from_pretrained(url).eval(), Tokenizer(local_config(frames=4)).eval()
    target.load_state_dict(initial_weights(target.config, url))
    clips = random_clips(4, 48, 80).float()
    expected = source.reconstruct(clips[:, :, 0])
    assert torch.equal(target.reconstruct(clips[:, :, 0]), expected)
    torch.testing.assert_close(target.reconstruct(clips)[:, :, 0], expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("size", [(60, 64), (64, 0)])
def test_tokenizer_side_not_multiple_of_patch_raises(tokenizer, size):
    with pytest.raises(ValueError, match="this model takes sides that are multiples of 8; resize or crop them first"):
        tokenizer.encode(torch.zeros(1, 3, *size))


def test_decode_tokens_of_wrong_number_raises(tokenizer):
    with pytest.raises(ValueError, match=r"tokens must be booleans of shape \(B, 15, 10\)"):
        tokenizer.decode(Tokens(torch.zeros(1, 16, 10, dtype=torch.bool), (1, 3, 5)))
    with pytest.raises(ValueError, match=r"grid \(1, 0, 5\), but this model takes \(1 to 1, any rows, any columns\)"):
        tokenizer.decode(Tokens(torch.zeros(1, 0, 10, dtype=torch.bool), (1, 0, 5)))


def test_full_attention_with_rotary_positions_takes_any_size():
    """Without a radius every token depends on every other one."""
    torch.manual_seed(0)
    tokenizer = Tokenizer(local_config(attention_radius=None)).double().eval()
    images = random_images(64, 160)
    changed = images.clone()
    changed[:, :, :8, :8] *= -1
    difference_BNC = (tokenizer.features(images) - tokenizer.features(changed)).abs()
    assert difference_BNC.amax((0, 2)).min() > 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"position": "learned"}, "attention_radius needs relative positions"),
        ({"position_period": 3}, "position_period 3 does not divide the 8 rows of tokens of image_size 64"),
        ({"encoder": SIZES | {"heads": 16}}, "encoder.width 32 has 2 per head; change encoder.heads"),
    ],
)
def test_rotary_config_mistakes_raise(changes, message):
    with pytest.raises(ValidationError, match=message):
        local_config(**changes)


def test_warm_start_other_image_size_keeps_periodic_positions(tokenizer, tmp_path):
    """A model that continues with larger crops reconstructs as before."""
    url = str(tmp_path / "model")
    Tokenizer(local_config()).save_pretrained(url)
    source, target = Tokenizer.from_pretrained(url).eval(), Tokenizer(local_config(image_size=96)).eval()
    target.load_state_dict(initial_weights(target.config, url))
    images = random_images(48, 80).float()
    assert torch.equal(source.reconstruct(images), target.reconstruct(images))
