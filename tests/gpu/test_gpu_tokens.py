"""Models of tokens on a GPU: a token table made there, training, drawing and step-by-step decoding."""

import pytest
import torch
from PIL import Image
from small_gpu_models import assert_close_to_cpu, small_tokenizer
from small_runs import RecordingReporter

from bsq_ray import Generator, Prior, Tokenizer, config
from bsq_ray.config import load_config
from bsq_ray.data.factory import build_source, resolve_tokenizer
from bsq_ray.data.tokenize import tokenize
from bsq_ray.evaluation.generation.sample import GenerateRequest, generate_files
from bsq_ray.models.masked_lm import MaskedLM
from bsq_ray.training.run_spec import RunSpec
from bsq_ray.training.trainer import run_training
from bsq_ray.training.worker_context import WorkerContext

pytestmark = pytest.mark.gpu
CPU = torch.device("cpu")
STEPS = 6
SMALL = [
    "model.grid=[1,4,4]",
    "model.bits=18",
    "model.sub_bits=9",
    "model.width=64",
    "model.layers=2",
    "model.heads=4",
    "model.dropout=0",
    f"training.steps={STEPS}",
    "training.batch_size=16",
    "training.schedule.warmup_steps=0",
    "training.optimizer.base_learning_rate=0.02",
    "training.optimizer.kind=adamw",
    "training.optimizer.eps=1e-4",
    "training.engine.kind=ddp",
    "training.engine.precision=fp32",
    "training.log_every=1",
    "training.eval_samples=16",
]
STAGES = {"masked-lm-demo": ["model.num_classes=1", "sampling.steps=3"], "prior-demo": []}


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory):
    folder = str(tmp_path_factory.mktemp("tokenizer"))
    small_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def tokens(tokenizer_folder, photo_shards, tmp_path_factory):
    """URL of a token table; made on the GPU, since there is one."""
    url = str(tmp_path_factory.mktemp("tokens"))
    tokenize(tokenizer_folder, photo_shards, url, num_workers=0, num_crops=2)
    return url


def train(device, preset, tokens, out, overrides=(), last=None):
    """The records of the steps."""
    listener = RecordingReporter(last)
    run_config = resolve_tokenizer(load_config(preset, [*SMALL, *STAGES[preset], *overrides]), tokens)
    run_training(RunSpec(run_config, tokens, str(out)), WorkerContext(0, 1, device, "local", listener))
    return listener.training_records


def assert_same_losses(actual, expected, tolerance):
    losses = [[record["loss"] for record in records] for records in (actual, expected)]
    assert losses[0] == pytest.approx(losses[1], rel=tolerance)


def test_tokenize_on_gpu_matches_cpu(tokens, tokenizer_folder, photo_shards, tmp_path):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: False)
        tokenize(tokenizer_folder, photo_shards, str(tmp_path), num_workers=0, num_crops=2)
    tables = []
    for url in (tokens, str(tmp_path)):
        source = build_source(resolve_tokenizer(load_config("prior-demo", SMALL), url), url)
        samples = source.read_eval(range(source.num_samples))
        tables.append((samples.keys, samples.values_P))
    assert tables[0][0] == tables[1][0]
    flipped_fraction = (tables[0][1] != tables[1][1]).mean()
    assert flipped_fraction < 1e-3, "bytes with a bit within rounding of zero"


@pytest.mark.parametrize("preset", STAGES)
def test_token_stage_steps_match_cpu(preset, gpu, tokens, tmp_path):
    actual = train(gpu, preset, tokens, tmp_path / "gpu")
    assert_same_losses(actual, train(CPU, preset, tokens, tmp_path / "cpu"), 1e-3)
    assert actual[-1]["loss"] < actual[0]["loss"]


@pytest.mark.parametrize("preset", STAGES)
def test_token_stage_bf16_deepspeed_is_close_to_fp32(preset, gpu, tokens, tmp_path):
    half = ["training.engine.kind=deepspeed", "training.engine.precision=bf16"]
    actual = train(gpu, preset, tokens, tmp_path / "half", half)
    assert_same_losses(actual, train(gpu, preset, tokens, tmp_path / "whole"), 0.02)


def test_resume_restores_gpu_rng_for_dropout(gpu, tokens, tmp_path):
    dropout = ["model.dropout=0.5"]
    whole = train(gpu, "masked-lm-demo", tokens, tmp_path / "whole", dropout)
    stopped = train(gpu, "masked-lm-demo", tokens, tmp_path / "stopped", dropout, last=STEPS // 2)
    torch.manual_seed(1234)
    continued = train(gpu, "masked-lm-demo", tokens, tmp_path / "stopped", dropout)
    assert_same_losses(stopped + continued, whole, 1e-5)


def small_generator(device, folder):
    torch.manual_seed(0)
    model_config = config.MaskedLMModelConfig(
        grid=(1, 4, 4), bits=18, sub_bits=9, num_classes=3, width=64, layers=2, heads=4
    )
    MaskedLM(model_config).save_pretrained(str(folder))
    small_tokenizer().save_pretrained(f"{folder}/tokenizer")
    return Generator.from_pretrained(str(folder), device=str(device))


def test_generate_on_gpu_same_seed_gives_same_images(gpu, tmp_path):
    generator = small_generator(gpu, tmp_path)
    settings = {"steps": 6, "guidance_scale": 1.0, "temperature": 4.0}
    images = generator.generate([0, 1, 2], seed=5, **settings)
    assert images.device.type == gpu.type
    assert torch.equal(images, generator.generate([0, 1, 2], seed=5, **settings))
    assert not torch.equal(images, generator.generate([0, 1, 2], seed=6, **settings))
    assert torch.equal(images, list(generator.iter_steps([0, 1, 2], seed=5, **settings))[-1])


def test_inpaint_accepts_cpu_images_on_gpu_model(gpu, tmp_path):
    generator = small_generator(gpu, tmp_path)
    mask = torch.zeros(1, 1, 32, 32)
    mask[..., :8, :8] = 1
    filled = generator.inpaint(torch.zeros(1, 3, 32, 32), mask, [0], steps=2)
    assert filled.device.type == gpu.type
    reconstruction = generator.tokenizer.decode(generator.tokenizer.encode(torch.zeros(1, 3, 32, 32, device=gpu)))
    assert not torch.equal(filled, reconstruction)


def test_generate_and_inpaint_on_gpu_write_files(gpu, photos, tmp_path):
    small_generator(gpu, tmp_path / "model")
    photos[0].resize((48, 32)).save(tmp_path / "photo.png")
    Image.new("RGB", (48, 32), "white").save(tmp_path / "mask.png")
    inpaint_inputs = {"image": str(tmp_path / "photo.png"), "mask": str(tmp_path / "mask.png")}
    for name, more in (("generated", {}), ("between", {"between": True}), ("filled", inpaint_inputs)):
        request = GenerateRequest(classes=[0, 2], count=2, sampling={"steps": 2}, **more)
        count = generate_files(str(tmp_path / "model"), str(tmp_path / name), request)
        assert count == len(list((tmp_path / name).glob("class*"))) > 0


def test_incremental_decoder_on_gpu_matches_cpu_logits(gpu):
    """Step-by-step decoding on a GPU matches the parallel pass and the CPU within the codec's tolerance."""
    torch.manual_seed(0)
    model_config = config.PriorModelConfig(grid=(4, 8, 8), bits=18, sub_bits=9, width=64, layers=3, heads=4, dropout=0)
    prior = Prior(model_config).eval()
    with torch.no_grad():
        for tree in prior.trees:
            tree.weight.mul_(20)
        sub_tokens_BNS = torch.randint(0, 512, (2, 256, 2))
        expected = prior(sub_tokens_BNS)
        assert expected.std() > 0.5
        prior, sub_tokens_BNS = prior.to(gpu), sub_tokens_BNS.to(gpu)
        assert_close_to_cpu(prior(sub_tokens_BNS), expected, 1e-4, "parallel pass")
        decoder, steps = prior.start_decoding(2), []
        for n in range(model_config.tokens):
            h_B1D = decoder.next_features()
            steps.append(torch.cat([prior.node_logits(h_B1D, sub_tokens_BNS[:, n : n + 1, :s]) for s in range(2)], 1))
            decoder.push(sub_tokens_BNS[:, n])
    # The largest difference that compressed files allow for.
    assert (torch.stack(steps, 1).cpu() - expected).abs().max() < 2**-14


def test_model_folder_saved_on_gpu_loads_on_cpu(gpu, photos, tmp_path):
    tokenizer = small_tokenizer().to(gpu)
    tokenizer.save_pretrained(str(tmp_path))
    loaded = Tokenizer.from_pretrained(str(tmp_path))
    assert all(torch.equal(value.cpu(), loaded.state_dict()[name]) for name, value in tokenizer.state_dict().items())
