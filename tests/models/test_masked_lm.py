"""The masked language model: sizes, what a mask hides, what it learns."""

import pytest
import torch

from bsq_ray import Tokenizer, config
from bsq_ray.models.masked_lm import MaskedLM, PostNormBlock, masked_cross_entropy


def small_section(**changes):
    keys = {
        "grid": [1, 2, 3],
        "bits": 6,
        "sub_bits": 3,
        "classes": 4,
        "width": 32,
        "layers": 2,
        "heads": 4,
        "dropout": 0,
    }
    return config.MaskedLMModel.model_validate(keys | changes)


def small_model(**changes):
    torch.manual_seed(0)
    return MaskedLM(small_section(**changes)).eval()


def test_the_papers_model_has_the_parameters_of_24_blocks_of_width_768():
    with torch.device("meta"):
        model = MaskedLM(config.load_config("imagenet128-masked-lm").model)
    blocks = sum(p.numel() for p in model.blocks.parameters())
    assert blocks == 24 * (12 * 768**2 + 13 * 768)
    tables = (2 * 513 + 1001 + 257) * 768
    head = 768**2 + 768 * 3 + 2 * 512
    assert sum(p.numel() for p in model.parameters()) == blocks + tables + head + 2 * 768


def test_blocks_normalise_after_adding():
    block = PostNormBlock(small_section())
    out_BND = block(torch.randn(3, 7, 32) * 9 + 4)
    torch.testing.assert_close(out_BND.mean(-1), torch.zeros(3, 7), rtol=0, atol=1e-5)
    torch.testing.assert_close(out_BND.std(-1, correction=0), torch.ones(3, 7), rtol=0, atol=1e-3)


@pytest.mark.parametrize("sub_bits", [1, 2, 3, 6])
def test_sub_tokens_of_any_even_split_go_there_and_back(sub_bits):
    model = small_model(sub_bits=sub_bits)
    bits_BNL = torch.rand(5, 6, 6) < 0.5
    tokens_BNS = model.split(bits_BNL)
    assert tokens_BNS.shape == (5, 6, 6 // sub_bits)
    assert torch.equal(model.join(tokens_BNS), bits_BNL)
    assert model(tokens_BNS, model.classes_of(torch.arange(5) % 4)).shape == (5, 6, 6 // sub_bits, 2**sub_bits)


def test_an_uneven_split_is_refused():
    with pytest.raises(ValueError, match="bits 6 is not a multiple of sub_bits 4"):
        small_section(sub_bits=4)


def test_a_masked_token_is_not_seen():
    model = small_model()
    classes_BC = model.classes_of(torch.tensor([1]))
    tokens_BNS = torch.randint(0, 8, (1, 6, 2))
    tokens_BNS[0, 2] = model.mask
    other_BNS = tokens_BNS.clone()
    assert torch.equal(model(tokens_BNS, classes_BC), model(other_BNS, classes_BC))
    other_BNS[0, 3] = (other_BNS[0, 3] + 1) % 8
    assert not torch.allclose(model(tokens_BNS, classes_BC)[0, 2], model(other_BNS, classes_BC)[0, 2])


def test_the_same_value_in_another_sub_token_is_another_symbol():
    model = small_model()
    classes_BC = model.classes_of(torch.tensor([0]))
    first = torch.full((1, 6, 2), model.mask)
    second = first.clone()
    first[0, 0, 0], second[0, 0, 1] = 3, 3
    assert not torch.allclose(model(first, classes_BC), model(second, classes_BC))


def test_classes_that_do_not_exist_are_refused():
    with pytest.raises(ValueError, match="classes 0 to 3, not 1 to 5"):
        small_model().classes_of(torch.tensor([1, 5]))
    assert small_model().classes_of(torch.tensor([4]))[0, 4] == 1


def test_only_masked_places_count():
    logits = torch.randn(2, 6, 2, 8)
    tokens = torch.randint(0, 8, (2, 6, 2))
    masked = torch.zeros(2, 6, 2, dtype=torch.bool)
    masked[1, 4, 0] = True
    expected = -logits[1, 4, 0].log_softmax(-1)[tokens[1, 4, 0]]
    assert masked_cross_entropy(logits, tokens, masked, 0.0) == pytest.approx(expected.item(), rel=1e-6)
    assert masked_cross_entropy(logits, tokens, masked, 0.5) != masked_cross_entropy(logits, tokens, masked, 0.0)


def test_a_model_folder_gives_the_same_model_back(tmp_path):
    model = small_model()
    identity = model.save_pretrained(str(tmp_path / "model"))
    again = MaskedLM.from_pretrained(str(tmp_path / "model"))
    assert again.model_id == identity
    tokens_BNS, classes_BC = torch.randint(0, 8, (3, 6, 2)), model.classes_of(torch.tensor([0, 1, 4]))
    assert torch.equal(model(tokens_BNS, classes_BC), again(tokens_BNS, classes_BC))
    assert "6 bits, as 2 symbols of 3 bits" in (tmp_path / "model" / "README.md").read_text()
    with pytest.raises(ValueError, match="is of the stage masked-lm; what is wanted here is a tokenizer"):
        Tokenizer.from_pretrained(str(tmp_path / "model"))
