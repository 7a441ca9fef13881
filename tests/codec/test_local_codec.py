"""The codec with a tokenizer of local attention: an image is computed as a whole, and no tile has an effect on it."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from small_codecs import PRIOR_CONFIG, save_prior
from small_models import save_tokenizer

from bsq_ray import Codec, Prior, Tokenizer, config
from bsq_ray.codec.pixel_codec import build_pixel_codec
from bsq_ray.codec.rect import Rect
from bsq_ray.codec.tiles import as_grid, as_tiles, pad_to_tiles
from bsq_ray.data.transforms import to_uint8
from bsq_ray.model_export import export_model
from bsq_ray.models.tokenizer import Tokens

GOLDEN = Path(__file__).parents[1] / "golden" / "bsq-local-attention"
# One layer on each side, and tiles of 4 x 4 tokens: one tile of context.
LOCAL = {"position": "rotary", "attention_radius": 3, "position_period": 4}


@pytest.fixture(scope="module")
def local_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("local")
    return save_prior(folder / "prior", save_tokenizer(folder / "tokenizer", 0, **LOCAL))


@pytest.fixture(scope="module")
def local_codec(local_folder):
    return Codec.from_pretrained(local_folder)


@pytest.fixture(scope="module")
def photo(photos):
    return photos[0].resize((300, 170))


@pytest.fixture(scope="module")
def data(local_codec, photo):
    return local_codec.compress(photo).data


def whole_image(folder, photo):
    """Tokens and pixels of the tokenizer for the whole image in one pass, edges replicated to whole tiles."""
    tokenizer = Tokenizer.from_pretrained(f"{folder}/tokenizer")
    pixels_CTHW = pad_to_tiles(torch.from_numpy(np.array(photo)).permute(2, 0, 1)[:, None], 32)
    tokens = tokenizer.encode(pixels_CTHW[None, :, 0] / 127.5 - 1)
    decoded = tokenizer.double().decode(tokens)[0, :, : photo.height, : photo.width].double()
    return tokens, ((decoded + 1) * 127.5).round().clamp(0, 255).byte().permute(1, 2, 0).numpy()


def test_decompress_equals_tokenizer_on_whole_image(local_folder, local_codec, photo, data):
    """The codec decodes what the tokenizer reconstructs from the whole image in one pass."""
    _, expected = whole_image(local_folder, photo)
    assert np.array_equal(np.asarray(local_codec.decompress(data)), expected)


def test_encode_tiles_of_rows_equal_whole_image(local_folder, photo, monkeypatch):
    """Tokens of rows of tiles, in blocks of one tile, are those of the whole image."""
    monkeypatch.setattr("bsq_ray.codec.pixel_codec._LOCAL_BLOCK_TOKENS", 16)
    monkeypatch.setattr("bsq_ray.codec.pixel_codec._MIN_LOCAL_BLOCK_SIDE", 1)
    tokens, _ = whole_image(local_folder, photo)
    codec = build_pixel_codec(Tokenizer.from_pretrained(f"{local_folder}/tokenizer").eval(), torch.float64, None, 4)
    pixels_CTHW = torch.from_numpy(np.array(photo)).permute(2, 0, 1)[:, None]
    expected_RCNL = as_tiles(tokens.bits_BNL[0].unflatten(0, tokens.grid), 4)
    for tiles in (Rect(0, 0, 6, 10), Rect(2, 0, 4, 10), Rect(5, 0, 6, 10)):
        bits_RCNL = codec.encode_tiles(pixels_CTHW, tiles, lambda: None)
        assert torch.equal(bits_RCNL, expected_RCNL[tiles.slices()])


def test_exported_prior_of_smaller_tiles_decodes_the_same_pixels(photo, tmp_path):
    """Tiles of a prior may be smaller than in training: whole tiles have the same tokens and pixels."""
    tokenizer = save_tokenizer(tmp_path / "tokenizer", 0, **(LOCAL | {"position_period": 2}))
    url = save_prior(tmp_path / "prior", tokenizer)
    export_model(url, str(tmp_path / "small"), "float32", prior_side=2)
    codecs = [Codec.from_pretrained(folder) for folder in (url, str(tmp_path / "small"))]
    photo = photo.crop((0, 0, 288, 160))
    files = [codec.compress(photo).data for codec in codecs]
    assert [codec.token_format.tile_size for codec in codecs] == [32, 16]
    for region in (None, (33, 10, 150, 90), (288 - 17, 0, 288, 160)):
        whole, parts = (codec.decompress(data, region) for codec, data in zip(codecs, files, strict=True))
        assert parts.tobytes() == whole.tobytes()


def test_exported_prior_of_smaller_tiles_keeps_the_places_of_tokens(tmp_path):
    """A token has the position embedding of its row and column; the first row predicts as in the trained prior."""
    tokenizer = save_tokenizer(tmp_path / "tokenizer", 0, **(LOCAL | {"position_period": 2}))
    url = save_prior(tmp_path / "prior", tokenizer)
    export_model(url, str(tmp_path / "small"), "float32", prior_side=2)
    trained, small = Prior.from_pretrained(url), Prior.from_pretrained(str(tmp_path / "small"))
    columns = trained.config.grid[2]
    for row in range(2):
        for column in range(2):
            assert torch.equal(small.position[2 * row + column], trained.position[columns * row + column])
    tokens_BNS = torch.randint(2**trained.config.sub_bits, (3, 2, trained.config.num_sub_tokens))
    torch.testing.assert_close(small(tokens_BNS), trained(tokens_BNS), rtol=0, atol=0)


@pytest.fixture(scope="module", params=[True, False], ids=["causal", "not causal"])
def clip_folder(request, tmp_path_factory):
    """A prior over clips of 3 frames of 4 x 4 tokens, with local attention."""
    folder = tmp_path_factory.mktemp("clips")
    url = save_tokenizer(folder / "tokenizer", 0, frames=3, causal=request.param, **LOCAL)
    return save_prior(folder / "prior", url, PRIOR_CONFIG.model_copy(update={"grid": (3, 4, 4)}))


def test_clip_equals_tokenizer_on_whole_frames(clip_folder, photos, monkeypatch):
    """Groups of frames are coded as the tokenizer reconstructs their whole frames, in blocks of one tile too."""
    frames = [np.asarray(photo.resize((150, 90))) for photo in photos[:5]]
    codec = Codec.from_pretrained(clip_folder)
    data = codec.compress_clip(frames, 25).data
    tokenizer = Tokenizer.from_pretrained(f"{clip_folder}/tokenizer").eval()
    decoder = Tokenizer.from_pretrained(f"{clip_folder}/tokenizer").eval().double()
    expected = []
    for group in (frames[:3], [*frames[3:], frames[4]]):
        pixels_CTHW = pad_to_tiles(torch.from_numpy(np.stack(group)).permute(3, 0, 1, 2), 32)
        tokens = tokenizer.encode(pixels_CTHW[None] / 127.5 - 1)
        decoded_CTHW = decoder.decode(tokens)[0, :, :, :90, :150].double()
        expected += list(((decoded_CTHW + 1) * 127.5).round().clamp(0, 255).byte().permute(1, 2, 3, 0).numpy())
    assert np.array_equal(np.stack(list(codec.decompress_clip(data))), np.stack(expected[:5]))
    [part] = codec.decompress_clip(data, range(4, 5), (40, 10, 120, 70))
    assert np.array_equal(part, expected[4][10:70, 40:120])
    monkeypatch.setattr("bsq_ray.codec.pixel_codec._LOCAL_BLOCK_TOKENS", 16)
    monkeypatch.setattr("bsq_ray.codec.pixel_codec._MIN_LOCAL_BLOCK_SIDE", 1)
    assert codec.compress_clip(frames, 25).data == data
    assert np.array_equal(np.stack(list(codec.decompress_clip(data))), np.stack(expected[:5]))


@pytest.mark.parametrize(
    ("url", "side", "message"),
    [
        ("prior", 5, "predicts 4 x 4 tokens together"),
        ("prior", 2, "multiple of model.position_period 4"),
        ("tokenizer", 4, "prior"),
    ],
)
def test_export_impossible_tiles_raises(local_folder, tmp_path, url, side, message):
    source = local_folder if url == "prior" else f"{local_folder}/tokenizer"
    with pytest.raises(ValueError, match=message):
        export_model(source, str(tmp_path / "small"), prior_side=side)


@pytest.mark.parametrize("size", [(1, 1), (31, 33), (32, 32), (200, 40), (129, 257)])
def test_local_codec_any_image_size_roundtrip(local_codec, photos, size):
    photo = photos[1].resize(size)
    assert local_codec.decompress(local_codec.compress(photo).data).size == size


@pytest.mark.parametrize("region", [(0, 0, 300, 170), (10, 5, 40, 90), (100, 64, 101, 65), (33, 0, 150, 10)])
def test_local_decompress_region_matches_crop(local_codec, data, region):
    part = local_codec.decompress(data, region)
    assert part.tobytes() == local_codec.decompress(data).crop(region).tobytes()


def test_local_decompress_in_blocks_is_identical(local_folder, data, local_codec, monkeypatch):
    whole = local_codec.decompress(data).tobytes()
    monkeypatch.setattr("bsq_ray.codec.pixel_codec._LOCAL_BLOCK_TOKENS", 16**2)
    monkeypatch.setattr("bsq_ray.codec.pixel_codec._MIN_LOCAL_BLOCK_SIDE", 1)
    assert Codec.from_pretrained(local_folder).decompress(data).tobytes() == whole


@pytest.mark.parametrize(("radius", "period", "layers"), [(2, 4, 1), (3, 4, 1), (4, 4, 2), (1, 2, 5)])
def test_blocks_keep_the_places_of_position_embeddings(tmp_path, photos, monkeypatch, radius, period, layers):
    """With tiles of one token, and contexts that no period divides, blocks have the tokens and pixels of the image."""
    monkeypatch.setattr("bsq_ray.codec.pixel_codec._LOCAL_BLOCK_TOKENS", 24**2)
    monkeypatch.setattr("bsq_ray.codec.pixel_codec._MIN_LOCAL_BLOCK_SIDE", 1)
    sizes = {"width": 32, "layers": layers, "heads": 2}
    places = {"attention_radius": radius, "position_period": period}
    model_config = Tokenizer.from_pretrained(save_tokenizer(tmp_path, 0, **(LOCAL | places))).config
    parts = {"encoder": config.TransformerConfig(**sizes), "decoder": config.DecoderConfig(**sizes, head_hidden_dim=32)}
    tokenizer = Tokenizer(model_config.model_copy(update=parts)).double().eval()
    with torch.no_grad():
        for part in (tokenizer.encoder, tokenizer.decoder):
            part.transformer.spatial_position.mul_(20)  # as large as after a training
    codec = build_pixel_codec(tokenizer, torch.float64, None, 1)
    pixels_CTHW = torch.from_numpy(np.array(photos[0].resize((408, 104)))).permute(2, 0, 1)[:, None]
    tokens = tokenizer.encode(pixels_CTHW[None, :, 0] / 127.5 - 1)
    bits_RCNL = codec.encode_tiles(pixels_CTHW, Rect(0, 0, 13, 51), lambda: None)
    assert torch.equal(bits_RCNL.flatten(0, 2), tokens.bits_BNL[0])
    available_RC = torch.ones(13, 51, dtype=torch.bool)
    decoded = codec.decode_region(bits_RCNL, available_RC, 1, Rect(0, 0, 104, 408), lambda: None)
    assert torch.equal(decoded[:, 0], to_uint8(tokenizer.decode(tokens)[0]))


@pytest.mark.parametrize(("radius", "layers"), [(4, 6), (4, 15), (4, 16), (8, 24)])
def test_blocks_of_deep_models_have_many_tokens(tmp_path, radius, layers):
    """Not one pass for every token: the tokens around a block are computed with each block."""
    model_config = Tokenizer.from_pretrained(save_tokenizer(tmp_path, 0, **LOCAL)).config
    encoder_config = model_config.encoder.model_copy(update={"layers": layers})
    changes = {"encoder": encoder_config, "attention_radius": radius}
    with torch.device("meta"):
        tokenizer = Tokenizer(model_config.model_copy(update=changes))
    for grid_size in (1, 4, 16):
        codec = build_pixel_codec(tokenizer, torch.float32, None, grid_size)
        assert codec._block_tiles(1) * grid_size >= 32


def test_local_preview_shows_only_pixels_of_available_tokens(local_codec, photos):
    """Tiles next to missing ones are gray, because their pixels depend on missing tokens."""
    data = local_codec.compress(photos[2].resize((300, 280))).data
    whole = np.asarray(local_codec.decompress(data))
    image, fraction = local_codec.preview(data[: len(data) * 2 // 3])
    pixels, is_gray = np.asarray(image), (np.asarray(image) == 128).all(-1)
    assert 0.2 < fraction < 0.8
    assert (pixels[~is_gray] == whole[~is_gray]).all()
    assert 0.2 < (~is_gray).mean() < 0.6
    assert np.array_equal(np.asarray(local_codec.preview(data)[0]), whole)


def test_codec_full_attention_of_any_size_raises(tmp_path):
    url = save_tokenizer(tmp_path / "tokenizer", 0, **(LOCAL | {"attention_radius": None}))
    with pytest.raises(ValueError, match="the codec needs local attention for images of any size"):
        Codec.from_pretrained(url)


@pytest.mark.parametrize(("radius", "layers", "tiles"), [(3, 1, 1), (4, 1, 1), (4, 3, 3), (5, 3, 4)])
def test_context_covers_receptive_field(tmp_path, radius, layers, tiles):
    """Pixels change with tokens up to the context away, and with none farther away."""
    torch.manual_seed(0)
    url = save_tokenizer(tmp_path / "tokenizer", 0, **(LOCAL | {"attention_radius": radius}))
    model_config = Tokenizer.from_pretrained(url).config
    decoder_config = model_config.decoder.model_copy(update={"layers": layers})
    tokenizer = Tokenizer(model_config.model_copy(update={"decoder": decoder_config})).double().eval()
    assert build_pixel_codec(tokenizer, torch.float64, None, 4).context_tiles == tiles
    columns = 2 * layers * radius + 3
    bits_trcL = torch.rand(1, 2, columns, 10) < 0.5
    changed_trcL = bits_trcL.clone()
    changed_trcL[:, :, 0] ^= True
    pixels = [tokenizer.decode(Tokens(bits.flatten(0, 2)[None], (1, 2, columns))) for bits in (bits_trcL, changed_trcL)]
    difference_c = (pixels[0] - pixels[1]).abs().amax((0, 1, 2)).unflatten(0, (columns, 8)).amax(1)
    assert difference_c[layers * radius] > 0
    assert difference_c[layers * radius + 1 :].max() == 0


def test_as_tiles_inverts_as_grid():
    bits_RCNL = torch.rand(2, 3, 32, 5) < 0.5
    assert torch.equal(as_tiles(as_grid(bits_RCNL, 2), 4), bits_RCNL)


def test_decompress_golden_file_of_local_attention():
    """Rotations, repeating embeddings and blocks of earlier versions decode to the same bytes."""
    codec = Codec.from_pretrained(str(GOLDEN / "tokenizer"))
    decoded = codec.decompress((GOLDEN / "photo.bsq").read_bytes())
    assert decoded.tobytes() == Image.open(GOLDEN / "photo.png").tobytes()


_COMPRESS_LARGE = """
import resource, sys
from PIL import Image
from bsq_ray import Codec
codec = Codec.from_pretrained(sys.argv[1])
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
codec.compress(Image.effect_noise((1100, 1100), 60).convert("RGB"))
image = Image.effect_noise((2000, 4000), 60).convert("RGB")
before = peak()
codec.compress(image)
print((peak() - before) / (2000 * 4000))
"""


@pytest.mark.integration
def test_local_compress_large_image_needs_few_bytes_per_pixel(local_folder):
    """Memory grows by less than 16 bytes per pixel: blocks of a limited size are encoded."""
    words = [sys.executable, "-c", _COMPRESS_LARGE, f"{local_folder}/tokenizer"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    output = subprocess.run(words, check=True, capture_output=True, text=True, env=environment)
    assert float(output.stdout) < 16
