"""The tokenizer: sizes, exactness of the bit path, and errors."""

import pytest
import torch
from real_clips import street_clip

from bsq_ray import Tokenizer, config
from bsq_ray.models.quantizers import KeptBits
from bsq_ray.models.tokenizer import Tokens, patchify, unpatchify

SIZES = {"width": 32, "layers": 2, "heads": 4}


def small_config(**changes):
    keys = {
        "image_size": 32,
        "patch_size": 8,
        "encoder": SIZES,
        "decoder": SIZES | {"head_hidden_dim": 64},
        "quantizer": {"bits": 10},
    }
    return config.TokenizerModelConfig.model_validate(keys | changes)


def small_tokenizer(**changes):
    torch.manual_seed(0)
    return Tokenizer(small_config(**changes))


def images(*shape, seed=0):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1


@pytest.mark.parametrize(
    ("image_size", "bits", "total", "encoder", "decoder", "to_code", "from_code"),
    [
        (128, 18, 173_636_562, 85_401_600, 88_206_528, 13_842, 14_592),
        (256, 18, 174_816_210, 85_991_424, 88_796_352, 13_842, 14_592),
        (256, 36, 174_843_876, 85_991_424, 88_796_352, 27_684, 28_416),
    ],
)
def test_tokenizer_parameter_counts_match_paper(image_size, bits, total, encoder, decoder, to_code, from_code):
    with torch.device("meta"):
        model = Tokenizer(config.TokenizerModelConfig(image_size=image_size, quantizer=config.BSQConfig(bits=bits)))

    def count(module):
        return sum(p.numel() for p in module.parameters())

    parts = (model, model.encoder, model.decoder, model.to_code, model.from_code)
    assert tuple(map(count, parts)) == (total, encoder, decoder, to_code, from_code)


def test_patchify_orders_values_channel_row_column():
    """The values of a patch are ordered by channel, then row, then column, and unpatchify inverts patchify."""
    clip = torch.arange(3 * 2 * 4 * 6).reshape(1, 3, 2, 4, 6)
    patches = patchify(clip, 2)
    assert patches.shape == (1, 12, 12)
    token = 1 * 6 + 1 * 3 + 2  # second frame, second row of patches, third column
    assert torch.equal(patches[0, token], clip[0, :, 1, 2:4, 4:6].flatten())
    assert torch.equal(unpatchify(patches, (2, 2, 3), 2), clip)


@pytest.mark.parametrize("name", [n for n in config.preset_names() if config.load_config(n).stage == "tokenizer"])
def test_tokenizer_every_preset_builds(name):
    with torch.device("meta"):
        tokenizer = Tokenizer(config.load_config(name).model)
    assert tokenizer.to_code.out_features == tokenizer.quantizer.channels


@pytest.mark.parametrize(
    "quantizer",
    [
        {"bits": 10},
        {"bits": 36},
        {"kind": "lfq", "bits": 10},
        {"kind": "fsq", "levels": [8, 6, 5, 2]},
        {"kind": "vq", "codebook_size": 1024},
        {"kind": "vq", "codebook_size": 1024, "l2_normalize": False},
    ],
    ids=str,
)
def test_decode_matches_clamped_training_output(quantizer):
    """Decoding the encoded tokens gives the training reconstruction, clamped to [-1, 1], bit for bit."""
    tokenizer = small_tokenizer(quantizer=quantizer)
    with torch.no_grad():
        tokenizer.decoder.head[-1].weight.mul_(200)
    x = images(3, 3, 32, 32)
    output = tokenizer(x)
    tokens = tokenizer.encode(x)
    assert tokens.grid == (1, 4, 4)
    assert tokens.bits_BNL.shape == (3, 16, tokenizer.config.quantizer.bits)
    assert tokens.bits_BNL.dtype == torch.bool
    assert torch.equal(tokens.bits_BNL, output.quantized.bits_BNL)
    assert output.images.abs().max() > 1
    decoded = tokenizer.decode(tokens)
    assert torch.equal(decoded, output.images.clamp(-1, 1))
    assert torch.equal(decoded, tokenizer.reconstruct(x))


@pytest.mark.parametrize("num_bits", [1, 4, 7, 10])
def test_nested_decode_equals_training_with_as_many_bits(num_bits):
    """The first bits decode to the reconstruction of a training step that keeps as many."""
    tokenizer, x = small_tokenizer(quantizer={"bits": 10, "keep": [4, 7, 10]}), images(2, 3, 32, 32)
    kept_bits = KeptBits(torch.full((2,), num_bits), (torch.arange(10) < num_bits).float())
    output, tokens = tokenizer(x, None, kept_bits), tokenizer.encode(x)
    assert torch.equal(output.quantized.bits_BNL, tokens.bits_BNL)
    assert torch.equal(tokenizer.decode(tokens.first(num_bits)), output.images.clamp(-1, 1))


def test_decode_of_fewer_bits_needs_nested_tokenizer():
    """An ordinary tokenizer rejects fewer bits, except in the baseline that cuts its codes."""
    ordinary, x = small_tokenizer(), images(1, 3, 32, 32)
    tokens = ordinary.encode(x)
    with pytest.raises(ValueError, match=r"tokens have 4 of 10 bits, but .*model.quantizer.keep=\[5,10\]"):
        ordinary.decode(tokens.first(4))
    assert ordinary.decode_cut_bits(tokens.first(4)).shape == x.shape
    assert torch.equal(ordinary.decode_cut_bits(tokens), ordinary.decode(tokens))
    for num_bits in (0, 11):
        with pytest.raises(ValueError, match=f"cannot keep {num_bits} bits of tokens of 10 bits"):
            tokens.first(num_bits)
    fsq = small_tokenizer(quantizer={"kind": "fsq", "levels": [8, 6]})
    with pytest.raises(ValueError, match=r"booleans of shape \(B, 16, 6\)"):
        fsq.decode_cut_bits(fsq.encode(x).first(3))


def test_nested_clip_streams_fewer_bits():
    tokenizer, clip = small_tokenizer(frames=2, quantizer={"bits": 10, "keep": [4, 10]}), street_clip(2, 32)
    tokens = tokenizer.encode(clip).first(4)
    [pixels] = tokenizer.decode_stream([tokens])
    torch.testing.assert_close(pixels, tokenizer.decode(tokens))
    with pytest.raises(ValueError, match="tokens have 4 of 10 bits"):
        next(small_tokenizer(frames=2).decode_stream([tokens]))


def test_encode_decode_record_no_grad_and_keep_mode():
    """Encoding and decoding record no gradients and leave the module in training mode."""
    tokenizer = small_tokenizer().train()
    tokens = tokenizer.encode(images(1, 3, 32, 32).requires_grad_())
    decoded = tokenizer.decode(tokens)
    assert not decoded.requires_grad
    assert tokenizer.training


def test_tokenizer_training_step_reaches_every_parameter():
    """Every parameter receives a gradient in a training step."""
    tokenizer = small_tokenizer(frames=2)
    output = tokenizer(images(2, 3, 2, 32, 32))
    (output.images.square().mean() + output.quantized.loss).backward()
    without_gradient = [name for name, p in tokenizer.named_parameters() if p.grad is None or not p.grad.abs().any()]
    assert without_gradient == []
    assert tokenizer.last_layer is tokenizer.decoder.head[2].weight


@pytest.mark.parametrize("changed", range(5))
def test_causal_tokenizer_earlier_frames_are_unaffected(changed):
    """Changing a frame changes no token and no pixel of the frames before it."""
    tokenizer, clip = small_tokenizer(frames=5), street_clip(5, 32)
    for part in (tokenizer.encoder, tokenizer.decoder):
        torch.nn.init.normal_(part.transformer.temporal_position)
    tokens = tokenizer.encode(clip)
    features = tokenizer._features(clip)
    # Every pixel of the frame is another one, which can only reach further than one of them.
    other = clip.clone()
    other[:, :, changed] = -other[:, :, changed]
    before, after = slice(0, 16 * changed), slice(16 * changed, None)
    assert torch.equal(tokenizer.encode(other).bits_BNL[:, before], tokens.bits_BNL[:, before])
    assert torch.equal(tokenizer._features(other)[:, before], features[:, before])
    assert (tokenizer._features(other) != features)[:, after].any(-1).all()

    bits = tokens.bits_BNL.clone()
    bits[:, 16 * changed : 16 * changed + 16] ^= True
    pixels, others = tokenizer.decode(tokens), tokenizer.decode(Tokens(bits, tokens.grid))
    assert torch.equal(pixels[:, :, :changed], others[:, :, :changed])
    for later in range(changed, 5):
        assert not torch.equal(pixels[:, :, later], others[:, :, later])


def test_non_causal_tokenizer_every_frame_is_affected():
    tokenizer, clip = small_tokenizer(frames=5, causal=False), street_clip(5, 32)
    other = clip.clone()
    other[:, :, 4] = -other[:, :, 4]
    different = (tokenizer._features(clip) != tokenizer._features(other)).unflatten(1, (5, 16))
    assert different.any(-1).all()


def test_tokenizer_image_equals_one_frame_clip():
    tokenizer = small_tokenizer(frames=3)
    x = images(2, 3, 32, 32)
    assert tokenizer.encode(x).grid == (1, 4, 4)
    assert torch.equal(tokenizer.encode(x).bits_BNL, tokenizer.encode(x[:, :, None]).bits_BNL)
    assert tokenizer.reconstruct(x).shape == (2, 3, 32, 32)
    assert tokenizer.reconstruct(x[:, :, None]).shape == (2, 3, 1, 32, 32)
    assert tokenizer(x).images.shape == (2, 3, 32, 32)


def test_tokenizer_initial_biases_zero_weights_small():
    tokenizer = small_tokenizer()
    assert tokenizer.encoder.patch_embedding.bias is None
    for name, p in tokenizer.named_parameters():
        if "norm" not in name and name.endswith("bias") and not name.startswith(("to_code", "from_code")):
            assert p.abs().max() == 0, name
    assert tokenizer.decoder.head[0].weight.detach().std() == pytest.approx(0.02, rel=0.1)
    assert tokenizer.encoder.transformer.spatial_position.detach().std() == pytest.approx(0.02, rel=0.2)


@pytest.mark.integration
def test_compiled_blocks_keep_state_dict_keys_and_outputs():
    """Compiling the blocks in place keeps the state dict keys and the outputs."""
    tokenizer = small_tokenizer()
    x = images(1, 3, 32, 32)
    names, expected = list(tokenizer.state_dict()), tokenizer(x).images
    assert len(tokenizer.blocks) == 4
    for block in tokenizer.blocks:
        block.compile(backend="aot_eager")
    torch.testing.assert_close(tokenizer(x).images, expected)
    assert list(tokenizer.state_dict()) == names


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tokenizer_low_precision_returns_fp32_images(dtype):
    """Images are fp32 under autocast and with bf16 weights."""
    tokenizer = small_tokenizer().to(dtype)
    x = images(1, 3, 32, 32)
    with torch.autocast("cpu", torch.bfloat16):
        output = tokenizer(x)
    assert output.images.dtype == torch.float32
    assert output.quantized.codes_BNC.dtype == torch.float32
    assert tokenizer.reconstruct(x).dtype == torch.float32


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((1, 3, 30, 32), "32 x 30 pixels, which is not a multiple of 8, but this model takes 32 x 32"),
        ((1, 3, 64, 64), "64 x 64 pixels, but this model takes 32 x 32"),
        ((1, 1, 32, 32), r"shape \(B, 3, H, W\)"),
        ((3, 32, 32), r"shape \(B, 3, H, W\)"),
        ((1, 3, 2, 32, 32), "clips have 2 frames, but this model takes 1 to 1"),
    ],
)
def test_tokenizer_wrong_image_shape_raises(shape, message):
    tokenizer = small_tokenizer()
    for call in (tokenizer, tokenizer.encode, tokenizer.reconstruct):
        with pytest.raises(ValueError, match=message):
            call(torch.zeros(shape))


def test_tokenizer_integer_images_raise():
    with pytest.raises(ValueError, match=r"floats in \[-1, 1\], got torch.uint8"):
        small_tokenizer().encode(torch.zeros(1, 3, 32, 32, dtype=torch.uint8))


def test_decode_tokens_of_other_model_raises():
    tokenizer = small_tokenizer()
    with pytest.raises(ValueError, match=r"grid \(1, 8, 8\), but this model takes \(1 to 1, 4, 4\)"):
        tokenizer.decode(Tokens(torch.zeros(1, 64, 10, dtype=torch.bool), (1, 8, 8)))
    with pytest.raises(ValueError, match=r"booleans of shape \(B, 16, 10\), got torch.bool \(1, 16, 18\)"):
        tokenizer.decode(Tokens(torch.zeros(1, 16, 18, dtype=torch.bool), (1, 4, 4)))
    with pytest.raises(ValueError, match=r"got torch\.float32"):
        tokenizer.decode(Tokens(torch.zeros(1, 16, 10), (1, 4, 4)))
