"""Nested bits in files: rates, targets, and files that are cut anywhere."""

import random
from itertools import pairwise

import numpy as np
import pytest
import torch
from damaged_files import corrupt_bytes
from small_codecs import save_nested_tokenizer

from bsq_ray import Codec
from bsq_ray.codec.container import read_container
from bsq_ray.codec.files import compress_file, decompress_file
from bsq_ray.codec.rate import PlaneLayout, Rate
from bsq_ray.metrics.lpips import lpips


@pytest.fixture(scope="module")
def nested_codec(tmp_path_factory):
    return Codec.from_pretrained(save_nested_tokenizer(tmp_path_factory.mktemp("nested")))


@pytest.fixture(scope="module")
def clip_codec(tmp_path_factory):
    return Codec.from_pretrained(save_nested_tokenizer(tmp_path_factory.mktemp("nested-clip"), frames=2))


@pytest.fixture(scope="module")
def photo(photos):
    """Five tiles in two groups."""
    return photos[0].resize((150, 30))


@pytest.fixture(scope="module")
def frames(photos):
    """Three frames in two groups of pictures."""
    return [np.asarray(photo.resize((40, 20))) for photo in photos[:3]]


def at_each_rate(codec, photo):
    """Pixels of the image at each number of bits, from files that contain no more."""
    rates = range(1, codec.token_format.bits + 1)
    return {k: codec.decompress(codec.compress(photo, rate=Rate(k)).data).tobytes() for k in rates}


def test_planes_end_where_tokenizer_was_trained():
    layout = PlaneLayout((6, 9, 12, 18))
    assert layout.plane_bits(18) == (6, 3, 3, 6)
    assert layout.plane_bits(11) == (6, 3, 2)
    assert layout.plane_bits(4) == (4,)
    assert PlaneLayout((5, 9, 18), unit=3).plane_bits(18) == (9, 9)
    assert layout.ranges([6, 7]) == [(0, 6), (6, 7)]


@pytest.mark.parametrize("num_bits", [1, 4, 6, 10])
def test_file_of_fewer_bits_decodes_to_prefix_of_tokens(nested_codec, photos, num_bits):
    """One tile: the pixels are those of the tokenizer."""
    tile = photos[1].resize((32, 32))
    compressed = nested_codec.compress(tile, rate=Rate(num_bits))
    image_BCHW = torch.from_numpy(np.array(tile)).permute(2, 0, 1)[None] / 127.5 - 1
    tokenizer = nested_codec.tokenizer
    expected_BCHW = tokenizer.decode(tokenizer.encode(image_BCHW).first(num_bits))
    expected = expected_BCHW.add(1).mul(127.5).round().clamp(0, 255).byte()[0].permute(1, 2, 0).numpy()
    assert (np.array(nested_codec.decompress(compressed.data)) == expected).all()
    assert compressed.num_bits == num_bits
    assert compressed.raw_bits == 16 * num_bits


def test_files_cut_anywhere_decode_to_last_whole_plane(nested_codec, photo):
    """Every beginning of a file gives the pixels of a file with fewer bits, or the error that it is truncated."""
    data, pixels = nested_codec.compress(photo).data, at_each_rate(nested_codec, photo)
    decoded_bits, messages = [], []
    for size in range(5, len(data) + 1):
        try:
            image = nested_codec.decompress(data[:size]).tobytes()
        except ValueError as error:
            messages.append(str(error))
            continue
        available, stored = nested_codec.available_bits(data[:size])
        assert (image, stored) == (pixels[available], 10)
        decoded_bits.append(available)
    assert all("the file is truncated" in message for message in messages)
    planes = read_container(data, nested_codec.token_format).planes
    assert len(messages) == planes.offsets_PG[0, -1] + planes.sizes_PG[0, -1] - 5, "every size from there on decodes"
    assert sorted(set(decoded_bits)) == [4, 7, 10]
    assert decoded_bits == sorted(decoded_bits)
    # All sizes are known, so nothing but whole planes is missing.
    assert decoded_bits.count(10) == 1


def test_cut_clip_decodes_all_frames_with_fewer_bits(clip_codec, frames):
    data = clip_codec.compress_clip(frames, 25).data
    planes = read_container(data, clip_codec.token_format).planes
    for num_bits, plane in ((4, 0), (7, 1)):
        end = int(planes.offsets_PG[plane, -1] + planes.sizes_PG[plane, -1])
        expected = list(clip_codec.decompress_clip(clip_codec.compress_clip(frames, 25, rate=Rate(num_bits)).data))
        assert len(expected) == 3
        assert np.array_equal(list(clip_codec.decompress_clip(data[:end])), expected)
        assert np.array_equal(list(clip_codec.preview_clip(data[:end])[0]), expected)
        if plane == 0:
            with pytest.raises(ValueError, match="truncated: its first 4 bits per token need"):
                clip_codec.available_bits(data[: end - 1])
        else:
            assert clip_codec.available_bits(data[: end - 1])[0] == 4
    [frame] = clip_codec.decompress_clip(data, range(1, 2))
    assert np.array_equal(frame, list(clip_codec.decompress_clip(data))[1])


def test_region_and_preview_of_planes_equal_whole_image(nested_codec, photo):
    data = nested_codec.compress(photo).data
    whole = np.array(nested_codec.decompress(data))
    assert (np.array(nested_codec.decompress(data, (100, 5, 149, 30))) == whole[5:30, 100:149]).all()
    preview, fraction = nested_codec.preview(data)
    assert (np.array(preview) == whole).all()
    assert fraction == 1


def test_target_bytes_selects_most_bits_that_fit(nested_codec, photo):
    sizes = {k: len(nested_codec.compress(photo, rate=Rate(k)).data) for k in range(1, 11)}
    assert all(smaller < larger for smaller, larger in pairwise(sizes[k] for k in (1, 4, 7, 10)))
    for target in (sizes[1], sizes[6], sizes[6] + 1, 10_000):
        compressed = nested_codec.compress(photo, rate=Rate(target_bytes=target))
        assert compressed.num_bits == max(k for k, size in sizes.items() if size <= target)
        assert len(compressed.data) <= target
    message = f"{sizes[1] - 1} bytes are not enough: with 1 bits per token the file has {sizes[1]} bytes"
    with pytest.raises(ValueError, match=message):
        nested_codec.compress(photo, rate=Rate(target_bytes=sizes[1] - 1))


def test_target_bytes_of_clip_includes_all_groups(clip_codec, frames):
    sizes = {k: len(clip_codec.compress_clip(frames, 25, rate=Rate(k)).data) for k in (5, 6)}
    compressed = clip_codec.compress_clip(frames, 25, rate=Rate(target_bytes=sizes[6] - 1))
    assert (compressed.num_bits, len(compressed.data)) == (5, sizes[5])
    with pytest.raises(ValueError, match="--target-lpips is for images"):
        clip_codec.compress_clip(frames, 25, rate=Rate(target_lpips=0.5))


def test_target_lpips_selects_fewest_bits_that_reach_it(nested_codec, photos):
    tile = photos[2].resize((48, 40))

    def to_float(image):
        return torch.from_numpy(np.array(image)).permute(2, 0, 1)[None] / 127.5 - 1

    files = {k: nested_codec.compress(tile, rate=Rate(k)).data for k in range(1, 11)}
    values = {k: float(lpips(to_float(tile), to_float(nested_codec.decompress(data)))) for k, data in files.items()}
    target = sorted(values.values())[4]
    compressed = nested_codec.compress(tile, rate=Rate(target_lpips=target + 1e-6))
    assert compressed.num_bits == min(k for k, value in values.items() if value <= target + 1e-6)
    with pytest.raises(ValueError, match=r"LPIPS 0.001 cannot be reached: with all 10 bits per token it is 0\.\d+"):
        nested_codec.compress(tile, rate=Rate(target_lpips=0.001))
    with pytest.raises(ValueError, match="--target-lpips needs an image of 31 x 31 pixels or more"):
        nested_codec.compress(tile.resize((40, 30)), rate=Rate(target_lpips=0.5))


@pytest.mark.parametrize(
    ("rate", "message"),
    [
        (dict(bits=11), "tokens cannot be cut to 11 bits; use 1 to 10"),
        (dict(bits=4, target_bytes=100), "choose one of --bits, --target-bytes and --target-lpips"),
        (dict(target_lpips=-0.1), "a rate must be above 0, got -0.1"),
    ],
)
def test_impossible_rate_raises(nested_codec, photo, rate, message):
    with pytest.raises(ValueError, match=message):
        nested_codec.compress(photo, rate=Rate(**rate))


def test_codec_without_nested_bits_rejects_rates_and_planes(codec, raw_codec, nested_codec, photo):
    for ordinary in (codec, raw_codec):
        with pytest.raises(ValueError, match=r"need a tokenizer trained with nested bits \(model.quantizer.keep\)"):
            ordinary.compress(photo, rate=Rate(bits=4))
    with pytest.raises(ValueError, match="the file was written with the models with key"):
        raw_codec.decompress(nested_codec.compress(photo).data)


def decode_or_none(codec, data):
    try:
        return codec.decompress(data).tobytes()
    except ValueError:
        return None


def test_damaged_planes_raise_or_decode_to_fewer_bits(nested_codec, photo):
    """Damage never gives other pixels than those of the file at some rate."""

    class Target:
        data = nested_codec.compress(photo).data

    rng, valid = random.Random(0), set(at_each_rate(nested_codec, photo).values())
    outcomes = [decode_or_none(nested_codec, corrupt_bytes(Target, rng)) for _ in range(300)]
    assert set(outcomes) - {None} <= valid
    assert outcomes.count(None) > 200
    data = bytearray(Target.data)
    data[-1] ^= 1
    with pytest.raises(ValueError, match="group 1 does not match its checksum"):
        nested_codec.decompress(bytes(data))
    with pytest.raises(ValueError, match="the file is damaged: it has 1 bytes after its last plane"):
        nested_codec.decompress(Target.data + b"x")


def test_compress_file_reports_bits_of_cut_file(photos, tmp_path):
    model = save_nested_tokenizer(tmp_path / "model")
    photos[0].resize((32, 32)).save(tmp_path / "photo.png")
    summary = compress_file(model, str(tmp_path / "photo.png"), str(tmp_path / "a.bsq"), rate=Rate(bits=7))
    assert "7 bits per token" in summary
    (tmp_path / "cut.bsq").write_bytes((tmp_path / "a.bsq").read_bytes()[:-1])
    summary = decompress_file(model, str(tmp_path / "cut.bsq"), str(tmp_path / "out.png"))
    assert "32 x 32 px, 4 of 7 bits per token, because the file is cut" in summary
    assert "because" not in decompress_file(model, str(tmp_path / "a.bsq"), str(tmp_path / "out.png"))


@pytest.mark.slow
def test_all_prefixes_of_200_files_decode_or_raise(nested_codec, photos):
    rng = random.Random(0)
    for _ in range(200):
        photo = photos[rng.randrange(len(photos))].resize((rng.randrange(1, 140), rng.randrange(1, 60)))
        data = nested_codec.compress(photo, rate=Rate(rng.randrange(1, 11))).data
        container = read_container(data, nested_codec.token_format)
        ends = [0, *(container.planes.offsets_PG + container.planes.sizes_PG)[:, -1].tolist()]
        bits = np.cumsum([0, *container.header.plane_bits]).tolist()
        for size in range(5, len(data) + 1):
            num_planes = sum(end <= size for end in ends) - 1
            if num_planes:
                assert nested_codec.available_bits(data[:size])[0] == bits[num_planes]
            else:
                with pytest.raises(ValueError, match="the file is truncated"):
                    nested_codec.available_bits(data[:size])
        for end, num_bits in zip(ends[1:], bits[1:], strict=True):
            expected = nested_codec.decompress(nested_codec.compress(photo, rate=Rate(num_bits)).data)
            assert nested_codec.decompress(data[:end]).tobytes() == expected.tobytes()
