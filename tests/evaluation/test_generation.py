"""Measuring drawn images: same numbers for any number of workers, a baseline beside, and files for people."""

import io
import json
import struct
import zlib
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from small_models import save_tokenizer

from bsq_ray import config, storage
from bsq_ray.data.manifest import read_manifest
from bsq_ray.data.pack import pack_images
from bsq_ray.data.token_table import TokenSource, read_table
from bsq_ray.data.tokenize import tokenize
from bsq_ray.evaluation.generation import evaluate_generation as generation
from bsq_ray.evaluation.generation import sample
from bsq_ray.evaluation.generation.evaluate_generation import evaluate_generation
from bsq_ray.evaluation.generation.features import Features, real_features
from bsq_ray.evaluation.generation.frequency_baseline import frequency_bits
from bsq_ray.evaluation.generation.sample import Request, draw
from bsq_ray.evaluation.plots.class_grid import ClassSheet
from bsq_ray.evaluation.provenance import contract
from bsq_ray.models.masked_lm import MaskedLM
from bsq_ray.models.quantizers.bits import unpack_bits
from bsq_ray.samples.labeled_photos import read_qt_resources

SECTION = config.MaskedLMModel(grid=(1, 4, 4), bits=10, sub_bits=5, classes=2, width=32, layers=1, heads=2, dropout=0)


@pytest.fixture(scope="module")
def setting(photos, tmp_path_factory):
    """Model folder, shards of two classes, and their tokens."""
    folder = tmp_path_factory.mktemp("generation")
    for number, photo in enumerate(photos):
        place = folder / "images" / ("dark" if np.asarray(photo).mean() < 110 else "light")
        place.mkdir(parents=True, exist_ok=True)
        photo.resize((80, 80)).save(place / f"{number}.png")
    shards = str(folder / "shards")
    pack_images(str(folder / "images"), shards, num_workers=0)
    tokenizer = save_tokenizer(folder / "tokenizer", 0)
    tokens = str(folder / "tokens")
    tokenize(tokenizer, shards, tokens, num_workers=0, num_crops=3)
    torch.manual_seed(0)
    model = str(folder / "model")
    MaskedLM(SECTION).save_pretrained(model)
    save_tokenizer(folder / "model" / "tokenizer", 0)
    return model, shards, tokens


@pytest.fixture(autouse=True, scope="module")
def cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        from bsq_ray.evaluation.generation import features

        folder = tmp_path_factory.mktemp("cache")
        patch.setattr(features, "cache_folder", lambda kind: folder / kind)
        yield folder


def evaluate(setting, out, workers=0, **options):
    model, shards, tokens = setting
    return evaluate_generation(
        model, shards, str(out), workers, count=40, sampling={"steps": 2}, baseline_url=tokens, **options
    )


@pytest.fixture(scope="module")
def results(setting, tmp_path_factory):
    out = tmp_path_factory.mktemp("results")
    return evaluate(setting, out, known_url=setting[1]), out


def test_results_are_written_with_a_baseline_and_a_contract(results, cache):
    found, out = results
    assert json.loads((out / "results.json").read_text()) == json.loads(json.dumps(found))
    assert found["rows"].keys() == {"model", "per-position frequencies"}
    row = found["rows"]["model"]
    names = {"fid", "kid", "inception_score", "precision", "recall", "class_accuracy", "class_coverage"}
    assert row.keys() == names
    assert 1 <= row["inception_score"] < found["real images"]["inception_score"]
    assert found["drawn"] == 40
    assert found["sampling"]["steps"] == 2
    assert found["contract"]["weights"].keys() == {"fid-inception", "imagenet-classifier"}
    assert "| per-position frequencies |" in (out / "results.md").read_text()
    assert Image.open(out / "samples.png").height == 2 * 100 + 4
    [kept] = (cache / "features").glob("features-*.npz")
    assert found["contract"]["data_hash"][:16] in kept.name
    for network in found["contract"]["weights"].values():
        assert network["sha256"][:12] in kept.name


def test_reference_features_are_read_from_the_cache(setting, results, monkeypatch):
    from bsq_ray.evaluation.generation import features

    monkeypatch.setattr(features, "map_in_pool", lambda *arguments: pytest.fail("the real images are measured again"))
    run = config.load_config(f"{setting[0]}/tokenizer/config.yaml")
    manifest = read_manifest(setting[1])
    found = features.real_features(manifest, run, 0)
    assert found.features_ND.shape == (manifest.num_samples, 2048)
    assert found.seen_NC.shape == (manifest.num_samples, 1280)
    assert sorted(found.keys) == sorted(key for shard in manifest.shards for key in shard.keys)


def test_few_drawn_images_are_warned_of_however_many_real_ones_there_are(setting):
    manifest = read_manifest(setting[1])
    terms = contract(manifest, 50_000, 64, "lanczos", ["fid-inception"], drawn=100)
    assert terms["warning"].startswith("FID of 100 images is biased")
    assert "warning" not in contract(manifest, 50_000, 64, "lanczos", ["fid-inception"])


def test_real_images_that_cannot_be_read_are_neither_left_out_nor_kept_in_the_cache(setting, cache, tmp_path):
    run = config.load_config(f"{setting[0]}/tokenizer/config.yaml")
    storage.copy_folder(setting[1], str(tmp_path / "shards"))
    [shard] = (tmp_path / "shards").glob("*.tar")
    shard.write_bytes(shard.read_bytes()[:-20_000])
    manifest = read_manifest(str(tmp_path / "shards"))
    # Another hash than that of the whole data set, whose features are in the cache.
    damaged = replace(manifest, shards=(replace(manifest.shards[0], sha256="0" * 64),))
    kept = set(cache.rglob("*.npz"))
    with pytest.raises(RuntimeError, match=r"shards has an image that cannot be read: shard-000000\.tar: .*shard ends"):
        real_features(damaged, run, 0)
    assert set(cache.rglob("*.npz")) == kept


def test_a_class_is_told_and_covered_by_its_nearest_known_images():
    rng = np.random.default_rng(0)
    known = Features(rng.normal(size=(40, 8)), np.repeat(np.eye(4), 10, 0), np.repeat(np.arange(4), 10), ["a"] * 40)
    # Of classes 0, 1 and 2; those of 2 all look like 0.
    seen = np.concatenate([np.eye(4)[[0] * 5], np.eye(4)[[1] * 5], np.eye(4)[[0] * 5]])
    drawn = Features(rng.normal(size=(15, 8)), seen, np.repeat([0, 1, 2], 5), [f"{n}" for n in range(15)])
    figures = generation._compare(drawn, known, known, SimpleNamespace(logits=lambda seen_NC: seen_NC))
    assert figures["class_accuracy"] == pytest.approx(2 / 3)
    assert figures["class_coverage"] == pytest.approx(2 / 3)


def test_a_baseline_of_another_tokenizer_is_refused(setting, tmp_path):
    model, shards, tokens = setting
    other = SECTION.model_copy(update={"tokenizer": "0" * 64})
    MaskedLM(other).save_pretrained(str(tmp_path / "model"))
    storage.copy_folder(f"{model}/tokenizer", str(tmp_path / "model" / "tokenizer"))
    with pytest.raises(ValueError, match="the model reads those of 000000000000"):
        evaluate_generation(str(tmp_path / "model"), shards, str(tmp_path), 0, baseline_url=tokens)


def test_two_ray_workers_measure_what_one_process_does(setting, results, tmp_path, ray_local):
    there = evaluate(setting, tmp_path, workers=2)
    for name, figures in results[0]["rows"].items():
        for key, value in figures.items():
            assert there["rows"][name][key] == pytest.approx(value, rel=1e-3, abs=1e-4), (name, key)


def test_what_cannot_be_measured_is_said(setting, photo_shards, tmp_path):
    with pytest.raises(ValueError, match="has 1 classes, the model 2"):
        evaluate_generation(setting[0], photo_shards, str(tmp_path), 0)
    with pytest.raises(ValueError, match="3 images are too few"):
        evaluate_generation(setting[0], setting[1], str(tmp_path), 0, count=3)
    with pytest.raises(ValueError, match="^sampling: steps: Input should be greater than or equal to 1, got 0$"):
        evaluate_generation(setting[0], setting[1], str(tmp_path), 0, sampling={"steps": 0})
    with pytest.raises(ValueError, match="is of the stage tokenizer"):
        evaluate_generation(f"{setting[0]}/tokenizer", setting[1], str(tmp_path), 0)


def test_frequencies_of_a_constant_table_are_cheap(setting):
    source = TokenSource(read_table(setting[2]), SECTION)
    itself = frequency_bits(source, source, 5)
    assert 0 < itself < 10


def test_tokens_by_frequency_are_those_of_their_class_and_place_from_a_table_that_is_read_once(setting, monkeypatch):
    source = TokenSource(read_table(setting[2]), SECTION)
    block = source.read_eval(range(source.num_samples))
    bits_PNL = unpack_bits(torch.from_numpy(block.values_P), 160).view(-1, 16, 10)
    rows, drawn = [], []
    read, decode = TokenSource.read, generation.Tokenizer.decode
    monkeypatch.setattr(TokenSource, "read", lambda s, p, *more: rows.extend(p) or read(s, p, *more))
    draw_images = generation._FrequencyDraw(source, 0)
    monkeypatch.setattr(generation.Tokenizer, "decode", lambda t, tokens: drawn.append(tokens) or decode(t, tokens))
    labels = [1, 0, 1, 1]
    draw_images(labels, 0)
    draw_images(labels, len(labels))
    assert rows == list(range(source.num_samples))
    # As small in memory as in the table: 160 bits of an image are 20 bytes.
    assert draw_images.packed_PB.nbytes == source.num_samples * 20
    for bits_NL, label in zip(drawn[0].bits_BNL, labels, strict=True):
        own_PNL = bits_PNL[torch.from_numpy(block.labels_P == label)]
        assert (own_PNL == bits_NL).all(-1).any(0).all()
        # No single image has all of them.
        assert not (own_PNL == bits_NL).all(-1).all(-1).any()


def test_drawing_keeps_small_copies_of_what_the_sheet_shows(setting, tmp_path, monkeypatch):
    monkeypatch.setattr(sample, "_COLUMNS", 2)
    written = []
    monkeypatch.setattr(
        sample.storage, "write_bytes", lambda url, data: written.append((url.rpartition("/")[2], len(kept(sheets))))
    )
    sheets = []

    def kept(sheets):
        return [tile for sheet in sheets for row in sheet._rows.values() for tile in row]

    class Watched(ClassSheet):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            sheets.append(self)

    monkeypatch.setattr(sample, "ClassSheet", Watched)
    draw(setting[0], str(tmp_path), Request([1], count=4, sampling={"steps": 1}))
    # Each file is written before the next image is kept, and only two are.
    assert written == [*((f"class-001-{n:04}.png", min(n, 2)) for n in range(4)), ("sheet.png", 2)]
    assert {tile.size for tile in kept(sheets)} == {(96, 96)}


def test_images_are_drawn_to_files(setting, tmp_path):
    count = draw(setting[0], str(tmp_path), Request([1, 0], count=3, sampling={"steps": 2}))
    assert count == 6
    assert sorted(p.name for p in tmp_path.glob("class-*.png"))[0] == "class-000-0003.png"
    assert Image.open(tmp_path / "sheet.png").height == 2 * 100 + 4
    whole = Image.open(tmp_path / "class-001-0000.png")
    hole = np.zeros((32, 32), np.uint8)
    hole[:8, :8] = 255
    Image.fromarray(hole).save(tmp_path / "hole.png")
    image, mask = str(tmp_path / "class-001-0000.png"), str(tmp_path / "hole.png")
    draw(setting[0], str(tmp_path / "filled"), Request([0], count=2, image=image, mask=mask))
    assert Image.open(tmp_path / "filled" / "class-000-0001.png").size == whole.size
    Image.new("L", (32, 40)).save(tmp_path / "tall.png")
    with pytest.raises(ValueError, match=r"tall.png has 32 x 40 pixels, .*0000.png has 32 x 32; give a mask of the"):
        draw(setting[0], str(tmp_path / "x"), Request([0], image=image, mask=str(tmp_path / "tall.png")))
    assert draw(setting[0], str(tmp_path / "way"), Request([0, 1], count=4, between=True)) == 4


def test_clips_are_drawn_to_animated_files(tmp_path):
    section = SECTION.model_copy(update={"grid": (3, 4, 4)})
    MaskedLM(section).save_pretrained(str(tmp_path / "model"))
    save_tokenizer(tmp_path / "model" / "tokenizer", 0, frames=3)
    model = str(tmp_path / "model")
    assert draw(model, str(tmp_path / "out"), Request([1], count=2, sampling={"steps": 2})) == 2
    file = Image.open(tmp_path / "out" / "class-001-0001.webp")
    assert (file.n_frames, file.size) == (3, (32, 32))
    assert Image.open(tmp_path / "out" / "sheet.png").height == 104
    with pytest.raises(ValueError, match="fill in images only"):
        draw(model, str(tmp_path / "x"), Request([1], image="a.png", mask="b.png"))
    with pytest.raises(ValueError, match="draws clips"):
        evaluate_generation(model, "x", str(tmp_path), 0)


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (Request([7]), "classes 0 to 1, not 7"),
        (Request([0], count=0), "count 0"),
        (Request([0], sampling={"steps": 0}), "steps: Input should be greater than or equal to 1, got 0"),
        (Request([0], image="x.png"), "needs both --image and --mask"),
        (Request([0], image="x.png", mask="y.png"), "cannot read x.png: it does not exist"),
        (Request([0], between=True), "two classes"),
    ],
)
def test_wrong_requests_are_named(setting, tmp_path, request_, message):
    with pytest.raises(ValueError, match=message):
        draw(setting[0], str(tmp_path), request_)


def test_qt_resource_files_are_read():
    names = b"".join(struct.pack(">HI", len(n), 0) + n.encode("utf-16-be") for n in ("a", "b.webp"))
    content = zlib.compress(b"photograph")
    contents = struct.pack(">I", len(content) + 4) + struct.pack(">I", 10) + content
    entries = struct.pack(">IHII", 0, 2, 1, 1) + struct.pack(">IHII", 0, 2, 1, 2)
    entries += struct.pack(">IHHHI", 8, 1, 0, 0, 0)
    header = 20
    data = struct.pack(">4s4I", b"qres", 1, header, header + len(entries), header + len(entries) + len(contents))
    assert read_qt_resources(data + entries + contents + names) == {"/a/b.webp": b"photograph"}
    with pytest.raises(ValueError, match="not a Qt resource file"):
        read_qt_resources(io.BytesIO(b"no").getvalue())
