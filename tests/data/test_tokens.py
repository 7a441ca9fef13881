"""Token tables: complete, equal to the tokenizer's output, resumable, and rejected by incompatible models."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from small_models import retrain_decoder, save_tokenizer

from bsq_ray import Tokenizer, config, storage
from bsq_ray.data import image_source, token_table
from bsq_ray.data.factory import build_pixel_source, build_source, resolve_tokenizer
from bsq_ray.data.image_source import ImageSource
from bsq_ray.data.manifest import read_manifest
from bsq_ray.data.stream import training_batches
from bsq_ray.data.token_table import TokenSource, completed_part, read_table, write_part
from bsq_ray.data.tokenize import tokenize
from bsq_ray.data.transforms import to_float
from bsq_ray.models.quantizers.bits import unpack_bits
from bsq_ray.models.tokenizer import Tokens
from bsq_ray.training.stages import build_stage

MODEL = config.MaskedLMModelConfig(grid=(1, 4, 4), bits=10, sub_bits=5, num_classes=1, width=32, layers=1, heads=2)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_tokenizer(tmp_path_factory.mktemp("tokenizer"), 0)


@pytest.fixture(scope="module")
def table(model, photo_shards, tmp_path_factory):
    url = str(tmp_path_factory.mktemp("tokens"))
    return tokenize(model, photo_shards, url, num_workers=0, num_crops=2, flip=True, batch_size=5).table


def test_tokenize_writes_each_crop_of_each_image_once(table, photo_shards):
    """A table contains every crop of every image exactly once."""
    manifest = read_manifest(photo_shards)
    rows = [row for name, _, _ in table.parts for row in pq.read_table(Path(table.url) / name).to_pylist()]
    keys = [key for shard in manifest.shards for key in shard.keys]
    assert sorted((row["key"], row["view"]) for row in rows) == sorted((key, view) for key in keys for view in (0, 1))
    assert table.num_rows == 2 * manifest.num_samples
    assert all(row["shape"] == [1, 4, 4] and len(row["bits"]) == 20 for row in rows)
    metadata = pq.read_schema(Path(table.url) / table.parts[0][0]).metadata
    assert metadata[b"tokenizer_id"].decode() == table.info.tokenizer_id


def test_tokenize_first_crop_encodes_the_center(table, model, photo_shards):
    """The first row of an image contains the tokens of its center crop."""
    source = TokenSource(table, MODEL)
    tokenizer = Tokenizer.from_pretrained(model)
    manifest = read_manifest(photo_shards)
    count = len(manifest.shards[0].keys)
    photos = ImageSource(manifest, config.DataConfig(), 32).read_eval(range(count))
    expected = tokenizer.encode(to_float(torch.from_numpy(photos.values_P))).bits_BNL
    rows = source.read_eval(range(count))
    bits_BNL = unpack_bits(torch.from_numpy(rows.values_P), 160).unflatten(1, (16, 10))
    assert rows.keys == photos.keys
    assert torch.equal(bits_BNL, expected)
    again = Tokenizer.from_pretrained(source.tokenizer_url)
    assert again.decode(Tokens(bits_BNL, (1, 4, 4))).shape == (count, 3, 32, 32)


def test_tokenize_other_crops_depend_on_the_seed(table, model, photo_shards, tmp_path):
    """All rows after the first are random crops that depend on the seed."""
    again = tokenize(model, photo_shards, str(tmp_path), num_workers=0, num_crops=2, flip=True, seed=1).table
    ours, theirs = (TokenSource(one, MODEL).read_eval(range(one.num_rows)).values_P for one in (table, again))
    count = len(read_manifest(photo_shards).shards[0].keys)
    assert np.array_equal(ours[:count], theirs[:count])
    assert not np.array_equal(ours[count : 2 * count], theirs[count : 2 * count])
    assert not np.array_equal(ours[:count], ours[count : 2 * count])


def test_tokenize_with_ray_is_identical_and_resumes(table, model, photo_shards, tmp_path, ray_local):
    """Ray workers write the same table, and a second call writes only the missing parts."""
    arguments = (model, photo_shards, str(tmp_path))
    settings = {"num_crops": 2, "flip": True, "batch_size": 5}
    done = tokenize(*arguments, num_workers=2, **settings)
    assert (done.num_written, done.table.num_rows) == (len(table.parts), table.num_rows)
    theirs = TokenSource(done.table, MODEL).read_eval(range(table.num_rows))
    ours = TokenSource(table, MODEL).read_eval(range(table.num_rows))
    assert theirs.keys == ours.keys
    assert np.array_equal(theirs.values_P, ours.values_P)
    (tmp_path / "tokens.json").unlink()
    (tmp_path / "part-000001.parquet").unlink()
    with pytest.raises(ValueError, match="is not a complete token table"):
        read_table(str(tmp_path))
    progress_calls = []
    again = tokenize(*arguments, num_workers=0, **settings, on_progress=lambda *done: progress_calls.append(done))
    assert again.num_written == 1
    assert progress_calls == [(len(table.parts), len(table.parts))]
    assert again.table == done.table
    # Another number of crops is another table, so every part is rewritten.
    assert tokenize(*arguments, num_workers=0, num_crops=1).num_written == len(table.parts)


def test_tokenize_decodes_each_image_once(model, held_out_shards, tmp_path, monkeypatch):
    """However many crops an image has, it is decoded once."""
    decoded, decode = [], image_source.decode_blob

    def record(blob, size, short_side):
        decoded.append(size)
        return decode(blob, size, short_side)

    monkeypatch.setattr(image_source, "decode_blob", record)
    tokenize(model, held_out_shards, str(tmp_path), num_workers=0, num_crops=4)
    assert len(decoded) == read_manifest(held_out_shards).num_samples


def test_tokenize_resume_reads_footers_only(model, photo_shards, bucket, monkeypatch):
    """A table with nothing left to do is checked with one small request for each part."""
    table = tokenize(model, photo_shards, bucket, num_workers=0).table
    whole_reads, tails = [], []
    read_bytes, read_tail = storage.read_bytes, token_table.read_tail
    monkeypatch.setattr(storage, "read_bytes", lambda url: whole_reads.append(url) or read_bytes(url))
    monkeypatch.setattr(token_table, "read_tail", lambda url, size: tails.append(size) or read_tail(url, size))
    again = tokenize(model, photo_shards, bucket, num_workers=0)
    assert (again.num_written, again.table) == (0, table)
    assert tails == [2**16] * len(table.parts)
    assert not [url for url in whole_reads if url.endswith(".parquet") and "/part-" in url]


def test_token_source_epoch_has_each_row_once(table):
    """Every row is read exactly once per epoch, in shuffled order."""
    source = TokenSource(table, MODEL)
    stream = training_batches(
        source, config.DataOrderConfig(interleave=2, shuffle_block_size=8), batch_size=2, rank=0, world_size=1, seed=1
    )
    batches = [next(stream) for _ in range(table.num_rows // 2)]
    read = [(key, row.tobytes()) for b in batches for key, row in zip(b.keys, b.values_B.numpy(), strict=True)]
    block = source.read_eval(range(source.num_samples))
    assert sorted(read) == sorted(zip(block.keys, map(np.ndarray.tobytes, block.values_P), strict=True))
    assert [key for key, _ in read] != block.keys


def test_mixture_of_token_tables_belongs_to_one_tokenizer(table, model, held_out_shards, tmp_path):
    """Several tables of one tokenizer train one model; the run takes the tokenizer from them."""
    other = tokenize(model, held_out_shards, str(tmp_path / "other"), num_workers=0).table
    url = str(tmp_path / "tables.yaml")
    storage.write_text(url, f"datasets: [{{url: {table.url}, weight: 1}}, {{url: {other.url}, weight: 1}}]\n")
    run = resolve_tokenizer(config.MaskedLMConfig(name="mixture", model=MODEL), url)
    source = build_source(run, url)
    assert source.num_samples == table.num_rows + other.num_rows
    assert build_stage(run, source, torch.device("cpu")).tokenizer_url == f"{table.url}/tokenizer"
    keys = [key for shard in read_manifest(held_out_shards).shards for key in shard.keys]
    batch = next(training_batches(source, config.DataOrderConfig(), batch_size=64, rank=0, world_size=1, seed=0))
    assert 0.2 < np.isin(batch.keys, keys).mean() < 0.8


def test_token_table_continues_with_new_decoder_of_its_tokens(table, model, photo_shards, tmp_path):
    """A tokenizer with the same tokens resumes a table, which keeps the first tokenizer; other tokens are rejected."""
    url = shutil.copytree(table.url, tmp_path / "tokens")
    (url / "tokens.json").unlink()
    (url / table.parts[0][0]).unlink()
    retrained = retrain_decoder(model, tmp_path / "retrained")
    resumed = tokenize(retrained, photo_shards, str(url), num_workers=0, num_crops=2, flip=True, batch_size=5)
    assert resumed.num_written == 1
    assert (resumed.table.info, resumed.table.parts) == (table.info, table.parts)
    other = save_tokenizer(tmp_path / "other", 1)
    with pytest.raises(ValueError, match="has tokens of another tokenizer"):
        tokenize(other, photo_shards, str(url), num_workers=0, num_crops=2, flip=True)


@pytest.mark.parametrize("has_tokens_id", [True, False])
def test_token_source_checks_tokens_id_or_tokenizer_id(table, has_tokens_id):
    """Tables and models that have tokens ids are compared by them, others by the id of the whole tokenizer."""
    info = table.info
    ids = {"tokenizer": info.tokenizer_id, "tokens_id": info.tokens_id if has_tokens_id else None}
    model_config, other = MODEL.model_copy(update=ids), "0" * 64

    def open_table(**ids):
        return TokenSource(replace(table, info=replace(info, **ids)), model_config)

    def assert_rejected(**ids):
        with pytest.raises(ValueError, match="were written by tokenizer"):
            open_table(**ids)

    open_table()
    open_table(tokens_id=None)
    (open_table if has_tokens_id else assert_rejected)(tokenizer_id=other)
    (assert_rejected if has_tokens_id else open_table)(tokens_id=other)
    assert_rejected(tokenizer_id=other, tokens_id=None)


def test_resolve_tokenizer_stores_both_ids(table):
    run = resolve_tokenizer(config.MaskedLMConfig(name="m", model=MODEL), table.url)
    assert (run.model.tokenizer, run.model.tokens_id) == (table.info.tokenizer_id, table.info.tokens_id)
    assert len(table.info.tokens_id) == 64


def test_parts_without_tokens_id_are_kept(table):
    """A table that an earlier version began is continued: its parts have no tokens id."""
    url = f"{table.url}/{table.parts[0][0]}"
    current = replace(table.info, tokens_id="f" * 64)
    assert completed_part(url, current) is None
    rows = TokenSource(table, MODEL).read_eval(range(2))
    old = replace(table.info, tokens_id=None)
    write_part(f"{table.url}/old.parquet", old, rows.keys, rows.labels_P, np.zeros(2, np.int16), rows.values_P)
    assert completed_part(f"{table.url}/old.parquet", current)[0] == 2
    assert completed_part(f"{table.url}/old.parquet", replace(current, bits=9)) is None


@pytest.fixture(scope="module")
def clip_model(tmp_path_factory):
    """A tokenizer for clips of 4 frames; each video has two clips with a frame stride of 2."""
    url = save_tokenizer(tmp_path_factory.mktemp("clip_tokenizer"), 0, frames=4)
    run = config.load_config(f"{url}/config.yaml", ["data.frame_stride=2", "data.clips_per_video=2"])
    Tokenizer.from_pretrained(url).save_pretrained(url, run)
    return url


def test_tokenize_clips_keeps_time_order(clip_model, held_out_video_shards, tmp_path):
    """Each clip becomes a row of tokens in time order."""
    manifest = read_manifest(held_out_video_shards)
    table = tokenize(
        clip_model, held_out_video_shards, str(tmp_path / "a"), num_workers=0, num_crops=2, batch_size=3
    ).table
    assert table.info.grid == (4, 4, 4)
    assert table.num_rows == 2 * 2 * manifest.num_samples
    model_config = MODEL.model_copy(update={"grid": (4, 4, 4)})
    rows = TokenSource(table, model_config).read_eval(range(table.parts[0][1]))
    run = config.load_config(f"{clip_model}/config.yaml")
    clips = build_pixel_source(run, manifest).read_eval(range(2 * len(manifest.shards[0].keys)))
    tokens = Tokenizer.from_pretrained(clip_model).encode(to_float(torch.from_numpy(clips.values_P)))
    count = len(clips.keys)
    assert rows.keys[:count] == clips.keys
    bits_BNL = unpack_bits(torch.from_numpy(rows.values_P[:count]), 640).unflatten(1, (64, 10))
    assert torch.equal(bits_BNL, tokens.bits_BNL)
    assert not np.array_equal(rows.values_P[count : 2 * count], rows.values_P[:count]), (
        "the second view is another clip"
    )
    # The frame stride is part of the table's identity, so another stride rewrites every part.
    other = config.load_config(f"{clip_model}/config.yaml", ["data.frame_stride=1"])
    Tokenizer.from_pretrained(clip_model).save_pretrained(str(tmp_path / "other"), other)
    again = tokenize(str(tmp_path / "other"), held_out_video_shards, str(tmp_path / "a"), num_workers=0, num_crops=2)
    assert again.num_written == len(table.parts)


def test_tokenize_images_with_video_tokenizer(clip_model, held_out_shards, tmp_path):
    """A video tokenizer encodes an image as a clip with one frame."""
    table = tokenize(clip_model, held_out_shards, str(tmp_path), num_workers=0).table
    assert table.info.grid == (1, 4, 4)


def test_tokenize_videos_with_image_tokenizer_raises(model, held_out_video_shards, tmp_path):
    """An image tokenizer rejects packed videos."""
    with pytest.raises(ValueError, match="contains videos, but .* takes images"):
        tokenize(model, held_out_video_shards, str(tmp_path), num_workers=0)


def test_tokenize_damaged_image_is_skipped(model, photo_folders, tmp_path):
    """Damaged images are skipped and reported by key."""
    from bsq_ray.data.pack import PackOptions, pack_images

    manifest = pack_images(
        str(photo_folders[1]), str(tmp_path / "set"), PackOptions(max_side=64, num_workers=0)
    ).manifest
    shard = manifest.shards[0]
    path = tmp_path / "set" / shard.name
    content = bytearray(path.read_bytes())
    content[shard.entry(2).offset : shard.entry(2).offset + shard.entry(2).size] = bytes(shard.entry(2).size)
    path.write_bytes(content)
    done = tokenize(model, str(tmp_path / "set"), str(tmp_path / "tokens"), num_workers=0, num_crops=2)
    assert done.table.num_rows == 2 * (manifest.num_samples - 1)
    [line] = done.skipped
    assert shard.keys[2] in line


def test_token_table_mismatch_raises(table, model, photo_shards, tmp_path):
    """A table that does not match the model, and a damaged table, raise an error."""
    with pytest.raises(ValueError, match=r"set model.bits=10 model.grid=\[1, 4, 4\] model.num_classes=1"):
        TokenSource(table, config.MaskedLMModelConfig())
    foreign = MODEL.model_copy(update={"tokenizer": "f" * 64})
    with pytest.raises(ValueError, match="the model requires tokenizer ffffffffffff; use a table of that tokenizer"):
        TokenSource(table, foreign)
    other = save_tokenizer(tmp_path / "other", 1)
    with pytest.raises(ValueError, match="has tokens of another tokenizer"):
        tokenize(other, photo_shards, table.url, num_workers=0)
    with pytest.raises(ValueError, match="num_crops 0"):
        tokenize(model, photo_shards, str(tmp_path / "x"), num_workers=0, num_crops=0)
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
