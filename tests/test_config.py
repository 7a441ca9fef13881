"""Reading the configuration: presets, files, overrides, and what a mistake is answered with."""

import re
from importlib import resources
from typing import get_args

import pytest
import yaml
from pydantic import BaseModel

from bsq_ray import config
from bsq_ray.config import dump_config, load_config, parse_config, preset_names

PRESETS = resources.files("bsq_ray") / "presets"


@pytest.fixture
def write(tmp_path):
    def write_file(name, text):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
        return str(tmp_path / name)

    return write_file


def message_of(*arguments):
    with pytest.raises(ValueError) as error:
        load_config(*arguments)
    return str(error.value)


# Presets


@pytest.mark.parametrize("name", preset_names())
def test_a_preset_is_called_by_its_name_and_described(name):
    loaded = load_config(name)
    assert loaded.name == name
    assert loaded.description


@pytest.mark.parametrize("name", preset_names())
def test_every_key_of_a_preset_is_commented_and_the_heading_names_its_table_row(name):
    lines = [line for line in (PRESETS / f"{name}.yaml").read_text().splitlines() if line.strip()]
    assert [line for line in lines if not re.search(r"(^|\s)#\s*\S", line)] == []
    heading = " ".join(line for line in lines if line.startswith("#"))
    assert re.search(r"row .* \(|No row of the paper", heading)


def test_the_base_preset_writes_out_every_key_of_the_schema():
    def keys(section):
        return {
            (name, *below)
            for name, field in section.model_fields.items()
            for below in (keys(field.annotation) if is_section(field.annotation) else [()])
        }

    def is_section(annotation):
        return isinstance(annotation, type) and issubclass(annotation, BaseModel)

    def written(values):
        return {
            (name, *below)
            for name, value in values.items()
            for below in (written(value) if isinstance(value, dict) else [()])
        }

    expected = keys(config.TokenizerConfig) - {("model", "quantizer")}
    expected |= {("model", "quantizer", *path) for path in keys(config.BSQ)}
    assert written(yaml.safe_load((PRESETS / "imagenet128-bsq18.yaml").read_text())) == expected


def test_the_schema_defaults_are_those_of_the_base_preset():
    base = load_config("imagenet128-bsq18")
    assert config.TokenizerConfig(name=base.name, description=base.description) == base


@pytest.mark.parametrize(
    ("preset", "key", "value"),
    [
        ("imagenet128-bsq18", "model.image_size", 128),
        ("imagenet128-bsq18", "training.optimizer.learning_rate_per_256", 1.024e-4),
        ("imagenet128-bsq18", "training.optimizer.betas", (0.9, 0.99)),
        ("imagenet128-bsq18", "training.schedule.final", 0.0),
        ("imagenet128-bsq18", "model.quantizer.commit_weight", 0.0),
        ("imagenet256-bsq18", "model.image_size", 256),
        ("imagenet256-bsq18", "model.quantizer.bits", 18),
        ("imagenet256-bsq36", "model.quantizer.bits", 36),
        ("imagenet256-bsq36", "model.image_size", 256),
        ("imagenet128-bsq10", "model.quantizer.bits", 10),
        ("imagenet128-bsq14", "model.quantizer.bits", 14),
        ("imagenet128-lfq18", "model.quantizer.kind", "lfq"),
        ("imagenet128-lfq18", "model.quantizer.bits", 18),
        ("imagenet128-vq10", "model.quantizer.codebook_size", 1024),
        ("imagenet128-vq10", "model.quantizer.code_width", 32),
        ("imagenet128-vq14", "model.quantizer.bits", 14),
        ("imagenet128-vq14", "model.quantizer.code_width", 8),
        ("imagenet128-vq16", "model.quantizer.bits", 16),
        ("imagenet128-bsq18-group18", "model.quantizer.entropy.group_size", 18),
        ("imagenet128-bsq18-group9", "model.quantizer.entropy.group_size", 9),
        ("imagenet128-bsq18-group6", "model.quantizer.entropy.group_size", 6),
        ("imagenet128-bsq18-group3", "model.quantizer.entropy.group_size", 3),
        ("imagenet128-bsq18-group1", "model.quantizer.entropy.estimate", "group"),
        ("imagenet128-bsq18-commit", "model.quantizer.commit_weight", 0.25),
        ("imagenet128-bsq18-no-sample-entropy", "model.quantizer.entropy.per_sample_weight", 0.0),
        ("imagenet128-bsq18-no-dataset-entropy", "model.quantizer.entropy.dataset_weight", 0.0),
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
def test_presets_hold_the_values_of_the_paper(preset, key, value):
    found = load_config(preset)
    for part in key.split("."):
        found = getattr(found, part)
    assert found == value


def test_each_leave_one_out_preset_differs_from_its_base_in_one_value():
    def flat(values, path=()):
        if not isinstance(values, dict):
            return {path: values}
        return {p: v for name, value in values.items() for p, v in flat(value, (*path, name)).items()}

    base = flat(load_config("imagenet128-bsq18-group9").model_dump(exclude={"name", "description"}))
    for suffix in ("commit", "no-sample-entropy", "no-dataset-entropy", "no-lpips", "no-gan"):
        other = flat(load_config(f"imagenet128-bsq18-{suffix}").model_dump(exclude={"name", "description"}))
        assert len(base.items() ^ other.items()) == 2, suffix


# Files, bases and overrides


def test_overrides_set_values_of_any_depth(write):
    loaded = load_config("imagenet128-bsq18", ["training.steps=12", "model.quantizer.entropy.estimate=group"])
    assert loaded.training.steps == 12
    assert loaded.model.quantizer.entropy.estimate == "group"
    assert load_config("demo", ["training.optimizer.betas=[0.5, 0.9]"]).training.optimizer.betas == (0.5, 0.9)


@pytest.mark.parametrize("text", ["1e-4", "1E-4", "1.0e-4", "0.0001", ".1e-3", "1.e-4"])
def test_numbers_in_scientific_notation_are_numbers(write, text):
    file = write("a.yaml", f"base: demo\nname: a\ntraining: {{optimizer: {{weight_decay: {text}}}}}")
    assert load_config(file).training.optimizer.weight_decay == 1e-4
    assert load_config("demo", [f"training.optimizer.weight_decay={text}"]).training.optimizer.weight_decay == 1e-4


def test_a_base_file_is_found_beside_the_file_that_names_it(write, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write("bases/base.yaml", "base: demo\nname: base\ntraining: {steps: 3, seed: 5}")
    write("runs/child.yaml", "base: ../bases/base.yaml\nname: child\ntraining: {steps: 4}")
    for source in ("runs/child.yaml", str(tmp_path / "runs/child.yaml"), f"file://{tmp_path}/runs/child.yaml"):
        loaded = load_config(source)
        assert (loaded.name, loaded.training.steps, loaded.training.seed) == ("child", 4, 5)
        assert loaded.model == load_config("demo").model


def test_a_base_chain_that_comes_back_to_itself_is_refused(write):
    write("b.yaml", "base: sub/../a.yaml")
    assert "base chain comes back to itself" in message_of(write("a.yaml", "base: b.yaml"))


def test_another_kind_of_quantizer_starts_its_section_afresh_unless_its_keys_are_the_same(write):
    other = load_config("imagenet256-bsq36", ["model.quantizer.codebook_size=64", "model.quantizer.kind=vq"])
    assert other.model.quantizer == config.VQ(kind="vq", codebook_size=64)
    alike = load_config("imagenet256-bsq36", ["model.quantizer.kind=lfq"])
    assert alike.model.quantizer == config.LFQ(kind="lfq", bits=36)
    file = write("a.yaml", "base: imagenet256-bsq36\nname: a\nmodel: {quantizer: {kind: fsq, levels: [8, 5, 5]}}")
    assert load_config(file).model.quantizer.bits == 3 + 3 + 3


def test_another_kind_of_engine_keeps_the_precision():
    loaded = load_config("demo", ["training.engine.precision=fp32", "training.engine.kind=ddp"])
    assert (loaded.training.engine.kind, loaded.training.engine.precision) == ("ddp", "fp32")


@pytest.mark.parametrize("name", preset_names())
def test_a_configuration_written_out_reads_back_the_same(name):
    loaded = load_config(name)
    assert parse_config(dump_config(loaded), "text") == loaded


# Mistakes


@pytest.mark.parametrize(
    ("override", "answer"),
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
        ("training=5", "training: Input should be a valid dictionary or instance of Training"),
        ("training.steps.more=5", "training.steps is a value, not a section"),
        ("data.crop_scale=[2, 1]", "crop_scale [2.0, 1.0] is not a range"),
        ("data.crop_scale=[0.5, 1]", "crop_scale [0.5, 1.0] is not a range"),
        ("model.encoder.heads=7", "width 256 is not a multiple of heads 7"),
        ("model.patch_size=7", "image_size 64 is not a multiple of patch_size 7"),
        ("training.micro_batch_size=5", "batch_size 16 is not a multiple of micro_batch_size 5"),
        ("model.quantizer.bits=129", "model.quantizer.bits: Input should be less than or equal to 128"),
    ],
)
def test_a_wrong_override_is_answered_with_its_key_itself_and_what_is_valid(override, answer):
    message = message_of("demo", ["training.seed=1", override])
    assert answer in message
    assert message.startswith(f"override '{override}'")


@pytest.mark.parametrize("override", ["steps", "=5", "  =5"])
def test_an_override_of_another_form_is_refused(override):
    assert "is not of the form key.path=value" in message_of("demo", [override])


def test_a_wrong_key_in_a_file_is_answered_with_that_file_and_every_mistake_is_listed(write):
    base = write("base.yaml", "base: demo\nmodel: {encodr: {width: 8}}\ntraining: {steps: 0}")
    child = write("child.yaml", "base: base.yaml\nname: child\nloss: {advesarial: {}}")
    lines = message_of(child, ["training.seed=-1"]).splitlines()
    assert f"{base}: unknown key model.encodr; did you mean model.encoder?" in lines
    assert f"{child}: unknown key loss.advesarial; did you mean loss.adversarial?" in lines
    assert any(line.startswith(f"{base}: training.steps") for line in lines)
    assert any(line.startswith("override 'training.seed=-1'") for line in lines)


@pytest.mark.parametrize(
    ("overrides", "answer"),
    [
        (
            ["model.quantizer.entropy.estimate=group", "model.quantizer.entropy.group_size=5"],
            "bits 18 is not a multiple of entropy.group_size 5",
        ),
        (["model.quantizer.kind=vq", "model.quantizer.codebook_size=1000"], "codebook_size 1000 is not a power of two"),
        (["model.quantizer.kind=fsq", "model.quantizer.levels=[8, 1]"], "model.quantizer.levels.1: Input should be gr"),
        (["model.quantizer.kind=fsq", "model.quantizer.bits=8"], "unknown key model.quantizer.bits; valid keys are k"),
        (["loss.adversarial.discriminator=stylegan2-3d"], "stylegan2-3d judges clips; it needs model.frames above 1"),
        (
            ["training.engine.zero_stage=3", "training.micro_batch_size=4"],
            "zero_stage 3 with training.micro_batch_size accumulates wrong gradients",
        ),
    ],
)
def test_values_that_do_not_go_together_are_refused(overrides, answer):
    assert answer in message_of("demo", overrides)


def test_zero_3_goes_together_with_accumulation_without_a_discriminator_and_with_one_without_accumulation():
    load_config("demo", ["training.engine.zero_stage=3"])
    load_config("demo", ["training.engine.zero_stage=3", "training.micro_batch_size=4", "loss.adversarial.weight=0"])
    load_config("demo", ["training.engine.zero_stage=2", "training.micro_batch_size=4"])
    ddp = ["training.engine.zero_stage=3", "training.engine.kind=ddp", "training.micro_batch_size=4"]
    load_config("demo", ddp)


def test_an_unknown_preset_is_answered_with_the_nearest_one():
    assert message_of("imagenet128-bsq8") == ("no preset is called 'imagenet128-bsq8'; did you mean imagenet128-bsq18?")
    assert "presets are demo, demo-video, imagenet128-bsq10" in message_of("xyz")


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("- a\n- b", "expected keys and values, found list"),
        ("", "expected keys and values, found nothing"),
        ("name: [1, 2", "not valid YAML"),
        ("name: a\ntraining: {steps: 1, steps: 2}", "the key steps is given twice"),
        ("name: a\nbase: 7", "base must be the name of a preset or a file, got 7"),
        ("base: demoo", "no preset is called 'demoo'; did you mean demo?"),
        ("training: {steps: 5}", "name: Field required"),
        ("base: missing.yaml", "missing.yaml: it does not exist"),
        ("!!python/object/apply:os.getcwd []", "not valid YAML"),
    ],
)
def test_a_file_that_is_no_configuration_is_refused(write, text, answer):
    assert answer in message_of(write("a.yaml", text))


def test_a_missing_file_is_named():
    assert message_of("/nowhere/a.yaml") == "cannot read /nowhere/a.yaml: it does not exist"


def test_a_checked_configuration_cannot_be_changed():
    loaded = load_config("demo")
    with pytest.raises(ValueError, match="frozen"):
        loaded.training.steps = 5


def test_bits_of_a_token_follow_from_the_quantizer():
    assert config.VQ(kind="vq", codebook_size=1024).bits == 10
    assert config.FSQ(kind="fsq", levels=(8, 6, 5, 2)).bits == 3 + 3 + 3 + 1
    assert {kind for union in get_args(config.Quantizer)[:1] for kind in get_args(union)} == {
        config.BSQ,
        config.LFQ,
        config.FSQ,
        config.VQ,
    }
