"""The codec: tokens come back exactly, whoever decodes; damage is named; pictures have any size."""

import io
import os
import random
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from small_models import save_tokenizer

from bsq_ray import Codec, Prior, config
from bsq_ray.codec.container import Header, read_container, read_header, write_container
from bsq_ray.codec.tiles import as_grid, cut, join
from bsq_ray.codec.tokens import decode_tokens, encode_tokens

SECTION = config.PriorModel(grid=(1, 4, 4), bits=10, sub_bits=5, width=32, layers=2, heads=2, dropout=0)
TOLERANCE = 2.0**-14


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A prior's model folder with its tokenizer; sharp enough to have an opinion."""
    url = tmp_path_factory.mktemp("prior")
    torch.manual_seed(0)
    prior = Prior(SECTION)
    with torch.no_grad():
        for tree in prior.trees:
            tree.weight.mul_(15)
    prior.save_pretrained(str(url))
    save_tokenizer(url / "tokenizer", 0)
    return str(url)


@pytest.fixture(scope="module")
def codec(folder):
    return Codec.from_pretrained(folder)


@pytest.fixture(scope="module")
def raw_codec(folder):
    return Codec.from_pretrained(f"{folder}/tokenizer")


@pytest.fixture(scope="module")
def photo(photos):
    return photos[0].resize((150, 100))


@pytest.fixture(scope="module")
def data(codec, photo):
    return codec.compress(photo).data


def bits(tiles, seed=0):
    return torch.rand(tiles, 16, 10, generator=torch.Generator().manual_seed(seed)) < 0.5


def array(image):
    return np.asarray(image).astype(int)


@pytest.mark.parametrize("tiles", [1, 3, 16])
def test_tokens_come_back(codec, tiles):
    coded = encode_tokens(codec.prior, bits(tiles), TOLERANCE)
    assert torch.equal(decode_tokens(codec.prior, coded.data, tiles), bits(tiles))


def test_the_size_is_the_cross_entropy_and_the_side_information(codec):
    coded = encode_tokens(codec.prior, bits(400), TOLERANCE)
    # What the range coder rounds up to, and the grid of probabilities.
    assert 8 * len(coded.data) == pytest.approx(coded.cross_entropy + coded.side, rel=0.005)


class Disturbed(torch.nn.Module):
    """A prior on another machine: every logit differs by up to an amount, at random."""

    def __init__(self, prior, amount):
        super().__init__()
        self.prior, self.amount = prior, amount
        self.config, self.start = prior.config, prior.start

    def start_decoding(self, batch):
        return self.prior.start_decoding(batch)

    def node_logits(self, h_BND, earlier_BNs):
        logits = self.prior.node_logits(h_BND, earlier_BNs).double()
        return logits + (torch.rand_like(logits) * 2 - 1) * self.amount


def test_another_machine_decodes_the_same_tokens_within_the_tolerance(codec):
    for seed in range(10):
        coded = encode_tokens(codec.prior, bits(16, seed), 2.0**-8)
        assert torch.equal(decode_tokens(Disturbed(codec.prior, 2.0**-8 - 1e-4), coded.data, 16), bits(16, seed))


def test_further_off_than_allowed_is_noticed(folder, photo, data):
    codec = Codec.from_pretrained(folder)
    codec.prior = Disturbed(codec.prior, 0.3)
    with pytest.raises(ValueError, match=r"this machine's logits differ from the encoder's by more than the 2\^-14"):
        codec.decompress(data)


def test_batch_and_threads_of_the_decoder_do_not_matter(folder, photo, codec, data, tmp_path):
    (tmp_path / "a.bsq").write_bytes(data)
    expected = codec.decompress(data)
    code = (
        "import sys, torch; torch.set_num_threads(int(sys.argv[3])); from bsq_ray import Codec; "
        "from bsq_ray.codec import image; image._BATCH = int(sys.argv[4]); "
        "Codec.from_pretrained(sys.argv[1]).decompress(open(sys.argv[2], 'rb').read()).save(sys.argv[5])"
    )
    for threads, batch in ((1, 1), (2, 7)):
        out = tmp_path / f"{threads}.png"
        call = [sys.executable, "-c", code, folder, str(tmp_path / "a.bsq"), str(threads), str(batch), str(out)]
        subprocess.run(call, check=True, env=os.environ | {"OMP_NUM_THREADS": str(threads)})
        assert np.abs(array(Image.open(out)) - array(expected)).max() <= 1


@pytest.mark.parametrize("size", [(1, 1), (31, 33), (32, 32), (200, 40), (129, 257)])
def test_images_of_any_size_come_back_in_it(codec, raw_codec, photos, size):
    photo = photos[1].resize(size)
    data = codec.compress(photo).data
    image = codec.decompress(data)
    assert image.size == size
    raw = raw_codec.compress(photo)
    assert raw_codec.decompress(raw.data).tobytes() == image.tobytes(), (
        "with and without a prior the pixels are the same"
    )
    assert raw.raw_bits <= 8 * len(raw.data)


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "CMYK", "I;16"])
def test_images_of_any_mode_are_taken(codec, photo, mode):
    image = photo.convert("L").convert("I;16") if mode == "I;16" else photo.convert(mode)
    assert codec.decompress(codec.compress(image).data).size == photo.size


@pytest.mark.parametrize("region", [(0, 0, 150, 100), (10, 5, 40, 90), (100, 64, 101, 65), (33, 0, 150, 10)])
def test_a_region_is_that_part_of_the_whole(codec, data, region):
    part = codec.decompress(data, region)
    whole = codec.decompress(data).crop(region)
    assert part.size == whole.size
    assert np.abs(array(part) - array(whole)).max() <= 1
    with pytest.raises(ValueError, match="is not inside the image"):
        codec.decompress(data, (0, 0, 151, 10))


def test_the_first_part_of_a_file_is_a_preview(codec, photos):
    photo = photos[2].resize((300, 280))
    data = codec.compress(photo).data
    whole = array(codec.decompress(data))
    image, share = codec.preview(data[: len(data) * 2 // 3])
    assert 0.2 < share < 0.8
    assert (array(image)[:90] == whole[:90]).all()
    assert (array(image)[-1] == 128).all()
    assert codec.preview(data)[1] == 1


def test_seams_are_blended():
    """Each window decodes to its own brightness; across a seam the picture changes by small steps."""
    windows = []

    def decode(bits_BNL):
        windows.append(len(bits_BNL))
        level_B = torch.arange(len(bits_BNL)) * 0.1 + 0.01 * len(windows)
        return level_B.view(-1, 1, 1, 1).expand(-1, 3, 32, 32)

    pixels = join(torch.zeros(8, 12, 10, dtype=torch.bool), 4, 8, decode)
    assert pixels.shape == (3, 64, 96)
    assert windows == [6, 4, 3, 2]
    assert pixels[0].diff(dim=1).abs().max() < 0.09
    assert pixels.min() > 0


def test_tiles_keep_their_place(photo):
    pixels = torch.from_numpy(np.array(photo)).permute(2, 0, 1)
    tiles = cut(pixels, 32)
    assert tiles.shape == (4, 5, 3, 32, 32)
    assert torch.equal(tiles[1, 2], pixels[:, 32:64, 64:96])
    assert torch.equal(tiles[3, 0][:, -1], pixels[:, -1, :32]), "the edge is repeated"
    grid = as_grid(torch.arange(2 * 3 * 16).view(2, 3, 16, 1))
    assert grid[4, 1, 0] == 3 * 16 + 1


def test_other_models_and_versions_are_named(codec, raw_codec, data, photo, tmp_path):
    with pytest.raises(ValueError, match="was written with the prior"):
        raw_codec.decompress(data)
    with pytest.raises(ValueError, match="without a prior"):
        codec.decompress(raw_codec.compress(photo).data)
    other = Codec.from_pretrained(save_tokenizer(tmp_path / "other", 5))
    with pytest.raises(ValueError, match="was written with the tokenizer"):
        other.decompress(raw_codec.compress(photo).data)
    with pytest.raises(ValueError, match="of version 9"):
        codec.decompress(data[:4] + b"\x09" + data[5:])
    with pytest.raises(ValueError, match="not a .bsq file"):
        codec.decompress(b"\x89PNG")


def test_hostile_sizes_are_refused_at_once(codec, data):
    header = read_header(data)
    huge = Header(**{**header.__dict__, "width": 2**31, "height": 2**31, "group": 255})
    with pytest.raises(ValueError, match="claims 2147483648 x 2147483648 pixels"):
        read_container(data[:6] + (2**31).to_bytes(4, "little") * 2 + data[14:])
    assert huge.width * huge.height > 2**27
    wide = write_container(Header(**{**header.__dict__, "width": 32, "height": 32}), [b"x" * 8], [0])
    with pytest.raises(ValueError, match="index alone needs"):
        read_container(wide[:6] + (11000).to_bytes(4, "little") * 2 + wide[14:])


def mutated(data, rng):
    kind = rng.randrange(4)
    if kind == 0:
        return data[: rng.randrange(len(data))]
    if kind == 1:
        return bytes(rng.randrange(256) for _ in range(rng.randrange(120)))
    changed = bytearray(data)
    for _ in range(rng.randrange(1, 4)):
        changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
    if kind == 3:
        place = rng.randrange(len(changed))
        changed[place:place] = bytes(rng.randrange(256) for _ in range(rng.randrange(1, 9)))
    return bytes(changed)


def fuzz(codecs, streams, count):
    """Mutated files either fail with a sentence or decode to the picture of the file itself."""
    rng = random.Random(0)
    right = [codec.decompress(data).tobytes() for codec, data in zip(codecs, streams, strict=True)]
    refused = 0
    for _ in range(count):
        which = rng.randrange(len(streams))
        changed = mutated(streams[which], rng)
        try:
            image = codecs[which].decompress(changed)
        except ValueError:
            refused += 1
            continue
        assert changed == streams[which] or image.tobytes() == right[which], "a silent wrong picture"
    return refused


def test_damaged_files_are_refused_with_a_sentence(codec, raw_codec, photos):
    photo = photos[3].resize((40, 33))
    streams = [codec.compress(photo).data, raw_codec.compress(photo).data]
    assert fuzz([codec, raw_codec], streams, 1500) > 1400


@pytest.mark.slow
def test_a_hundred_thousand_damaged_files(codec, raw_codec, photos, request):
    photo = photos[3].resize((32, 32))
    streams = [codec.compress(photo).data, raw_codec.compress(photo).data]
    count = request.config.getoption("--fuzz")
    refused = fuzz([codec, raw_codec], streams, count)
    print(f"{count} mutated streams, {refused} refused")


def test_models_that_do_not_belong_together_are_refused(codec):
    with pytest.raises(ValueError, match="do not belong together"):
        Codec(codec.tokenizer, Prior(SECTION.model_copy(update={"grid": (1, 2, 2)})))
    fresh = Prior(SECTION)
    with pytest.raises(ValueError, match="read from a model folder"):
        Codec(codec.tokenizer, fresh)
    assert io.BytesIO(codec.compress(Image.new("RGB", (8, 8))).data).read(4) == b"BSQ1"
