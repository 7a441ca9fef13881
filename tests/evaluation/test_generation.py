"""Evaluation of generated images with any number of workers, its baseline, and generated files."""

import io
import json
import struct
import zlib
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from small_models import save_tokenizer

from bsq_ray import config, storage
from bsq_ray.data.manifest import read_manifest
from bsq_ray.data.pack import PackOptions, pack_images
from bsq_ray.data.token_table import TokenSource, read_table
from bsq_ray.data.tokenize import tokenize
from bsq_ray.evaluation.generation import evaluate_generation as generation
from bsq_ray.evaluation.generation import sample
from bsq_ray.evaluation.generation.evaluate_generation import evaluate_generation, proportional_labels
from bsq_ray.evaluation.generation.features import Features, Workers, real_features
from bsq_ray.evaluation.generation.frequency_baseline import histogram_cross_entropy
from bsq_ray.evaluation.generation.sample import GenerateRequest, generate_files
from bsq_ray.evaluation.plots.class_grid import ClassSheet
from bsq_ray.evaluation.provenance import collect_provenance
from bsq_ray.metrics.fid import sampling_ranks
from bsq_ray.models.masked_lm import MaskedLM
from bsq_ray.models.quantizers.bits import unpack_bits
from bsq_ray.samples.labeled_photos import read_qt_resources

MODEL_CONFIG = config.MaskedLMModelConfig(
    grid=(1, 4, 4), bits=10, sub_bits=5, num_classes=2, width=32, layers=1, heads=2, dropout=0
)


@pytest.fixture(scope="module")
def generation_setup(photos, tmp_path_factory):
    """Model folder, shards of two classes, and their tokens."""
    folder = tmp_path_factory.mktemp("generation")
    for number, photo in enumerate(photos):
        folder_of_class = folder / "images" / ("dark" if np.asarray(photo).mean() < 110 else "light")
        folder_of_class.mkdir(parents=True, exist_ok=True)
        photo.resize((80, 80)).save(folder_of_class / f"{number}.png")
    shards = str(folder / "shards")
    pack_images(str(folder / "images"), shards, PackOptions(num_workers=0))
    tokenizer = save_tokenizer(folder / "tokenizer", 0)
    tokens = str(folder / "tokens")
    tokenize(tokenizer, shards, tokens, num_workers=0, num_crops=3)
    torch.manual_seed(0)
    model = str(folder / "model")
    MaskedLM(MODEL_CONFIG).save_pretrained(model)
    save_tokenizer(folder / "model" / "tokenizer", 0)
    return model, shards, tokens


@pytest.fixture(autouse=True, scope="module")
def cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        from bsq_ray.evaluation.generation import features

        folder = tmp_path_factory.mktemp("cache")
        patch.setattr(features, "cache_folder", lambda kind: folder / kind)
        yield folder


def evaluate(generation_setup, out, workers=0, **options):
    model, shards, tokens = generation_setup
    return evaluate_generation(
        model, shards, str(out), workers=workers, count=40, sampling={"steps": 2}, baseline_url=tokens, **options
    )


@pytest.fixture(scope="module")
def results(generation_setup, tmp_path_factory):
    out = tmp_path_factory.mktemp("results")
    return evaluate(generation_setup, out, reference_url=generation_setup[1]), out


@given(st.lists(st.integers(0, 40), min_size=1, max_size=8).filter(any), st.integers(1, 200))
def test_proportional_labels_follow_the_class_counts(counts, total):
    """Every class has its proportion of the images, rounded, and equal totals give the counts themselves."""
    labels = proportional_labels(np.array(counts), total)
    numbers = np.bincount(labels, minlength=len(counts))
    assert len(labels) == total
    assert (np.abs(numbers - np.array(counts) * total / sum(counts)) < 1).all()
    assert not numbers[np.array(counts) == 0].any()
    assert np.bincount(proportional_labels(np.array(counts), sum(counts)), minlength=len(counts)).tolist() == counts


def test_proportional_labels_are_spread_over_the_batches():
    labels = np.array(proportional_labels(np.array([20, 2, 10]), 64))
    assert [np.bincount(part, minlength=3).tolist() for part in np.split(labels, 2)] == [[20, 2, 10], [20, 2, 10]]


def test_results_contain_baseline_and_provenance(results, cache):
    evaluation, out = results
    assert json.loads((out / "results.json").read_text()) == json.loads(json.dumps(evaluation))
    assert evaluation["rows"].keys() == {"model", "per-position frequencies"}
    row = evaluation["rows"]["model"]
    names = {"fid", "kid", "inception_score", "precision", "recall", "class_accuracy", "class_coverage"}
    assert row.keys() == names
    assert 1 <= row["inception_score"] < evaluation["real_images"]["inception_score"]
    assert evaluation["num_generated"] == 40
    assert "classes in the proportions of the real images" in (out / "results.md").read_text()
    assert evaluation["provenance"]["packing"].startswith("packed at their own size (JPEG quality 95")
    assert evaluation["sampling"]["steps"] == 2
    assert evaluation["provenance"]["weights"].keys() == {"fid-inception", "imagenet-classifier"}
    assert "| per-position frequencies |" in (out / "results.md").read_text()
    assert Image.open(out / "samples.png").height == 2 * 100 + 4
    [cached] = (cache / "features").iterdir()
    assert evaluation["provenance"]["data_hash"][:16] in cached.name
    for network in evaluation["provenance"]["weights"].values():
        assert network["sha256"][:12] in cached.name


def test_real_features_are_read_from_cache(generation_setup, results, monkeypatch):
    from bsq_ray.evaluation.generation import features

    monkeypatch.setattr(
        features,
        "actor_map_ordered",
        lambda *arguments: pytest.fail("the features of the real images are computed again"),
    )
    run = config.load_config(f"{generation_setup[0]}/tokenizer/config.yaml")
    manifest = read_manifest(generation_setup[1])
    real = features.real_features(manifest, run, features.Workers())
    assert real.inception_ND.shape == (manifest.num_samples, 2048)
    assert real.classifier_NC.shape == (manifest.num_samples, 1280)
    keys = [key for shard in manifest.shards for key in shard.keys]
    assert sorted(real.ranks_N.tolist()) == sorted(sampling_ranks(keys).tolist())
    assert isinstance(real.inception_ND, np.memmap)


def test_fid_warning_depends_on_generated_image_count(generation_setup):
    """FID of few generated images has a bias warning, regardless of the number of real images."""
    manifest = read_manifest(generation_setup[1])
    provenance = collect_provenance(
        manifest, 50_000, size=64, resize_filter="lanczos", networks=["fid-inception"], num_generated=100
    )
    assert provenance["warning"].startswith("FID of 100 images is biased")
    assert "warning" not in collect_provenance(
        manifest, 50_000, size=64, resize_filter="lanczos", networks=["fid-inception"]
    )


def test_unreadable_real_images_raise_and_are_not_cached(generation_setup, cache, tmp_path):
    """Real images that cannot be read raise an error: they are not skipped, and no features are cached."""
    run = config.load_config(f"{generation_setup[0]}/tokenizer/config.yaml")
    storage.copy_folder(generation_setup[1], str(tmp_path / "shards"))
    [shard] = (tmp_path / "shards").glob("*.tar")
    shard.write_bytes(shard.read_bytes()[:-20_000])
    manifest = read_manifest(str(tmp_path / "shards"))
    # The hash differs from that of the complete data set, whose features are in the cache.
    damaged = replace(manifest, hash="0" * 64)
    cached = set(cache.rglob("*"))
    with pytest.raises(RuntimeError, match=r"shards has an image that cannot be read: shard-000000\.tar: .*shard ends"):
        real_features(damaged, run, Workers())
    assert set(cache.rglob("*")) == cached


def test_class_accuracy_and_coverage_use_nearest_images():
    """Class accuracy and coverage follow from the classes of the nearest reference images."""
    rng = np.random.default_rng(0)
    labels_N = np.repeat(np.arange(4), 10)
    reference = Features(rng.normal(size=(40, 8)), np.eye(4)[labels_N], labels_N, np.arange(40))
    # Images of the classes 0, 1 and 2; those of class 2 have the features of class 0.
    classifier_NC = np.concatenate([np.eye(4)[[0] * 5], np.eye(4)[[1] * 5], np.eye(4)[[0] * 5]])
    generated = Features(rng.normal(size=(15, 8)), classifier_NC, np.repeat([0, 1, 2], 5), np.arange(15))
    classifier, pool = SimpleNamespace(logits=lambda classifier_NC: classifier_NC), Workers()
    metrics = generation._compare(generated, reference, reference, classifier, reference.statistics(pool), pool)
    assert metrics["class_accuracy"] == pytest.approx(2 / 3)
    assert metrics["class_coverage"] == pytest.approx(2 / 3)


def test_baseline_table_of_other_tokenizer_raises(generation_setup, tmp_path):
    model, shards, tokens = generation_setup
    other = MODEL_CONFIG.model_copy(update={"tokenizer": "0" * 64})
    MaskedLM(other).save_pretrained(str(tmp_path / "model"))
    storage.copy_folder(f"{model}/tokenizer", str(tmp_path / "model" / "tokenizer"))
    with pytest.raises(ValueError, match="the model requires tokenizer 000000000000"):
        evaluate_generation(str(tmp_path / "model"), shards, str(tmp_path), workers=0, baseline_url=tokens)


def test_evaluation_on_two_workers_equals_local(generation_setup, results, tmp_path, ray_local):
    on_ray = evaluate(generation_setup, tmp_path, workers=2)
    for name, metrics in results[0]["rows"].items():
        for key, value in metrics.items():
            assert on_ray["rows"][name][key] == pytest.approx(value, rel=1e-3, abs=1e-4), (name, key)


def test_invalid_inputs_raise(generation_setup, photo_shards, tmp_path):
    with pytest.raises(ValueError, match="has 1 classes, the model 2"):
        evaluate_generation(generation_setup[0], photo_shards, str(tmp_path), workers=0)
    with pytest.raises(ValueError, match="3 images are too few"):
        evaluate_generation(generation_setup[0], generation_setup[1], str(tmp_path), workers=0, count=3)
    with pytest.raises(ValueError, match="^sampling: steps: Input should be greater than or equal to 1, got 0$"):
        evaluate_generation(generation_setup[0], generation_setup[1], str(tmp_path), workers=0, sampling={"steps": 0})
    with pytest.raises(ValueError, match="has stage 'tokenizer'; expected stage 'masked-lm'"):
        evaluate_generation(f"{generation_setup[0]}/tokenizer", generation_setup[1], str(tmp_path), workers=0)


def test_histogram_cross_entropy_of_same_table_is_low(generation_setup):
    source = TokenSource(read_table(generation_setup[2]), MODEL_CONFIG)
    bits_per_token = histogram_cross_entropy(source, source, 5)
    assert 0 < bits_per_token < 10


def test_frequency_sampler_matches_class_and_position(generation_setup, monkeypatch):
    """Each sampled token occurs at its position in an image of its class, and the table is read only once."""
    source = TokenSource(read_table(generation_setup[2]), MODEL_CONFIG)
    block = source.read_eval(range(source.num_samples))
    bits_PNL = unpack_bits(torch.from_numpy(block.values_P), 160).view(-1, 16, 10)
    rows, decoded_tokens = [], []
    read, decode = TokenSource.read, generation.Tokenizer.decode
    monkeypatch.setattr(TokenSource, "read", lambda s, p, *more: rows.extend(p) or read(s, p, *more))
    sampler = generation._FrequencySampler(source, 0)
    monkeypatch.setattr(
        generation.Tokenizer, "decode", lambda t, tokens: decoded_tokens.append(tokens) or decode(t, tokens)
    )
    labels = [1, 0, 1, 1]
    sampler(labels, 0)
    sampler(labels, len(labels))
    assert rows == list(range(source.num_samples))
    # In memory the bits are packed as in the table: 160 bits of an image are 20 bytes.
    assert sampler.packed_PB.nbytes == source.num_samples * 20
    for bits_NL, label in zip(decoded_tokens[0].bits_BNL, labels, strict=True):
        own_PNL = bits_PNL[torch.from_numpy(block.labels_P == label)]
        assert (own_PNL == bits_NL).all(-1).any(0).all()
        # No single image has all sampled tokens.
        assert not (own_PNL == bits_NL).all(-1).all(-1).any()


def test_generate_files_keeps_only_displayed_thumbnails(generation_setup, tmp_path, monkeypatch):
    monkeypatch.setattr(sample, "_COLUMNS", 2)
    written = []
    monkeypatch.setattr(
        sample.storage,
        "write_bytes",
        lambda url, data: written.append((url.rpartition("/")[2], len(kept_tiles(sheets)))),
    )
    sheets = []

    def kept_tiles(sheets):
        return [tile for sheet in sheets for row in sheet._rows.values() for tile in row]

    class RecordingSheet(ClassSheet):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            sheets.append(self)

    monkeypatch.setattr(sample, "ClassSheet", RecordingSheet)
    generate_files(generation_setup[0], str(tmp_path), GenerateRequest([1], count=4, sampling={"steps": 1}))
    # Each file is written before the next thumbnail is kept; only two thumbnails are kept.
    assert written == [*((f"class-001-{n:04}.png", min(n, 2)) for n in range(4)), ("sheet.png", 2)]
    assert {tile.size for tile in kept_tiles(sheets)} == {(96, 96)}


def test_generate_files_writes_images(generation_setup, tmp_path):
    count = generate_files(generation_setup[0], str(tmp_path), GenerateRequest([1, 0], count=3, sampling={"steps": 2}))
    assert count == 6
    assert sorted(p.name for p in tmp_path.glob("class-*.png"))[0] == "class-000-0003.png"
    assert Image.open(tmp_path / "sheet.png").height == 2 * 100 + 4
    whole = Image.open(tmp_path / "class-001-0000.png")
    hole = np.zeros((32, 32), np.uint8)
    hole[:8, :8] = 255
    Image.fromarray(hole).save(tmp_path / "hole.png")
    image, mask = str(tmp_path / "class-001-0000.png"), str(tmp_path / "hole.png")
    generate_files(generation_setup[0], str(tmp_path / "filled"), GenerateRequest([0], count=2, image=image, mask=mask))
    assert Image.open(tmp_path / "filled" / "class-000-0001.png").size == whole.size
    Image.new("L", (32, 40)).save(tmp_path / "tall.png")
    with pytest.raises(ValueError, match=r"tall.png has 32 x 40 pixels, .*0000.png has 32 x 32; give a mask of the"):
        generate_files(
            generation_setup[0], str(tmp_path / "x"), GenerateRequest([0], image=image, mask=str(tmp_path / "tall.png"))
        )
    assert (
        generate_files(
            generation_setup[0], str(tmp_path / "interpolated"), GenerateRequest([0, 1], count=4, interpolate=True)
        )
        == 4
    )


def test_generate_files_writes_animated_clips(tmp_path):
    model_config = MODEL_CONFIG.model_copy(update={"grid": (3, 4, 4)})
    MaskedLM(model_config).save_pretrained(str(tmp_path / "model"))
    save_tokenizer(tmp_path / "model" / "tokenizer", 0, frames=3)
    model = str(tmp_path / "model")
    assert generate_files(model, str(tmp_path / "out"), GenerateRequest([1], count=2, sampling={"steps": 2})) == 2
    file = Image.open(tmp_path / "out" / "class-001-0001.webp")
    assert (file.n_frames, file.size) == (3, (32, 32))
    assert Image.open(tmp_path / "out" / "sheet.png").height == 104
    with pytest.raises(ValueError, match="inpaint images only"):
        generate_files(model, str(tmp_path / "x"), GenerateRequest([1], image="a.png", mask="b.png"))
    with pytest.raises(ValueError, match="generates clips"):
        evaluate_generation(model, "x", str(tmp_path), workers=0)


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (GenerateRequest([7]), "classes 0 to 1, not 7"),
        (GenerateRequest([0], count=0), "count 0"),
        (GenerateRequest([0], sampling={"steps": 0}), "steps: Input should be greater than or equal to 1, got 0"),
        (GenerateRequest([0], image="x.png"), "needs both --image and --mask"),
        (GenerateRequest([0], image="x.png", mask="y.png"), "cannot read x.png: it does not exist"),
        (GenerateRequest([0], interpolate=True), "two classes"),
    ],
)
def test_generate_files_invalid_request_raises(generation_setup, tmp_path, request_, message):
    with pytest.raises(ValueError, match=message):
        generate_files(generation_setup[0], str(tmp_path), request_)


def test_read_qt_resources_returns_files():
    names = b"".join(struct.pack(">HI", len(n), 0) + n.encode("utf-16-be") for n in ("a", "b.webp"))
    content = zlib.compress(b"image file")
    contents = struct.pack(">I", len(content) + 4) + struct.pack(">I", 10) + content
    entries = struct.pack(">IHII", 0, 2, 1, 1) + struct.pack(">IHII", 0, 2, 1, 2)
    entries += struct.pack(">IHHHI", 8, 1, 0, 0, 0)
    header = 20
    data = struct.pack(">4s4I", b"qres", 1, header, header + len(entries), header + len(entries) + len(contents))
    assert read_qt_resources(data + entries + contents + names) == {"/a/b.webp": b"image file"}
    with pytest.raises(ValueError, match="not a Qt resource file"):
        read_qt_resources(io.BytesIO(b"no").getvalue())
