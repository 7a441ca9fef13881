"""Evaluate generated images: FID, KID, inception score, precision, recall and class accuracy.

    real images ─Inception, classifier─▶ features ┐
    classes ─Generator─▶ generated images ─Inception, classifier─▶ features ┴▶ results.json, results.md, samples.png

A pool of Ray actors generates and measures; the driver receives features and a few images. The available Inception
weights have no class logits, so the inception score is computed with a classifier (EfficientNet-Lite0). Its features
also decide the class of an image: the majority class of the nearest reference images.

Shape suffixes: B images of a batch, N tokens, L bits of a token, P rows of a token table, D and C features.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bsq_ray import config, model_folder, storage
from bsq_ray.config.loader import validate_mapping
from bsq_ray.data.manifest import Manifest, read_manifest
from bsq_ray.data.token_table import TokenSource, read_table
from bsq_ray.data.transforms import to_float, to_uint8
from bsq_ray.evaluation.generation.features import (
    NETWORKS,
    FeatureExtractors,
    Features,
    Workers,
    default_device,
    nearest_classes,
    real_features,
)
from bsq_ray.evaluation.plots.class_grid import ClassSheet
from bsq_ray.evaluation.provenance import collect_provenance
from bsq_ray.evaluation.tables import Column, metric_table
from bsq_ray.metrics.classifier import EfficientNetLite0
from bsq_ray.metrics.fid import FeatureStatistics, frechet_distance, kernel_distance, sampling_ranks
from bsq_ray.metrics.precision_recall import precision_recall
from bsq_ray.model_folder import WeightsKind
from bsq_ray.models.generator import Generator
from bsq_ray.models.tokenizer import Tokenizer, Tokens
from bsq_ray.runtime.actor_pool import actor_map_ordered
from bsq_ray.runtime.progress_callback import ProgressCallback, no_progress
from bsq_ray.runtime.random_streams import RandomStream, stream_rng

_BATCH = 32
# Number of nearest reference images that vote on the class of an image.
_KNN_K = 5
_EXAMPLES_PER_CLASS = 8
_MIN_IMAGES = 4


def evaluate_generation(
    model_url: str,
    data_url: str,
    out_url: str,
    *,
    workers: int = 2,
    address: str | None = None,
    count: int | None = None,
    sampling: dict[str, Any] | None = None,
    seed: int = 0,
    reference_url: str | None = None,
    baseline_url: str | None = None,
    weights: WeightsKind = "ema",
    on_progress: ProgressCallback = no_progress,
) -> dict[str, Any]:
    """Generate images of the classes of a data set and compare them with it.

    Args:
        model_url: model folder of a masked language model.
        data_url: packed real images, which the model should not have been trained on.
        out_url: folder for the results.
        workers: Ray actors; 0 runs in this process, without Ray.
        address: Ray cluster; None starts one on this machine.
        count: number of generated images, in the class proportions of the real images; None for their number.
        sampling: keys of `config.SamplingConfig` to change.
        seed: of the sampler; the same seed generates the same images.
        reference_url: packed images with known classes, for the class accuracy; None for `data_url`.
        baseline_url: token table; adds a row that samples each token from its class's frequencies at that position.
        weights: "ema" or "raw" weights of the model folder.
        on_progress: called with the finished and the total number of images.

    Returns:
        The content of results.json.

    Raises:
        ValueError: model or data do not exist or do not match.
        RuntimeError: a real image cannot be read.
    """
    # Actors may have another working folder.
    model_url, data_url, out_url = model_folder.absolute_url(model_url), *map(storage.absolute, (data_url, out_url))
    reference_url, baseline_url = (url and storage.absolute(url) for url in (reference_url, baseline_url))
    folder = model_folder.load_model_folder(model_url, weights)
    run = config.require_stage(folder.config, config.MaskedLMConfig, model_url)
    sampling_config = validate_mapping(
        run.sampling.model_dump() | (sampling or {}), [], config.SamplingConfig, "sampling"
    )
    if run.model.grid[0] > 1:
        raise ValueError(f"{model_url} generates clips; this evaluation takes a model of images")
    manifest = read_manifest(data_url)
    total = manifest.num_samples if count is None else count
    _check_inputs(run, manifest, total)
    tokenizer = config.require_stage(
        model_folder.load_model_folder(storage.join(model_url, "tokenizer")).config, config.TokenizerConfig, model_url
    )
    pool = Workers(workers, address)
    real = real_features(manifest, tokenizer, pool)
    reference = real if reference_url is None else real_features(read_manifest(reference_url), tokenizer, pool)
    samplers: dict[str, Callable[[], Any]] = {
        "model": partial(_ModelSampler, model_url, weights, sampling_config, seed)
    }
    if baseline_url:
        source = TokenSource(read_table(baseline_url), run.model)
        samplers["per-position frequencies"] = partial(_FrequencySampler, source, seed)
    labels = proportional_labels(np.bincount(real.labels_N, minlength=run.model.num_classes), total)
    rows, classifier = {}, EfficientNetLite0()
    sheets = {name: ClassSheet(manifest.classes, _EXAMPLES_PER_CLASS) for name in samplers}
    real_statistics = real.statistics(pool)
    for index, (name, build_sampler) in enumerate(samplers.items()):

        def report(done: int, offset: int = index * total) -> None:
            on_progress(offset + done, total * len(samplers))

        generated = _generated_features(name, build_sampler, labels, pool=pool, sheet=sheets[name], report=report)
        rows[name] = _compare(generated, real, reference, classifier, real_statistics, pool)
    size, resize_filter = tokenizer.model.image_size, tokenizer.data.eval_interpolation
    results = {
        "model": model_url,
        "model_id": folder.model_id,
        "weights": weights,
        "sampling": sampling_config.model_dump(),
        "seed": seed,
        "num_generated": total,
        "classes": "in the proportions of the real images",
        "rows": rows,
        "real_images": {"inception_score": real.inception_score(classifier)}
        | ({"class_accuracy": _class_accuracy(real, reference, pool)} if reference_url else {}),
        "provenance": collect_provenance(
            manifest,
            manifest.num_samples,
            size=size,
            resize_filter=resize_filter,
            networks=NETWORKS,
            num_generated=total,
        ),
    }
    storage.write_text(storage.join(out_url, "results.json"), json.dumps(results, indent=1))
    storage.write_text(storage.join(out_url, "results.md"), generation_markdown(results) + "\n")
    storage.write_bytes(storage.join(out_url, "samples.png"), sheets["model"].png())
    return results


def proportional_labels(counts_C: np.ndarray, total: int) -> list[int]:
    """Return labels in the proportions of class counts, each class spread evenly over the list.

    Rounded up where the remainder is largest, so the numbers of a class differ from its proportion by less than one.
    With `total` equal to the sum of the counts, each class has its count.

    Args:
        counts_C: number of real images of each class, int (C,).
        total: number of labels.
    """
    num_labels_C, remainder_C = np.divmod(counts_C.astype(np.int64) * total, counts_C.sum())
    num_labels_C[np.argsort(-remainder_C, kind="stable")[: total - num_labels_C.sum()]] += 1
    labels = np.repeat(np.arange(len(counts_C)), num_labels_C)
    positions = np.concatenate([(np.arange(number) + 0.5) / number for number in num_labels_C])
    return [int(label) for label in labels[np.argsort(positions, kind="stable")]]


def _check_inputs(run: config.MaskedLMConfig, manifest: Manifest, total: int) -> None:
    """Raise ValueError unless the model has the classes of the data and there are enough images."""
    if len(manifest.classes) != run.model.num_classes:
        raise ValueError(f"{manifest.url} has {len(manifest.classes)} classes, the model {run.model.num_classes}")
    if total < _MIN_IMAGES:
        raise ValueError(f"{total} images are too few for a comparison; generate at least {_MIN_IMAGES}")


def _generated_features(
    name: str,
    build_sampler: Callable[[], Any],
    labels: Sequence[int],
    *,
    pool: Workers,
    sheet: ClassSheet,
    report: Callable[[int], None],
) -> Features:
    """Generate an image for each label on the pool; add the images to the sheet and return their features."""
    total = len(labels)
    chunks = [(first, list(labels[first : first + _BATCH])) for first in range(0, total, _BATCH)]
    features = Features.allocate(total)
    outputs = actor_map_ordered(chunks, partial(_GeneratedFeatureExtractor, build_sampler), pool.count, pool.address)
    for (first, chunk_labels), ((inception_BD, classifier_BC), images) in zip(chunks, outputs, strict=True):
        ranks_B = sampling_ranks([f"{name}-{first + n}" for n in range(len(chunk_labels))])
        features.fill(first, Features(inception_BD, classifier_BC, np.array(chunk_labels), ranks_B))
        for label, pixels in zip(chunk_labels, images, strict=True):
            sheet.add(label, pixels)
        report(first + len(chunk_labels))
    return features


class _GeneratedFeatureExtractor:
    """Generate a chunk of images; return its features and its pixels, uint8 (B, 3, H, W)."""

    def __init__(self, build_sampler: Callable[[], Any]) -> None:
        self.sampler, self.extractors = build_sampler(), FeatureExtractors()

    def __call__(self, chunk: tuple[int, list[int]]) -> tuple[tuple[np.ndarray, np.ndarray], np.ndarray]:
        first, labels = chunk
        pixels = to_uint8(self.sampler(labels, first))
        return self.extractors(to_float(pixels)), pixels.cpu().numpy()


class _ModelSampler:
    """Sample images from the model."""

    def __init__(self, url: str, weights: WeightsKind, sampling_config: config.SamplingConfig, seed: int) -> None:
        self.generator = Generator.from_pretrained(url, weights, default_device())
        self.sampling_config, self.seed = sampling_config, seed

    def __call__(self, labels: list[int], first: int) -> Tensor:
        return self.generator.generate(labels, self.seed, first, **self.sampling_config.model_dump())


class _FrequencySampler:
    """Sample each token from a random row of its class, position by position: exact class frequencies.

    A batch needs rows from everywhere in the table, so every process reads the table once and keeps its packed bits
    in memory: 0.74 GB for ImageNet's 1.28 million rows of 256 tokens of 18 bits. Only sampled tokens are unpacked.
    """

    def __init__(self, source: TokenSource, seed: int) -> None:
        self.table_info, self.seed = source.table.info, seed
        self.labels_P = np.empty(source.num_samples, np.int64)
        self.packed_PB = np.empty((source.num_samples, source.sample_bytes), np.uint8)
        first = 0
        for block in source.iter_blocks():
            rows = slice(first, first + len(block.keys))
            self.labels_P[rows], self.packed_PB[rows] = block.labels_P, block.values_P
            first = rows.stop
        self.tokenizer = Tokenizer.from_pretrained(source.tokenizer_url)

    def __call__(self, labels: list[int], first: int) -> Tensor:
        tokens, bits = self.table_info.num_tokens, self.table_info.bits
        rows_BN = np.empty((len(labels), tokens), np.int64)
        for index, label in enumerate(labels):
            rng = stream_rng(RandomStream.FREQUENCY_BASELINE, self.seed, first + index)
            rows_BN[index] = rng.choice(np.flatnonzero(self.labels_P == label), tokens)
        # Bit 1 of a byte is the least significant one.
        byte_NL, bit_NL = np.divmod(np.arange(tokens * bits).reshape(tokens, bits), 8)
        sampled_BNL = (self.packed_PB[rows_BN[..., None], byte_NL] >> bit_NL & 1).astype(bool)
        return self.tokenizer.decode(Tokens(torch.from_numpy(sampled_BNL), self.table_info.grid))


def _compare(
    generated: Features,
    real: Features,
    reference: Features,
    classifier: EfficientNetLite0,
    real_statistics: FeatureStatistics,
    pool: Workers,
) -> dict[str, float]:
    """Return all metrics of the generated images."""
    generated_statistics = generated.statistics(pool)
    predicted_N = nearest_classes(generated, reference, _KNN_K, pool)
    return {
        "fid": frechet_distance(real_statistics, generated_statistics),
        "kid": kernel_distance(real_statistics.kid_subset(), generated_statistics.kid_subset()),
        "inception_score": generated.inception_score(classifier),
        **precision_recall(real.pairwise_subset(), generated.pairwise_subset()),
        "class_accuracy": float((predicted_N == generated.labels_N).mean()),
        "class_coverage": float(np.isin(np.unique(generated.labels_N), predicted_N).mean()),
    }


def _class_accuracy(images: Features, reference: Features, pool: Workers) -> float:
    predicted_N = nearest_classes(images, reference, _KNN_K, pool)
    return float((predicted_N == images.labels_N).mean())


_COLUMNS: dict[str, Column] = {
    "fid": ("FID", 2, min),
    "kid": ("KID", 4, min),
    "inception_score": ("IS (EfficientNet)", 2, max),
    "precision": ("precision", 3, max),
    "recall": ("recall", 3, max),
    "class_accuracy": ("class accuracy (5-NN)", 3, max),
    "class_coverage": ("class coverage", 3, max),
}


def generation_markdown(results: dict[str, Any]) -> str:
    """Return a Markdown table, the better value of each column in bold, followed by the provenance."""
    lines = metric_table(results["rows"], _COLUMNS)
    provenance, sampling = results["provenance"], results["sampling"]
    generated_text = (
        f"{results['num_generated']} generated images, classes {results['classes']} ({sampling['steps']} steps, "
        f"temperature {sampling['temperature']:g}, "
        f"guidance {sampling['guidance_scale']:g} {sampling['guidance_schedule']}, seed {results['seed']})"
    )
    real_data = f"{provenance['num_samples']} images of {provenance['data']} ({provenance['data_hash'][:12]})"
    lines += ["", f"{generated_text} against {real_data}, {provenance['packing']}, {provenance['resize']}."]
    real = results["real_images"]
    lines.append(f"The real images' inception score is {real['inception_score']:.2f}.")
    if "class_accuracy" in real:
        lines.append(f"The real images' class accuracy is {real['class_accuracy']:.3f}.")
    if "warning" in provenance:
        lines.append(f"Note: {provenance['warning']}.")
    return "\n".join(lines)
