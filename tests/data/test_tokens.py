"""Token tables: what the tokenizer says, exactly once, resumable, and refused by models that do not fit."""

import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from small_models import save_tokenizer

from bsq_ray import Tokenizer, config
from bsq_ray.data.factory import open_pixels
from bsq_ray.data.image_source import PhotoSource
from bsq_ray.data.manifest import read_manifest
from bsq_ray.data.stream import training_batches
from bsq_ray.data.token_table import TokenSource, read_table
from bsq_ray.data.tokenize import tokenize
from bsq_ray.data.transforms import to_float
from bsq_ray.models.quantizers.bits import unpack_bits
from bsq_ray.models.tokenizer import Tokens

MODEL = config.MaskedLMModel(grid=(1, 4, 4), bits=10, sub_bits=5, classes=1, width=32, layers=1, heads=2)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_tokenizer(tmp_path_factory.mktemp("tokenizer"), 0)


@pytest.fixture(scope="module")
def table(model, photo_shards, tmp_path_factory):
    url = str(tmp_path_factory.mktemp("tokens"))
    return tokenize(model, photo_shards, url, workers=0, views=2, flip=True, batch_size=5).table


def test_a_table_has_every_view_of_every_image_once(table, photo_shards):
    manifest = read_manifest(photo_shards)
    rows = [row for name, _, _ in table.parts for row in pq.read_table(Path(table.url) / name).to_pylist()]
    keys = [key for shard in manifest.shards for key in shard.keys]
    assert sorted((row["key"], row["view"]) for row in rows) == sorted((key, view) for key in keys for view in (0, 1))
    assert table.rows == 2 * manifest.samples
    assert all(row["shape"] == [1, 4, 4] and len(row["bits"]) == 20 for row in rows)
    metadata = pq.read_schema(Path(table.url) / table.parts[0][0]).metadata
    assert metadata[b"tokenizer_id"].decode() == table.facts.tokenizer_id


def test_the_first_view_is_what_the_tokenizer_says_of_the_centre(table, model, photo_shards):
    source = TokenSource(table, MODEL)
    tokenizer = Tokenizer.from_pretrained(model)
    manifest = read_manifest(photo_shards)
    count = len(manifest.shards[0].keys)
    photos = PhotoSource(manifest, config.Data(), 32).read_held_out(range(count))
    expected = tokenizer.encode(to_float(torch.from_numpy(photos.values_P))).bits_BNL
    rows = source.read_held_out(range(count))
    bits_BNL = unpack_bits(torch.from_numpy(rows.values_P), 160).unflatten(1, (16, 10))
    assert rows.keys == photos.keys
    assert torch.equal(bits_BNL, expected)
    again = Tokenizer.from_pretrained(source.tokenizer_url)
    assert again.decode(Tokens(bits_BNL, (1, 4, 4))).shape == (count, 3, 32, 32)


def test_further_views_are_crops_that_depend_on_the_seed(table, model, photo_shards, tmp_path):
    again = tokenize(model, photo_shards, str(tmp_path), workers=0, views=2, flip=True, seed=1).table
    ours, theirs = (TokenSource(one, MODEL).read_held_out(range(one.rows)).values_P for one in (table, again))
    count = len(read_manifest(photo_shards).shards[0].keys)
    assert np.array_equal(ours[:count], theirs[:count])
    assert not np.array_equal(ours[count : 2 * count], theirs[count : 2 * count])
    assert not np.array_equal(ours[:count], ours[count : 2 * count])


def test_workers_on_ray_make_the_same_table_and_go_on_with_what_is_there(
    table, model, photo_shards, tmp_path, ray_local
):
    arguments = (model, photo_shards, str(tmp_path))
    settings = {"views": 2, "flip": True, "batch_size": 5}
    done = tokenize(*arguments, workers=2, **settings)
    assert (done.made, done.table.rows) == (len(table.parts), table.rows)
    theirs = TokenSource(done.table, MODEL).read_held_out(range(table.rows))
    ours = TokenSource(table, MODEL).read_held_out(range(table.rows))
    assert theirs.keys == ours.keys
    assert np.array_equal(theirs.values_P, ours.values_P)
    (tmp_path / "tokens.json").unlink()
    (tmp_path / "part-000001.parquet").unlink()
    with pytest.raises(ValueError, match="is not a whole token table"):
        read_table(str(tmp_path))
    seen = []
    again = tokenize(*arguments, workers=0, **settings, progress=lambda *done: seen.append(done))
    assert again.made == 1
    assert seen == [(len(table.parts), len(table.parts))]
    assert again.table == done.table
    # Other views are another table, so nothing of the old one is kept.
    assert tokenize(*arguments, workers=0, views=1).made == len(table.parts)


def test_every_row_is_read_once_an_epoch(table):
    source = TokenSource(table, MODEL)
    stream = training_batches(source, config.Reading(lanes=2, shuffle_window=8), 2, 0, 1, seed=1)
    batches = [next(stream) for _ in range(table.rows // 2)]
    read = [(key, row.tobytes()) for b in batches for key, row in zip(b.keys, b.values_B.numpy(), strict=True)]
    block = source.read_held_out(range(source.samples))
    assert sorted(read) == sorted(zip(block.keys, map(np.ndarray.tobytes, block.values_P), strict=True))
    assert [key for key, _ in read] != block.keys


@pytest.fixture(scope="module")
def clip_model(tmp_path_factory):
    """A tokenizer of clips of 4 frames; a video gives two of them, every second frame taken."""
    url = save_tokenizer(tmp_path_factory.mktemp("clip_tokenizer"), 0, frames=4)
    run = config.load_config(f"{url}/config.yaml", ["data.frame_stride=2", "data.clips_per_video=2"])
    Tokenizer.from_pretrained(url).save_pretrained(url, run)
    return url


def test_clips_become_rows_of_tokens_in_time_order(clip_model, held_out_video_shards, tmp_path):
    manifest = read_manifest(held_out_video_shards)
    table = tokenize(clip_model, held_out_video_shards, str(tmp_path / "a"), workers=0, views=2, batch_size=3).table
    assert table.facts.grid == (4, 4, 4)
    assert table.rows == 2 * 2 * manifest.samples
    section = MODEL.model_copy(update={"grid": (4, 4, 4)})
    rows = TokenSource(table, section).read_held_out(range(table.parts[0][1]))
    run = config.load_config(f"{clip_model}/config.yaml")
    clips = open_pixels(run, manifest).read_held_out(range(2 * len(manifest.shards[0].keys)))
    tokens = Tokenizer.from_pretrained(clip_model).encode(to_float(torch.from_numpy(clips.values_P)))
    count = len(clips.keys)
    assert rows.keys[:count] == clips.keys
    bits_BNL = unpack_bits(torch.from_numpy(rows.values_P[:count]), 640).unflatten(1, (64, 10))
    assert torch.equal(bits_BNL, tokens.bits_BNL)
    assert not np.array_equal(rows.values_P[count : 2 * count], rows.values_P[:count]), (
        "the second view is another clip"
    )
    # What the clips are made of is part of the table: with another stride nothing of it is kept.
    other = config.load_config(f"{clip_model}/config.yaml", ["data.frame_stride=1"])
    Tokenizer.from_pretrained(clip_model).save_pretrained(str(tmp_path / "other"), other)
    again = tokenize(str(tmp_path / "other"), held_out_video_shards, str(tmp_path / "a"), workers=0, views=2)
    assert again.made == len(table.parts)


def test_a_tokenizer_of_clips_takes_images_as_clips_of_one_frame(clip_model, held_out_shards, tmp_path):
    table = tokenize(clip_model, held_out_shards, str(tmp_path), workers=0).table
    assert table.facts.grid == (1, 4, 4)


def test_videos_need_a_tokenizer_of_clips(model, held_out_video_shards, tmp_path):
    with pytest.raises(ValueError, match="holds videos, but .* takes images"):
        tokenize(model, held_out_video_shards, str(tmp_path), workers=0)


def test_damaged_images_are_left_out_and_named(model, photo_folders, tmp_path):
    from bsq_ray.data.pack import pack_images

    manifest = pack_images(str(photo_folders[1]), str(tmp_path / "set"), max_side=64, workers=0).manifest
    shard = manifest.shards[0]
    path = tmp_path / "set" / shard.name
    content = bytearray(path.read_bytes())
    content[shard.offsets[2] : shard.offsets[2] + shard.sizes[2]] = bytes(shard.sizes[2])
    path.write_bytes(content)
    done = tokenize(model, str(tmp_path / "set"), str(tmp_path / "tokens"), workers=0, views=2)
    assert done.table.rows == 2 * (manifest.samples - 1)
    [line] = done.damaged
    assert shard.keys[2] in line


def test_what_does_not_fit_is_refused(table, model, photo_shards, tmp_path):
    with pytest.raises(ValueError, match=r"give model.bits=10 model.grid=\[1, 4, 4\] model.classes=1"):
        TokenSource(table, config.MaskedLMModel())
    foreign = MODEL.model_copy(update={"tokenizer": "f" * 64})
    with pytest.raises(ValueError, match="the model reads those of ffffffffffff: the same bits mean something else"):
        TokenSource(table, foreign)
    other = save_tokenizer(tmp_path / "other", 1)
    with pytest.raises(ValueError, match="holds tokens of another tokenizer"):
        tokenize(other, photo_shards, table.url, workers=0)
    with pytest.raises(ValueError, match="views 0"):
        tokenize(model, photo_shards, str(tmp_path / "x"), workers=0, views=0)
    record = json.loads((Path(table.url) / "tokens.json").read_text())
    (tmp_path / "tokens.json").write_text(json.dumps(record | {"version": 9}))
    with pytest.raises(ValueError, match="newer version"):
        read_table(str(tmp_path))
    (tmp_path / "tokens.json").write_text('{"version": 9}')
    with pytest.raises(ValueError, match="newer version"):
        read_table(str(tmp_path))
    for text in ("{", "[]", '"text"', '{"version": 1}', '{"version": 1, "parts": [[1]]}'):
        (tmp_path / "tokens.json").write_text(text)
        with pytest.raises(ValueError, match=r"tokens.json is damaged"):
            read_table(str(tmp_path))
