"""The configuration: its schema, the shipped presets, and how files and overrides become one checked object.

    preset or file ──base: chain──▶ merged keys ──key=value overrides──▶ pydantic schema ──▶ TokenizerConfig

Every key is known to the schema; anything else is refused with the file it stands in and the nearest valid key.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Mapping, Sequence
from importlib import resources
from math import log2
from typing import Annotated, Any, Literal

import fsspec
import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator


class Strict(BaseModel):
    """A section of the configuration: unknown keys are refused and values cannot be changed after checking."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)


class Transformer(Strict):
    """One ViT: the encoder or the decoder of a tokenizer (paper section 3.1)."""

    width: int = Field(768, ge=8)
    layers: int = Field(12, ge=1)
    heads: int = Field(12, ge=1)
    mlp_ratio: float = Field(4.0, gt=0)

    @model_validator(mode="after")
    def _heads_divide_width(self) -> Transformer:
        if self.width % self.heads:
            raise ValueError(f"width {self.width} is not a multiple of heads {self.heads}")
        return self


class Decoder(Transformer):
    """The decoder adds a head of two linear layers with a Tanh between them."""

    head_width: int = Field(3072, ge=1)


class Entropy(Strict):
    """The entropy penalty of BSQ and LFQ (paper equation 4).

    penalty = weight · (per_sample_weight · E[H] - dataset_weight · H(E)) / inverse_temperature
    """

    estimate: Literal["analytical", "group"] = "analytical"
    group_size: int = Field(1, ge=1, le=18)
    inverse_temperature: float = Field(1.0, gt=0)
    per_sample_weight: float = Field(1.0, ge=0)
    dataset_weight: float = Field(1.0, ge=0)
    weight: float = Field(1.0, ge=0)
    across_workers: bool = False


class _BinaryQuantizer(Strict):
    bits: int = Field(18, ge=1, le=128)
    entropy: Entropy = Entropy()
    commit_weight: float = Field(0.0, ge=0)

    @model_validator(mode="after")
    def _groups_divide_bits(self) -> _BinaryQuantizer:
        if self.entropy.estimate == "group" and self.bits % self.entropy.group_size:
            raise ValueError(f"bits {self.bits} is not a multiple of entropy.group_size {self.entropy.group_size}")
        return self


class BSQ(_BinaryQuantizer):
    """The vector is projected on the unit sphere, then each coordinate keeps its sign."""

    kind: Literal["bsq"] = "bsq"


class LFQ(_BinaryQuantizer):
    """Look-up free quantisation: BSQ without the projection on the sphere."""

    kind: Literal["lfq"] = "lfq"


class FSQ(Strict):
    """Finite scalar quantisation: each channel is rounded to its number of levels."""

    kind: Literal["fsq"]
    levels: tuple[Annotated[int, Field(ge=2, le=256)], ...] = Field((8, 8, 8, 8, 8, 8), min_length=1)

    @property
    def bits(self) -> int:
        """Bits of one token: each channel is written in the fewest bits that hold its levels."""
        return sum((n - 1).bit_length() for n in self.levels)


class VQ(Strict):
    """Vector quantisation with a learned codebook."""

    kind: Literal["vq"]
    codebook_size: int = Field(16384, ge=2)
    code_width: int = Field(8, ge=1)
    normalised: bool = True
    commit_weight: float = Field(0.25, ge=0)

    @model_validator(mode="after")
    def _power_of_two(self) -> VQ:
        if self.codebook_size & (self.codebook_size - 1):
            raise ValueError(f"codebook_size {self.codebook_size} is not a power of two, so it has no whole bits")
        return self

    @property
    def bits(self) -> int:
        """Bits of one token."""
        return int(log2(self.codebook_size))


Quantizer = Annotated[BSQ | LFQ | FSQ | VQ, Field(discriminator="kind")]


class TokenizerModel(Strict):
    """The BSQ-ViT tokenizer: patches → encoder → quantiser → decoder → patches."""

    image_size: int = Field(128, ge=8)
    patch_size: int = Field(8, ge=1)
    frames: int = Field(1, ge=1)
    causal: bool = True
    encoder: Transformer = Transformer()
    decoder: Decoder = Decoder()
    quantizer: Quantizer = BSQ()
    gradient_checkpointing: bool = False

    @field_validator("quantizer", mode="before")
    @classmethod
    def _bsq_unless_said(cls, value: Any) -> Any:
        return {"kind": "bsq", **value} if isinstance(value, dict) else value

    @model_validator(mode="after")
    def _patches_fill_image(self) -> TokenizerModel:
        if self.image_size % self.patch_size:
            raise ValueError(f"image_size {self.image_size} is not a multiple of patch_size {self.patch_size}")
        return self


class Adversarial(Strict):
    """The discriminator and its losses (paper section 3; StyleGAN2's R1 penalty every `r1_every` steps)."""

    weight: float = Field(0.1, ge=0)
    adaptive_weight: bool = False
    start_step: int = Field(0, ge=0)
    objective: Literal["non_saturating", "hinge"] = "non_saturating"
    discriminator: Literal["stylegan2", "patchgan"] = "stylegan2"
    channel_base: int = Field(32768, ge=64)
    channel_max: int = Field(512, ge=8)
    r1_gamma: float = Field(10.0, ge=0)
    r1_every: int = Field(16, ge=1)


class TokenizerLoss(Strict):
    """Reconstruction + perceptual + adversarial + quantiser losses of the tokenizer (paper equation 2)."""

    reconstruction: Literal["l1", "l2"] = "l1"
    reconstruction_weight: float = Field(1.0, ge=0)
    perceptual_weight: float = Field(0.1, ge=0)
    perceptual_network: Literal["vgg", "alex"] = "vgg"
    adversarial: Adversarial = Adversarial()
    quantizer_weight: float = Field(0.1, ge=0)
    quantizer_ramp_from: float = Field(3.0, ge=0)
    quantizer_ramp_steps: int = Field(2000, ge=0)


class Data(Strict):
    """What is read from the shards, in which order, and how it becomes training images."""

    crop_scale: tuple[float, float] = (1.0, 1.0)
    flip: bool = False
    evaluation_filter: Literal["lanczos", "bilinear"] = "lanczos"
    lanes: int = Field(16, ge=1)
    shuffle_window: int = Field(512, ge=1)
    prefetch_batches: int = Field(4, ge=1)
    max_damaged: int = Field(100, ge=0)

    @model_validator(mode="after")
    def _scales_are_a_range(self) -> Data:
        low, high = self.crop_scale
        if not 1.0 <= low <= high:
            raise ValueError(f"crop_scale {list(self.crop_scale)} is not a range [low, high] with 1 <= low <= high")
        return self


class Optimizer(Strict):
    """AdamW of every optimised module; the learning rate is per 256 images and scales with the global batch."""

    learning_rate_per_256: float = Field(1.024e-4, gt=0)
    betas: tuple[float, float] = (0.9, 0.99)
    weight_decay: float = Field(1e-4, ge=0)
    epsilon: float = Field(1e-8, gt=0)
    gradient_clip: float = Field(0.0, ge=0)


class Schedule(Strict):
    """Linear warm-up from `warmup_from` to 1, then a half cosine down to `final`, as factors of the learning rate."""

    warmup_steps: int = Field(5000, ge=0)
    warmup_from: float = Field(0.1, ge=0, le=1)
    final: float = Field(0.0, ge=0, le=1)


class Engine(Strict):
    """Who holds parameters and optimizer state: DeepSpeed ZeRO, or plain data parallelism (ddp)."""

    kind: Literal["deepspeed", "ddp"] = "deepspeed"
    zero_stage: Literal[0, 1, 2, 3] = 1
    precision: Literal["bf16", "fp32", "auto"] = "bf16"
    compile: bool = False


class Training(Strict):
    """The run: how long, how large a batch, what is saved and shown along the way."""

    steps: int = Field(1_000_000, ge=1)
    batch_size: int = Field(256, ge=1)
    micro_batch_size: int | None = Field(None, ge=1)
    seed: int = Field(0, ge=0)
    optimizer: Optimizer = Optimizer()
    schedule: Schedule = Schedule()
    engine: Engine = Engine()
    ema_decay: float = Field(0.999, ge=0, lt=1)
    log_every: int = Field(50, ge=1)
    sample_every: int = Field(5000, ge=1)
    evaluate_every: int = Field(20_000, ge=1)
    evaluate_batches: int = Field(2, ge=1)
    checkpoint_every: int = Field(1000, ge=1)
    keep_checkpoints: int = Field(3, ge=1)


class TokenizerConfig(Strict):
    """Everything that decides a tokenizer's training run."""

    stage: Literal["tokenizer"] = "tokenizer"
    name: str = Field(min_length=1)
    description: str = ""
    model: TokenizerModel = TokenizerModel()
    loss: TokenizerLoss = TokenizerLoss()
    data: Data = Data()
    training: Training = Training()


def preset_names() -> list[str]:
    """Names of the shipped presets, sorted."""
    files = (resources.files("bsq_ray") / "presets").iterdir()
    return sorted(f.name.removesuffix(".yaml") for f in files if f.name.endswith(".yaml"))


def load_config(source: str, overrides: Sequence[str] = ()) -> TokenizerConfig:
    """Reads a preset by name, or a YAML file by path or URL, and applies `key.path=value` overrides.

    Raises:
        ValueError: an unknown preset, file, key or value; the message names the key, where it stands and what is valid.
    """
    keys, origins = _read(source, seen=())
    for override in overrides:
        path, separator, text = override.partition("=")
        if not separator or not path.strip():
            raise ValueError(f"override '{override}' is not of the form key.path=value")
        value = _parse_yaml(text, f"override '{override}'")
        _assign(keys, path.strip().split("."), value, f"override '{override}'")
        origins[tuple(path.strip().split("."))] = f"override '{override}'"
    return _check(keys, origins, source)


def parse_config(text: str, source: str) -> TokenizerConfig:
    """Checks a configuration given as YAML text, for example the one stored in a model folder."""
    keys = _parse_yaml(text, source)
    if not isinstance(keys, dict):
        raise ValueError(f"{source}: expected keys and values, found {type(keys).__name__}")
    return _check(keys, {}, source)


def dump_config(config: TokenizerConfig) -> str:
    """The whole configuration as YAML, every key written out, in the order of the schema."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)


Keys = dict[str, Any]
Origins = dict[tuple[str, ...], str]


def _read(source: str, seen: tuple[str, ...]) -> tuple[Keys, Origins]:
    """Keys of a file merged over those of its `base`, and which file each key came from."""
    if source in seen:
        raise ValueError(f"{source}: its base chain comes back to itself ({' → '.join((*seen, source))})")
    text, label = _open(source)
    keys = _parse_yaml(text, label)
    if not isinstance(keys, dict):
        raise ValueError(f"{label}: expected keys and values, found {type(keys).__name__}")
    base = keys.pop("base", None)
    origins: Origins = {path: label for path, _ in _leaves(keys)}
    if base is None:
        return keys, origins
    base_keys, base_origins = _read(str(base), (*seen, source))
    return _merge(base_keys, keys), base_origins | origins


def _open(source: str) -> tuple[str, str]:
    if source in preset_names():
        return (resources.files("bsq_ray") / "presets" / f"{source}.yaml").read_text(), f"preset {source}"
    if not (source.endswith((".yaml", ".yml")) or "/" in source):
        near = difflib.get_close_matches(source, preset_names(), n=1)
        hint = f"; did you mean {near[0]}?" if near else f"; presets are {', '.join(preset_names())}"
        raise ValueError(f"no preset is called '{source}'{hint}")
    try:
        with fsspec.open(source, "r") as file:
            return file.read(), source
    except OSError as error:
        raise ValueError(f"cannot read the configuration {source}: {error}") from error


def _parse_yaml(text: str, label: str) -> Any:
    try:
        return yaml.load(text, Loader=_FloatLoader)
    except yaml.YAMLError as error:
        raise ValueError(f"{label}: not valid YAML: {' '.join(str(error).split())}") from error


class _FloatLoader(yaml.SafeLoader):
    """YAML 1.2 floats: PyYAML reads `1e-4` as a string."""


_FloatLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"),
    list("-+.0123456789"),
)


def _leaves(keys: Mapping[str, Any], path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    for key, value in keys.items():
        if isinstance(value, Mapping) and value:
            yield from _leaves(value, (*path, str(key)))
        else:
            yield (*path, str(key)), value


def _merge(base: Any, changes: Any) -> Keys:
    """`changes` over `base`, section by section; a section of another `kind` replaces the base's whole section."""
    merged: Keys = dict(base)
    for key, value in changes.items():
        old = merged.get(key)
        if isinstance(old, dict) and isinstance(value, dict) and value.get("kind", old.get("kind")) == old.get("kind"):
            merged[key] = _merge(old, value)
        else:
            merged[key] = value
    return merged


def _assign(keys: Keys, path: Sequence[str], value: Any, label: str) -> None:
    *sections, last = path
    for depth, section in enumerate(sections, 1):
        keys = keys.setdefault(section, {})
        if not isinstance(keys, dict):
            raise ValueError(f"{label}: {'.'.join(path[:depth])} is a value, not a section")
    if last == "kind" and keys.get("kind") != value:
        keys.clear()
    keys[last] = value


def _check(keys: Keys, origins: Origins, source: str) -> TokenizerConfig:
    try:
        return TokenizerConfig.model_validate(keys)
    except ValidationError as failure:
        lines = [_explain(error, origins, source) for error in failure.errors()]
        raise ValueError("\n".join(lines)) from None


_TAGS = {"bsq", "lfq", "fsq", "vq"}


def _explain(error: Any, origins: Origins, source: str) -> str:
    """One sentence: where the key stands, its name, what is wrong, and what would be right."""
    path = tuple(str(part) for part in error["loc"] if part not in _TAGS)
    where = next((origins[path[:n]] for n in range(len(path), 0, -1) if path[:n] in origins), source)
    key = ".".join(path)
    if error["type"] == "extra_forbidden":
        valid = _valid_keys(error["loc"])
        near = difflib.get_close_matches(path[-1], valid, n=1, cutoff=0.5)
        hint = f"did you mean {'.'.join((*path[:-1], near[0]))}?" if near else f"valid keys are {', '.join(valid)}"
        return f"{where}: unknown key {key}; {hint}"
    message = error["msg"].removeprefix("Value error, ")
    given = "" if isinstance(error["input"], dict | BaseModel) else f", got {error['input']!r}"
    return f"{where}: {key or 'configuration'}: {message}{given}"


def _valid_keys(loc: tuple[int | str, ...]) -> list[str]:
    """Names that the section at `loc` (its last part left out) accepts."""
    section: type[BaseModel] = TokenizerConfig
    kinds: dict[str, type[BaseModel]] = {"bsq": BSQ, "lfq": LFQ, "fsq": FSQ, "vq": VQ}
    for part in loc[:-1]:
        if part in kinds:
            section = kinds[str(part)]
        elif str(part) in section.model_fields:
            annotation = section.model_fields[str(part)].annotation
            if isinstance(annotation, type) and issubclass(annotation, BaseModel):
                section = annotation
    return list(section.model_fields)
