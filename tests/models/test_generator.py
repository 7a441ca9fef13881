"""Classes to images: reproducible, inpainting leaves the rest alone, steps become the image."""

import pytest
import torch
from pydantic import ValidationError
from small_models import retrain_decoder
from test_masked_lm import small_model
from test_tokenizer import small_tokenizer

from bsq_ray import Generator, Tokenizer, config


def small_generator(tmp_path):
    small_model(grid=[1, 4, 4], bits=10, sub_bits=5).save_pretrained(str(tmp_path / "model"))
    small_tokenizer().save_pretrained(str(tmp_path / "model" / "tokenizer"))
    return Generator.from_pretrained(str(tmp_path / "model"))


@pytest.fixture
def generator(tmp_path):
    return small_generator(tmp_path)


def test_generate_from_labels_returns_reproducible_images(generator):
    images = generator.generate([0, 3, 4], seed=1, steps=3)
    assert images.shape == (3, 3, 32, 32)
    assert torch.equal(images[1:2], generator.generate([3], seed=1, first_index=1, steps=3))
    with pytest.raises(ValueError, match="classes 0 to 3"):
        generator.generate([9])
    with pytest.raises(ValidationError, match="steps"):
        generator.generate([0], steps=0)


def test_iter_steps_last_step_equals_generate(generator):
    *earlier_steps, last = generator.iter_steps([1], seed=2, steps=4)
    assert len(earlier_steps) == 3
    assert torch.equal(last, generator.generate([1], seed=2, steps=4))
    assert (earlier_steps[0] == 0).float().mean() > (earlier_steps[2] == 0).float().mean() > 0


def test_inpaint_changes_only_masked_patches(generator):
    images = generator.generate([0], seed=3)
    mask = torch.zeros(1, 1, 32, 32)
    mask[..., 8:17, 0:3] = 1
    filled = generator.inpaint(images, mask, [2], seed=4)
    assert filled.shape == images.shape
    assert torch.equal(generator.inpaint(images, torch.zeros_like(mask), [2]), generator.tokenizer.reconstruct(images))
    assert not torch.equal(filled, generator.tokenizer.reconstruct(images))


def test_interpolate_endpoints_equal_generate(generator):
    """The first and last image of an interpolation are the images generated for the two classes."""
    images = generator.interpolate([0, 3], 3, seed=5)
    assert torch.equal(images[0], generator.generate([0], seed=5)[0])
    assert torch.equal(images[2], generator.generate([3], seed=5)[0])


def test_generator_wrong_tokenizer_in_folder_raises(tmp_path):
    tokenizer_id = small_tokenizer().save_pretrained(str(tmp_path / "model" / "tokenizer"))
    small_model(grid=[1, 4, 4], bits=10, sub_bits=5, tokenizer=tokenizer_id).save_pretrained(str(tmp_path / "model"))
    assert Generator.from_pretrained(str(tmp_path / "model")).tokenizer.model_id == tokenizer_id
    torch.manual_seed(9)
    Tokenizer(small_tokenizer().config).save_pretrained(str(tmp_path / "model" / "tokenizer"))
    with pytest.raises(ValueError, match=f"was trained on tokens of {tokenizer_id[:12]}"):
        Generator.from_pretrained(str(tmp_path / "model"))


def test_generator_samples_with_new_decoder_of_its_tokens(tmp_path):
    """A tokenizer whose decoder was trained further replaces the first one: same tokens, other pixels."""
    url = str(tmp_path / "model")
    small_tokenizer().save_pretrained(f"{url}/tokenizer")
    first = Tokenizer.from_pretrained(f"{url}/tokenizer")
    ids = {"tokenizer": first.model_id, "tokens_id": first.tokens_id}
    small_model(grid=[1, 4, 4], bits=10, sub_bits=5, **ids).save_pretrained(url)
    images = Generator.from_pretrained(url).generate([0, 3], seed=1)
    retrain_decoder(f"{url}/tokenizer", f"{url}/tokenizer")
    again = Generator.from_pretrained(url)
    assert again.tokenizer.model_id != first.model_id
    bits_BNL = again.tokenizer.encode(images).bits_BNL
    assert torch.equal(bits_BNL, first.encode(images).bits_BNL)
    assert not torch.equal(again.generate([0, 3], seed=1), images)
    torch.manual_seed(9)
    Tokenizer(small_tokenizer().config).save_pretrained(f"{url}/tokenizer")
    with pytest.raises(ValueError, match="put that tokenizer there, or one whose decoder alone was trained further"):
        Generator.from_pretrained(url)


def test_generator_without_tokens_id_needs_its_tokenizer(tmp_path):
    """Models of earlier versions know the id of the whole tokenizer only."""
    url = str(tmp_path / "model")
    tokenizer_id = small_tokenizer().save_pretrained(f"{url}/tokenizer")
    small_model(grid=[1, 4, 4], bits=10, sub_bits=5, tokenizer=tokenizer_id).save_pretrained(url)
    retrain_decoder(f"{url}/tokenizer", f"{url}/tokenizer")
    with pytest.raises(ValueError, match=f"was trained on tokens of {tokenizer_id[:12]}"):
        Generator.from_pretrained(url)


def test_generator_from_tokenizer_folder_raises(tmp_path):
    small_tokenizer().save_pretrained(str(tmp_path))
    with pytest.raises(ValueError, match="has stage 'tokenizer'; expected stage 'masked-lm'"):
        Generator.from_pretrained(str(tmp_path))
    assert config.MaskedLMConfig(name="x").sampling.steps == 12
