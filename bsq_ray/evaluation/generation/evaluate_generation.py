"""How good drawn images are: FID, KID, inception score, precision, recall and whether their classes can be told.

    real images ─Inception, classifier─▶ features ┐
    classes ─Generator─▶ drawn images ─Inception, classifier─▶ features ┴▶ results.json, results.md, samples.png

Drawing and measuring run in a pool of Ray actors; the driver gets features and a few pictures. The Inception weights
that packages carry have no class logits, so the inception score is that of the classifier (EfficientNet-Lite0), which
tells classes too: an image is said to be of the class that most of its nearest known images have.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from bsq_ray import config, model_folder, storage
from bsq_ray.config.loader import validate_mapping
from bsq_ray.data.manifest import read_manifest
from bsq_ray.data.token_table import TokenSource, read_table
from bsq_ray.data.transforms import to_float, to_uint8
from bsq_ray.evaluation.generation.features import NETWORKS, FeatureExtractors, Features, default_device, real_features
from bsq_ray.evaluation.plots.class_grid import ClassSheet
from bsq_ray.evaluation.provenance import collect_provenance
from bsq_ray.evaluation.tables import Column, metric_table
from bsq_ray.metrics.classifier import EfficientNetLite0
from bsq_ray.metrics.fid import frechet_distance, kernel_distance
from bsq_ray.metrics.inception_score import inception_score
from bsq_ray.metrics.precision_recall import knn_labels, precision_recall
from bsq_ray.models.generator import Generator
from bsq_ray.models.tokenizer import Tokenizer, Tokens
from bsq_ray.runtime.actor_pool import actor_map_ordered

_BATCH = 32
# Neighbours that vote on the class of an image.
_KNN_K = 5
_EXAMPLES_PER_CLASS = 8


def evaluate_generation(
    model_url: str,
    data_url: str,
    out_url: str,
    workers: int = 2,
    address: str | None = None,
    count: int | None = None,
    sampling: dict[str, Any] | None = None,
    seed: int = 0,
    reference_url: str | None = None,
    baseline_url: str | None = None,
    weights: Literal["ema", "plain"] = "ema",
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Any]:
    """Draws images with the classes of a data set and compares them with it.

    Args:
        model_url: model folder of a masked language model.
        data_url: packed real images, which the model should not have seen.
        out_url: folder for the results.
        workers: Ray actors; 0 works in this process, without Ray.
        count: images to draw; by default as many as there are real ones. Their classes are shared out evenly.
        sampling: keys of `config.Sampling` to change.
        known_url: packed images that say how classes look; by default `data_url`.
        baseline_url: token table; a second row draws each token from its class's frequencies at that place.

    Returns:
        The content of results.json.

    Raises:
        ValueError: model or data are missing or do not fit.
    """
    folder = model_folder.load_model_folder(model_url, weights)
    run = config.require_stage(folder.config, config.MaskedLMConfig, model_url)
    sampling_config = validate_mapping(
        run.sampling.model_dump() | (sampling or {}), [], config.SamplingConfig, "sampling"
    )
    if run.model.grid[0] > 1:
        raise ValueError(f"{model_url} draws clips; what is measured here are images")
    manifest = read_manifest(data_url)
    if len(manifest.classes) != run.model.num_classes:
        raise ValueError(f"{data_url} has {len(manifest.classes)} classes, the model {run.model.num_classes}")
    total = count or manifest.num_samples
    if total < 4:
        raise ValueError(f"{total} images are too few to be compared; draw at least 4")
    tokenizer = config.require_stage(
        model_folder.load_model_folder(storage.join(model_url, "tokenizer")).config, config.TokenizerConfig, model_url
    )
    real = real_features(manifest, tokenizer, workers, address)
    reference = (
        real if reference_url is None else real_features(read_manifest(reference_url), tokenizer, workers, address)
    )
    labels = [n % run.model.num_classes for n in range(total)]
    samplers: dict[str, Callable[[], Any]] = {
        "model": partial(_ModelSampler, model_url, weights, sampling_config, seed)
    }
    if baseline_url:
        source = TokenSource(read_table(baseline_url), run.model)
        samplers["per-position frequencies"] = partial(_FrequencySampler, source, seed)
    chunks = [(first, labels[first : first + _BATCH]) for first in range(0, total, _BATCH)]
    rows, classifier = {}, EfficientNetLite0()
    sheets = {name: ClassSheet(manifest.classes, _EXAMPLES_PER_CLASS) for name in samplers}
    for sampler_index, (name, build_sampler) in enumerate(samplers.items()):
        inception_parts, classifier_parts = [], []
        outputs = actor_map_ordered(chunks, partial(_GeneratedFeatureExtractor, build_sampler), workers, address)
        for (_, chunk_labels), ((inception_BD, classifier_BC), images) in zip(chunks, outputs, strict=True):
            inception_parts.append(inception_BD)
            classifier_parts.append(classifier_BC)
            for label, pixels in zip(chunk_labels, images, strict=True):
                sheets[name].add(label, pixels)
            on_progress(sampler_index * total + min(len(inception_parts) * _BATCH, total), total * len(samplers))
        keys = [f"{name}-{n}" for n in range(total)]
        generated = Features(np.concatenate(inception_parts), np.concatenate(classifier_parts), np.array(labels), keys)
        rows[name] = _compare(generated, real, reference, classifier)
    size, resize_filter = tokenizer.model.image_size, tokenizer.data.eval_interpolation
    provenance = collect_provenance(manifest, manifest.num_samples, size, resize_filter, NETWORKS, num_generated=total)
    results = {
        "model": model_url,
        "model_id": folder.model_id,
        "weights": weights,
        "sampling": sampling_config.model_dump(),
        "seed": seed,
        "drawn": total,
        "rows": rows,
        "real images": {"inception_score": _inception_score(real, classifier)}
        | ({"class_accuracy": _class_accuracy(real, reference)} if reference_url else {}),
        "contract": provenance,
    }
    storage.write_bytes(storage.join(out_url, "results.json"), json.dumps(results, indent=1).encode())
    storage.write_bytes(storage.join(out_url, "results.md"), (generation_markdown(results) + "\n").encode())
    storage.write_bytes(storage.join(out_url, "samples.png"), sheets["model"].png())
    return results


class _GeneratedFeatureExtractor:
    """Draws images and measures them; returns features and the images."""

    def __init__(self, build_sampler: Callable[[], Any]) -> None:
        self.sampler, self.extractors = build_sampler(), FeatureExtractors()

    def __call__(self, chunk: tuple[int, list[int]]) -> tuple[tuple[np.ndarray, np.ndarray], np.ndarray]:
        first, labels = chunk
        pixels = to_uint8(self.sampler(labels, first))
        return self.extractors(to_float(pixels)), pixels.cpu().numpy()


class _ModelSampler:
    def __init__(
        self, url: str, weights: Literal["ema", "plain"], sampling_config: config.SamplingConfig, seed: int
    ) -> None:
        self.generator = Generator.from_pretrained(url, weights, default_device())
        self.sampling_config, self.seed = sampling_config, seed

    def __call__(self, labels: list[int], first: int) -> Tensor:
        return self.generator.generate(labels, self.seed, first, **self.sampling_config.model_dump())


class _FrequencySampler:
    """Each token is that of a random training image of the class, place by place: exact class frequencies.

    A batch draws from rows all over the table, so it is read once and its bits stay in memory packed, in every process
    that draws: 0.74 GB for ImageNet's 1.28 million images of 256 tokens of 18 bits. Only drawn tokens are unpacked.
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
            rng = np.random.default_rng((self.seed, first + index))
            rows_BN[index] = rng.choice(np.flatnonzero(self.labels_P == label), tokens)
        # Bit 1 of a byte is the least significant one.
        byte_NL, bit_NL = np.divmod(np.arange(tokens * bits).reshape(tokens, bits), 8)
        sampled_BNL = (self.packed_PB[rows_BN[..., None], byte_NL] >> bit_NL & 1).astype(bool)
        return self.tokenizer.decode(Tokens(torch.from_numpy(sampled_BNL), self.table_info.grid))


def _compare(
    generated: Features, real: Features, reference: Features, classifier: EfficientNetLite0
) -> dict[str, float]:
    generated_statistics, real_statistics = generated.statistics(), real.statistics()
    predicted_N = knn_labels(generated.classifier_NC, reference.classifier_NC, reference.labels_N, _KNN_K)
    return {
        "fid": frechet_distance(real_statistics, generated_statistics),
        "kid": kernel_distance(real_statistics.kid_subset(), generated_statistics.kid_subset()),
        "inception_score": _inception_score(generated, classifier),
        **precision_recall(real.pairwise_subset(), generated.pairwise_subset()),
        "class_accuracy": float((predicted_N == generated.labels_N).mean()),
        "class_coverage": float(np.isin(np.unique(generated.labels_N), predicted_N).mean()),
    }


def _inception_score(images: Features, classifier: EfficientNetLite0) -> float:
    return inception_score(classifier.logits(torch.from_numpy(images.classifier_NC)).numpy())


def _class_accuracy(images: Features, reference: Features) -> float:
    predicted_N = knn_labels(images.classifier_NC, reference.classifier_NC, reference.labels_N, _KNN_K)
    return float((predicted_N == images.labels_N).mean())


_COLUMNS: dict[str, Column] = {
    "fid": ("FID", 2, min),
    "kid": ("KID", 4, min),
    "inception_score": ("IS (EfficientNet)", 2, max),
    "precision": ("precision", 3, max),
    "recall": ("recall", 3, max),
    "class_accuracy": ("classes told", 3, max),
    "class_coverage": ("classes covered", 3, max),
}


def generation_markdown(results: dict[str, Any]) -> str:
    """The results as a Markdown table, the better value of each column in bold, and the contract below it."""
    lines = metric_table(results["rows"], _COLUMNS)
    provenance, sampling = results["contract"], results["sampling"]
    generated_text = (
        f"{results['drawn']} drawn images ({sampling['steps']} steps, temperature {sampling['temperature']:g}, "
        f"guidance {sampling['guidance']:g} {sampling['guidance_schedule']}, seed {results['seed']})"
    )
    reference_text = f"{provenance['images']} images of {provenance['data']} ({provenance['data_hash'][:12]}), {provenance['resize']}"
    lines += ["", f"{generated_text} against {reference_text}."]
    real = results["real images"]
    lines.append(f"The real images' inception score is {real['inception_score']:.2f}.")
    if "class_accuracy" in real:
        lines.append(f"Of the real images' classes, {real['class_accuracy']:.3f} are told the same way.")
    if "warning" in provenance:
        lines.append(f"Note: {provenance['warning']}.")
    return "\n".join(lines)
