"""Configuration: presets, files, overrides, and error messages for wrong keys and values."""

import re
from importlib import resources
from typing import get_args

import pytest
import yaml
from pydantic import BaseModel

from bsq_ray import config
from bsq_ray.config import dump_config, load_config, parse_config, preset_names
from bsq_ray.config.loader import STAGE_CONFIGS, iterate_fields, list_config_keys

PRESETS = resources.files("bsq_ray") / "presets"


@pytest.fixture
def write_config(tmp_path):
    def write_file(name, text):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
        return str(tmp_path / name)

    return write_file


def load_error(*arguments):
    with pytest.raises(ValueError) as error:
        load_config(*arguments)
    return str(error.value)


# Presets


@pytest.mark.parametrize("name", preset_names())
def test_preset_has_its_file_name_and_a_description(name):
    """A preset has the name of its file and a description."""
    loaded = load_config(name)
    assert loaded.name == name
    assert loaded.description


@pytest.mark.parametrize("name", preset_names())
def test_preset_keys_have_comments_and_heading_names_row(name):
    """Every key of a preset has a comment, and the heading names its row of the paper."""
    lines = [line for line in (PRESETS / f"{name}.yaml").read_text().splitlines() if line.strip()]
    assert [line for line in lines if not re.search(r"(^|\s)#\s*\S", line)] == []
    heading = " ".join(line for line in lines if line.startswith("#"))
    assert re.search(r"row .* \(|No row of the paper", heading)


def test_base_preset_lists_every_schema_key():
    """The base preset lists every key of the schema."""

    def schema_paths(model_type):
        return {
            (name, *nested_path)
            for name, field in model_type.model_fields.items()
            for nested_path in (schema_paths(field.annotation) if is_model_type(field.annotation) else [()])
        }

    def is_model_type(annotation):
        return isinstance(annotation, type) and issubclass(annotation, BaseModel)

    def yaml_paths(values):
        return {
            (name, *below)
            for name, value in values.items()
            for below in (yaml_paths(value) if isinstance(value, dict) and value else [()])
        }

    expected = schema_paths(config.TokenizerConfig) - {("model", "quantizer")}
    expected |= {("model", "quantizer", *path) for path in schema_paths(config.BSQConfig)}
    assert yaml_paths(yaml.safe_load((PRESETS / "imagenet128-bsq18.yaml").read_text())) == expected


@pytest.mark.parametrize("schema", STAGE_CONFIGS.values(), ids=STAGE_CONFIGS)
def test_every_config_key_has_a_description(schema):
    """Every key has a description, which is one sentence."""
    fields = dict(iterate_fields(schema))
    assert [key for key, field in fields.items() if not re.fullmatch(r"[^\n]+\.", field.description or "")] == []
    assert sorted(fields) == list_config_keys(schema)


def test_schema_defaults_match_base_preset():
    """The defaults of the schema are the values of the base preset."""
    base = load_config("imagenet128-bsq18")
    assert config.TokenizerConfig(name=base.name, description=base.description) == base


@pytest.mark.parametrize(
    ("preset", "key", "value"),
    [
        ("imagenet128-bsq18", "model.image_size", 128),
        ("imagenet128-bsq18", "training.optimizer.base_learning_rate", 1.024e-4),
        ("imagenet128-bsq18", "training.optimizer.betas", (0.9, 0.99)),
        ("imagenet128-bsq18", "training.schedule.final_factor", 0.0),
        ("imagenet128-bsq18", "model.quantizer.commitment_weight", 0.0),
        ("imagenet256-bsq18", "model.image_size", 256),
        ("imagenet256-bsq18", "model.quantizer.bits", 18),
        ("imagenet256-bsq36", "model.quantizer.bits", 36),
        ("imagenet256-bsq36", "model.image_size", 256),
        ("imagenet128-bsq10", "model.quantizer.bits", 10),
        ("imagenet128-bsq14", "model.quantizer.bits", 14),
        ("imagenet128-lfq18", "model.quantizer.kind", "lfq"),
        ("imagenet128-lfq18", "model.quantizer.bits", 18),
        ("imagenet128-vq10", "model.quantizer.codebook_size", 1024),
        ("imagenet128-vq10", "model.quantizer.code_dim", 32),
        ("imagenet128-vq14", "model.quantizer.bits", 14),
        ("imagenet128-vq14", "model.quantizer.code_dim", 8),
        ("imagenet128-vq16", "model.quantizer.bits", 16),
        ("imagenet128-bsq18-group18", "model.quantizer.entropy.group_size", 18),
        ("imagenet128-bsq18-group9", "model.quantizer.entropy.group_size", 9),
        ("imagenet128-bsq18-group6", "model.quantizer.entropy.group_size", 6),
        ("imagenet128-bsq18-group3", "model.quantizer.entropy.group_size", 3),
        ("imagenet128-bsq18-group1", "model.quantizer.entropy.estimate", "group"),
        ("imagenet128-bsq18-commit", "model.quantizer.commitment_weight", 0.25),
        ("imagenet128-bsq18-no-sample-entropy", "model.quantizer.entropy.per_sample_weight", 0.0),
        ("imagenet128-bsq18-no-dataset-entropy", "model.quantizer.entropy.codebook_weight", 0.0),
        ("imagenet128-bsq18-no-lpips", "loss.perceptual_weight", 0.0),
        ("imagenet128-bsq18-no-gan", "loss.adversarial.weight", 0.0),
        ("ucf101-bsq18", "model.frames", 16),
        ("ucf101-bsq18", "model.causal", True),
        ("ucf101-bsq18", "training.batch_size", 32),
        ("ucf101-bsq18", "training.steps", 500_000),
        ("ucf101-bsq18-noncausal", "model.causal", False),
        ("ucf101-bsq36", "model.quantizer.bits", 36),
        ("ucf101-bsq36-noncausal", "model.quantizer.bits", 36),
        ("demo", "model.encoder.width", 256),
    ],
)
def test_presets_match_paper_values(preset, key, value):
    """The presets have the values of the paper."""
    actual = load_config(preset)
    for part in key.split("."):
        actual = getattr(actual, part)
    assert actual == value


@pytest.mark.parametrize(
    ("key", "published", "base"),
    [
        ("model.quantizer.commitment_weight", 0.25, 0),
        ("model.quantizer.entropy.across_workers", False, True),
        ("model.quantizer.entropy.group_size", 9, 1),
        ("loss.clamp_reconstruction", True, False),
        ("loss.adversarial.r1_gradient", False, True),
        ("training.schedule.final_factor", 0.5, 0),
        ("training.ema_decay", 0, 0.999),
    ],
)
def test_as_published_preset_has_habits_of_published_code(key, published, base):
    """Each habit of the published code is a key of the preset, and the base has the paper's value."""
    for preset, expected in (("imagenet128-bsq18-as-published", published), ("imagenet128-bsq18", base)):
        actual = load_config(preset)
        for part in key.split("."):
            actual = getattr(actual, part)
        assert actual == expected


def test_leave_one_out_presets_differ_in_one_value():
    """Each leave-one-out preset differs from its base in one value."""

    def flat(values, path=()):
        if not isinstance(values, dict):
            return {path: values}
        return {p: v for name, value in values.items() for p, v in flat(value, (*path, name)).items()}

    base = flat(load_config("imagenet128-bsq18-group9").model_dump(exclude={"name", "description"}))
    for suffix in ("commit", "no-sample-entropy", "no-dataset-entropy", "no-lpips", "no-gan"):
        other = flat(load_config(f"imagenet128-bsq18-{suffix}").model_dump(exclude={"name", "description"}))
        assert len(base.items() ^ other.items()) == 2, suffix


# Files, bases and overrides


def test_load_config_overrides_set_nested_values(write_config):
    """Overrides set values at any depth."""
    loaded = load_config("imagenet128-bsq18", ["training.steps=12", "model.quantizer.entropy.estimate=group"])
    assert loaded.training.steps == 12
    assert loaded.model.quantizer.entropy.estimate == "group"
    assert load_config("demo", ["training.optimizer.betas=[0.5, 0.9]"]).training.optimizer.betas == (0.5, 0.9)


@pytest.mark.parametrize("text", ["1e-4", "1E-4", "1.0e-4", "0.0001", ".1e-3", "1.e-4"])
def test_load_config_parses_scientific_notation(write_config, text):
    """Numbers in scientific notation are parsed as numbers."""
    file = write_config("a.yaml", f"base: demo\nname: a\ntraining: {{optimizer: {{weight_decay: {text}}}}}")
    assert load_config(file).training.optimizer.weight_decay == 1e-4
    assert load_config("demo", [f"training.optimizer.weight_decay={text}"]).training.optimizer.weight_decay == 1e-4


def test_load_config_resolves_base_relative_to_file(write_config, tmp_path, monkeypatch):
    """A relative base path is relative to the file that names it."""
    monkeypatch.chdir(tmp_path)
    write_config("bases/base.yaml", "base: demo\nname: base\ntraining: {steps: 3, seed: 5}")
    write_config("runs/child.yaml", "base: ../bases/base.yaml\nname: child\ntraining: {steps: 4}")
    for source in ("runs/child.yaml", str(tmp_path / "runs/child.yaml"), f"file://{tmp_path}/runs/child.yaml"):
        loaded = load_config(source)
        assert (loaded.name, loaded.training.steps, loaded.training.seed) == ("child", 4, 5)
        assert loaded.model == load_config("demo").model


def test_load_config_circular_base_raises(write_config):
    """A circular chain of base files raises an error."""
    write_config("b.yaml", "base: sub/../a.yaml")
    assert "chain of base files is circular" in load_error(write_config("a.yaml", "base: b.yaml"))


def test_load_config_new_quantizer_kind_resets_section(write_config):
    """Another kind of quantizer resets its section, unless both kinds have the same keys."""
    vq_config = load_config("imagenet256-bsq36", ["model.quantizer.codebook_size=64", "model.quantizer.kind=vq"])
    assert vq_config.model.quantizer == config.VQConfig(kind="vq", codebook_size=64)
    lfq_config = load_config("imagenet256-bsq36", ["model.quantizer.kind=lfq"])
    assert lfq_config.model.quantizer == config.LFQConfig(kind="lfq", bits=36)
    file = write_config(
        "a.yaml", "base: imagenet256-bsq36\nname: a\nmodel: {quantizer: {kind: fsq, levels: [8, 5, 5]}}"
    )
    assert load_config(file).model.quantizer.bits == 3 + 3 + 3


def test_load_config_new_engine_kind_keeps_precision():
    """Another kind of engine keeps the precision."""
    loaded = load_config("demo", ["training.engine.precision=fp32", "training.engine.kind=ddp"])
    assert (loaded.training.engine.kind, loaded.training.engine.precision) == ("ddp", "fp32")


@pytest.mark.parametrize("name", preset_names())
def test_dump_config_parse_config_roundtrip(name):
    """A configuration is equal after it is dumped and parsed."""
    loaded = load_config(name)
    assert parse_config(dump_config(loaded), "text") == loaded


def test_tokenizer_config_accepts_training_config_of_every_model():
    training = config.TrainingConfig(steps=7)
    loaded = config.TokenizerConfig(name="m", training=training)
    assert (loaded.training.steps, loaded.training.only) == (7, None)


# Mistakes


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("training.stepz=5", "unknown key training.stepz; did you mean training.steps?"),
        ("model.quantizer.bit=5", "unknown key model.quantizer.bit; did you mean model.quantizer.bits?"),
        (
            "model.quantizer.entropy.gamma=5",
            "unknown key model.quantizer.entropy.gamma; valid keys are estimate, group_size, inverse_temperature",
        ),
        ("batch_size=5", "unknown key batch_size; did you mean training.batch_size?"),
        ("trainning.steps=5", "unknown key trainning; did you mean training?"),
        ("loss.adversarial.objective=hing", "loss.adversarial.objective: 'hing' is not valid; did you mean hinge?"),
        ("training.engine.precision=fp16", "training.engine.precision: 'fp16' is not valid; did you mean bf16?"),
        ("training.engine.zero_stage=4", "training.engine.zero_stage: 4 is not valid; valid values are 0, 1, 2 or 3"),
        ("model.quantizer.kind=bsqq", "model.quantizer.kind: did you mean bsq?"),
        ("model.quantizer.kind=7", "model.quantizer.kind: valid values are bsq, lfq, fsq, vq"),
        ("training.steps=0", "training.steps: Input should be greater than or equal to 1, got 0"),
        ("training.steps=soon", "training.steps: Input should be a valid integer"),
        ("training.steps=true", "training: steps cannot be true or false"),
        ("training.steps=", "training.steps: Input should be a valid integer, got None"),
        ("training.optimizer.weight_decay=.inf", "training.optimizer.weight_decay: Input should be a finite number"),
        ("training=5", "training: Input should be a valid dictionary or instance of TokenizerTraini"),
        ("training.steps.more=5", "training.steps is a value, not a section"),
        ("data.resize_range=[2, 1]", "resize_range [2.0, 1.0] is not a range"),
        ("data.resize_range=[0.5, 1]", "resize_range [0.5, 1.0] is not a range"),
        ("model.encoder.heads=7", "width 256 is not a multiple of heads 7"),
        ("model.patch_size=7", "image_size 64 is not a multiple of patch_size 7"),
        ("training.micro_batch_size=5", "batch_size 16 is not a multiple of micro_batch_size 5"),
        ("model.quantizer.bits=129", "model.quantizer.bits: Input should be less than or equal to 128"),
    ],
)
def test_load_config_wrong_override_names_valid_values(override, expected):
    """The error for a wrong override names the override, its key and the valid values."""
    message = load_error("demo", ["training.seed=1", override])
    assert expected in message
    assert message.startswith(f"override '{override}'")


@pytest.mark.parametrize("override", ["steps", "=5", "  =5"])
def test_load_config_malformed_override_raises(override):
    """An override that is not of the form key.path=value raises an error."""
    assert "is malformed; write key.path=value" in load_error("demo", [override])


def test_load_config_lists_every_mistake_with_its_file(write_config):
    """Every mistake is listed with the file or override that it comes from."""
    base = write_config("base.yaml", "base: demo\nmodel: {encodr: {width: 8}}\ntraining: {steps: 0}")
    child = write_config("child.yaml", "base: base.yaml\nname: child\nloss: {advesarial: {}}")
    lines = load_error(child, ["training.seed=-1"]).splitlines()
    assert f"{base}: unknown key model.encodr; did you mean model.encoder?" in lines
    assert f"{child}: unknown key loss.advesarial; did you mean loss.adversarial?" in lines
    assert any(line.startswith(f"{base}: training.steps") for line in lines)
    assert any(line.startswith("override 'training.seed=-1'") for line in lines)


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (
            ["model.quantizer.entropy.estimate=group", "model.quantizer.entropy.group_size=5"],
            "bits 18 is not a multiple of entropy.group_size 5",
        ),
        (["model.quantizer.keep=[9]"], "keep [9] must ascend and end with bits 18, such as [9, 18]; [] keeps all bits"),
        (["model.quantizer.keep=[12, 6, 18]"], "keep [12, 6, 18] must ascend and end with bits 18"),
        (["model.quantizer.keep=[6, 12]"], "keep [6, 12] must ascend and end with bits 18"),
        (
            [
                "model.quantizer.entropy.estimate=group",
                "model.quantizer.entropy.group_size=9",
                "model.quantizer.keep=[6, 18]",
            ],
            "keep [6, 18] splits groups of entropy.group_size 9 bits; use multiples of it",
        ),
        (["model.quantizer.kind=vq", "model.quantizer.codebook_size=1000"], "codebook_size 1000 is not a power of two"),
        (["model.quantizer.kind=fsq", "model.quantizer.levels=[8, 1]"], "model.quantizer.levels.1: Input should be gr"),
        (["model.quantizer.kind=fsq", "model.quantizer.bits=8"], "unknown key model.quantizer.bits; valid keys are k"),
        (["training.stage_options.noise=0.1"], "stage_options are arguments of stage_class; set stage_class too"),
        (["loss.adversarial.discriminator=stylegan2-3d"], "stylegan2-3d scores whole clips; set model.frames above 1"),
        (
            ["training.bit_noise.images=0.1", "model.quantizer.kind=vq"],
            "bit_noise flips signs, and codes of vq have none",
        ),
        (["loss.gram_weight=1", "loss.perceptual_weight=0"], "gram_weight uses the feature maps of LPIPS; set percep"),
        (
            ["training.engine.zero_stage=3", "training.micro_batch_size=4"],
            "zero_stage 3 with training.micro_batch_size accumulates wrong gradients",
        ),
    ],
)
def test_load_config_incompatible_values_raise(overrides, expected):
    """Values that are incompatible with each other raise an error."""
    assert expected in load_error("demo-gan", overrides)


def test_load_config_zero3_with_gan_or_accumulation_loads():
    """ZeRO 3 is allowed with accumulation or with a discriminator, but not with both."""
    load_config("demo-gan", ["training.engine.zero_stage=3"])
    load_config(
        "demo-gan", ["training.engine.zero_stage=3", "training.micro_batch_size=4", "loss.adversarial.weight=0"]
    )
    load_config("demo-gan", ["training.engine.zero_stage=2", "training.micro_batch_size=4"])
    ddp = ["training.engine.zero_stage=3", "training.engine.kind=ddp", "training.micro_batch_size=4"]
    load_config("demo-gan", ddp)


def test_load_config_unknown_preset_is_suggested():
    """The error for an unknown preset suggests the most similar one."""
    assert load_error("imagenet128-bsq8") == ("unknown preset 'imagenet128-bsq8'; did you mean imagenet128-bsq18?")
    assert "presets are demo, demo-any-size, demo-decoder, demo-features, demo-gan, demo-nested, " in load_error("xyz")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("- a\n- b", "expected keys and values, found list"),
        ("", "expected keys and values, found nothing"),
        ("name: [1, 2", "not valid YAML"),
        ("name: a\ntraining: {steps: 1, steps: 2}", "duplicate key steps"),
        ("name: a\nbase: 7", "base must be the name of a preset or a file, got 7"),
        ("base: demoo", "unknown preset 'demoo'; did you mean demo?"),
        ("training: {steps: 5}", "name: Field required"),
        ("base: missing.yaml", "missing.yaml: it does not exist"),
        ("!!python/object/apply:os.getcwd []", "not valid YAML"),
    ],
)
def test_load_config_invalid_file_raises(write_config, text, expected):
    """A file that is not a configuration raises an error."""
    assert expected in load_error(write_config("a.yaml", text))


def test_load_config_missing_file_is_named():
    """The error for a missing file names the file."""
    assert load_error("/nowhere/a.yaml") == "cannot read /nowhere/a.yaml: it does not exist"


def test_loaded_config_is_frozen():
    """A loaded configuration cannot be changed."""
    loaded = load_config("demo")
    with pytest.raises(ValueError, match="frozen"):
        loaded.training.steps = 5


def test_quantizer_config_computes_bits():
    """VQ and FSQ compute the bits of a token from their sizes."""
    assert config.VQConfig(kind="vq", codebook_size=1024).bits == 10
    assert config.FSQConfig(kind="fsq", levels=(8, 6, 5, 2)).bits == 3 + 3 + 3 + 1
    assert {kind for union in get_args(config.QuantizerConfig)[:1] for kind in get_args(union)} == {
        config.BSQConfig,
        config.LFQConfig,
        config.FSQConfig,
        config.VQConfig,
    }
