"""training.only=decoder: the decoder learns further, and every token stays what it was."""

import re
import shutil

import numpy as np
import pytest
import safetensors.numpy
import torch
from process_group import spawn_group
from small_runs import PRESET, SMALL, STEPS, RecordingReporter, local_worker, small_spec, train_runs
from test_engine import ENGINES, assert_same_run
from test_resume import assert_identical, assert_same_losses, comparable_values, load_weights

from bsq_ray import Tokenizer
from bsq_ray.config import load_config
from bsq_ray.data.image_source import ImageSource
from bsq_ray.data.manifest import read_manifest
from bsq_ray.data.transforms import to_float
from bsq_ray.model_folder import load_model_folder
from bsq_ray.training.launch import train
from bsq_ray.training.stages import build_stage
from bsq_ray.training.trainer import Trainer, run_training

ONLY = "training.only=decoder"
DECODER = ("decoder.", "from_code.")
HALF = STEPS // 2
# Bit noise is a function of seed and step, so it must not change what resumed runs and other engines do.
NOISE = ["training.bit_noise.images=0.5", "training.bit_noise.rate=0.4", "training.bit_noise.until=1"]
RUNS = {name: [*overrides, ONLY, *NOISE] for name, overrides in ENGINES.items()}
FAST = ("ddp", "zero 1", "zero 3")
EVERY_ENGINE = [pytest.param(name, marks=() if name in FAST else pytest.mark.slow) for name in ENGINES]


@pytest.fixture(scope="module", autouse=True)
def _restore_linear():
    """Restore `F.linear`, which ZeRO-3 replaces for the rest of the process."""
    linear = torch.nn.functional.linear
    yield
    torch.nn.functional.linear = linear


@pytest.fixture(scope="module")
def base(photo_shards, tmp_path_factory):
    """Model folder of a run with a GAN, with its discriminator."""
    out = tmp_path_factory.mktemp("base")
    run_training(small_spec(photo_shards, out, ENGINES["ddp"]), local_worker(RecordingReporter()))
    return f"{out}/model"


@pytest.fixture(scope="module")
def runs(base, photo_shards, tmp_path_factory):
    """(folder, losses by name): decoders trained by two workers, of which some were stopped and resumed."""
    out = str(tmp_path_factory.mktemp("decoders"))
    stopped = {f"{name} resumed": RUNS[name] for name in FAST}
    [losses, _] = spawn_group(2, train_runs, photo_shards, out, RUNS | stopped, dict.fromkeys(stopped, HALF), base)
    for name in FAST:
        shutil.copytree(f"{out}/{name} resumed", f"{out}/{name} alone")
    [resumed, _] = spawn_group(2, train_runs, photo_shards, out, stopped, None, base)
    alone = train_runs(0, 1, photo_shards, out, {f"{name} alone": RUNS[name] for name in FAST}, None, base)
    for name in stopped:
        losses[name] = losses[name] + resumed[name]
    return out, losses | alone


@pytest.mark.parametrize("engine", [param for param in EVERY_ENGINE if param.values != ("ddp",)])
def test_decoder_steps_of_deepspeed_match_ddp(runs, engine):
    assert_same_run(*runs, "ddp", engine)


@pytest.mark.parametrize("engine", EVERY_ENGINE)
def test_decoder_training_changes_decoder_alone(runs, base, engine):
    """Encoder, projection and quantizer keep every bit, in raw and in averaged weights; weight decay included."""
    before = safetensors.numpy.load_file(f"{base}/model.safetensors")
    for which in ("model", "model.plain"):
        after = safetensors.numpy.load_file(f"{runs[0]}/{engine}/model/{which}.safetensors")
        changed = {key for key in before if not np.array_equal(before[key], after[key])}
        assert changed == {key for key in before if key.startswith(DECODER)}


@pytest.mark.parametrize("engine", FAST)
def test_resumed_decoder_training_is_bit_identical(runs, engine):
    out, losses = runs
    resumed, expected = ([comparable_values(r) for r in losses[name]] for name in (f"{engine} resumed", engine))
    assert resumed == expected
    assert_identical(load_weights(out, f"{engine} resumed"), load_weights(out, engine))


@pytest.mark.parametrize("engine", FAST)
def test_decoder_training_resumes_on_other_world_size(runs, engine):
    """One worker continues what two workers began, with the same losses and the frozen weights."""
    out, losses = runs
    assert_same_losses(losses[f"{engine} alone"], losses[engine][HALF:], 1e-5)
    weights, expected = (load_weights(out, name)["model.safetensors"] for name in (f"{engine} alone", engine))
    for key in expected:
        np.testing.assert_allclose(weights[key], expected[key], atol=1e-5, err_msg=key)


def test_decoder_training_keeps_bits_of_1000_crops(runs, base, photo_shards):
    """Tokens of random crops of the sample photos are those of the first model; pixels are not."""
    before, after = (Tokenizer.from_pretrained(url) for url in (base, f"{runs[0]}/ddp/model"))
    source = ImageSource(read_manifest(photo_shards), load_config(PRESET, SMALL).data, 16)
    samples = np.arange(1000)
    images = to_float(torch.from_numpy(source.read(samples % source.num_samples, samples, 0).values_P))
    tokens = before.encode(images)
    assert len(tokens.bits_BNL.unique(dim=0)) > 900
    assert torch.equal(after.encode(images).bits_BNL, tokens.bits_BNL)
    assert not torch.equal(after.decode(tokens), before.decode(tokens))


def test_decoder_training_has_no_state_of_frozen_parts(base, photo_shards, tmp_path):
    """Frozen parts have no gradients, no optimizer state and no average, and stay in evaluation mode."""
    spec = small_spec(photo_shards, tmp_path, [*RUNS["ddp"], "training.steps=1"], init_url=base)
    trainer = Trainer(spec, local_worker(RecordingReporter()))
    trainer.train()
    tokenizer = trainer.stage.modules["generator"]
    frozen = [tokenizer.encoder, tokenizer.to_code, tokenizer.quantizer]
    assert not any(part.training for module in frozen for part in module.modules())
    assert tokenizer.decoder.training
    assert not any(parameter.requires_grad for module in frozen for parameter in module.parameters())
    [optimizer] = trainer.engines["generator"].optimizers.values()
    num_trained = sum(value.numel() for name, value in tokenizer.named_parameters() if name.startswith(DECODER))
    moments = [value for state in optimizer.state.values() for value in state.values() if value.ndim]
    assert sum(value.numel() for value in moments) == 2 * num_trained
    assert all(name.startswith(DECODER) for name in trainer.ema.average)


def test_init_loads_discriminator_of_the_model(base, photo_shards):
    """Fine-tuning continues with the discriminator that the model was trained with."""
    run_config = load_config(PRESET, [*SMALL, ONLY])
    stage = build_stage(run_config, None, torch.device("cpu"), base)
    expected = safetensors.numpy.load_file(f"{base}/discriminator.safetensors")
    for key, value in stage.modules["discriminator"].state_dict().items():
        assert np.array_equal(value.numpy(), expected[key]), key
    assert not stage.notes


@pytest.mark.parametrize(
    ("overrides", "removes", "note"),
    [
        (["loss.adversarial.channel_max=16"], False, "the discriminator in .* has another architecture, so a new one"),
        ([], True, "contains no discriminator, so a new one is trained"),
    ],
)
def test_init_without_fitting_discriminator_is_reported(base, photo_shards, tmp_path, overrides, removes, note):
    url = shutil.copytree(base, tmp_path / "model")
    if removes:
        (url / "discriminator.safetensors").unlink()
    reporter = RecordingReporter()
    spec = small_spec(
        photo_shards, tmp_path / "run", [*ENGINES["ddp"], "training.steps=1", *overrides], init_url=str(url)
    )
    run_training(spec, local_worker(reporter))
    [warning] = [record["text"] for record in reporter.records if record["kind"] == "warning"]
    assert re.search(note, warning)


def decoder_run(*overrides):
    return load_config(PRESET, [*SMALL, *ENGINES["ddp"], ONLY, "training.steps=2", *overrides])


def test_decoder_run_publishes_ids_of_kept_tokens(base, photo_shards, tmp_path):
    """A model trained twice lists both earlier models, newest first, and has their tokens_id."""
    urls = [base]
    for name in ("first", "second"):
        train(decoder_run(), photo_shards, str(tmp_path / name), 0, init_url=urls[0], on_record=lambda _: None)
        urls.insert(0, str(tmp_path / name / "model"))
    second, first, original = (load_model_folder(url) for url in urls)
    assert second.tokens_id == first.tokens_id == original.tokens_id
    assert len({folder.model_id for folder in (second, first, original)}) == 3
    assert original.same_tokens == ()
    assert first.same_tokens == (original.model_id,)
    assert second.same_tokens == (first.model_id, original.model_id)
    assert load_model_folder(urls[0], "raw").same_tokens == second.same_tokens


def test_other_init_on_resume_is_not_recorded_as_kept(base, photo_shards, tmp_path):
    """A model whose tokens differ from those of --init does not list it."""
    other = Tokenizer(load_config(PRESET, SMALL).model)
    other.save_pretrained(str(tmp_path / "other"))
    out = str(tmp_path / "run")
    train(decoder_run(), photo_shards, out, 0, init_url=base, on_record=lambda _: None)
    train(
        decoder_run("training.steps=3"), photo_shards, out, 0,
        init_url=str(tmp_path / "other"), resume=True, on_record=lambda _: None,
    )  # fmt: skip
    folder = load_model_folder(f"{out}/model")
    assert folder.tokens_id == load_model_folder(base).tokens_id
    assert folder.same_tokens == ()


@pytest.mark.parametrize(
    ("overrides", "has_init", "message"),
    [
        ([], False, "keeps the tokens of a trained model; name its folder with --init"),
        (["model.image_size=32"], True, "model.image_size, model.frames or model.causal differs from that model"),
    ],
)
def test_decoder_run_that_cannot_keep_tokens_raises(base, photo_shards, tmp_path, overrides, has_init, message):
    with pytest.raises(ValueError, match=message):
        train(decoder_run(*overrides), photo_shards, str(tmp_path), 0, init_url=base if has_init else None)


def test_decoder_run_does_not_resume_as_full_run(base, photo_shards, tmp_path):
    out = str(tmp_path)
    train(decoder_run(), photo_shards, out, 0, init_url=base, on_record=lambda _: None)
    with pytest.raises(ValueError, match="training.only was 'decoder' and is None"):
        train(decoder_run("training.only=null"), photo_shards, out, 0, resume=True)
