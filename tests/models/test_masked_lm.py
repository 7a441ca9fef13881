"""The masked language model: sizes, what a mask hides, what it learns."""

import pytest
import torch

from bsq_ray import Tokenizer, config
from bsq_ray.models.masked_lm import MaskedLM, PostNormBlock, masked_cross_entropy


def small_config(**changes):
    keys = {
        "grid": [1, 2, 3],
        "bits": 6,
        "sub_bits": 3,
        "num_classes": 4,
        "width": 32,
        "layers": 2,
        "heads": 4,
        "dropout": 0,
    }
    return config.MaskedLMModelConfig.model_validate(keys | changes)


def small_model(**changes):
    torch.manual_seed(0)
    return MaskedLM(small_config(**changes)).eval()


def test_masked_lm_parameter_count_matches_paper():
    """The paper's model has 24 blocks of width 768, plus its tables and head."""
    with torch.device("meta"):
        model = MaskedLM(config.load_config("imagenet128-masked-lm").model)
    blocks = sum(p.numel() for p in model.blocks.parameters())
    assert blocks == 24 * (12 * 768**2 + 13 * 768)
    tables = (2 * 513 + 1001 + 257) * 768
    head = 768**2 + 768 * 3 + 2 * 512
    assert sum(p.numel() for p in model.parameters()) == blocks + tables + head + 2 * 768


def test_post_norm_block_output_is_normalized():
    block = PostNormBlock(small_config())
    out_BND = block(torch.randn(3, 7, 32) * 9 + 4)
    torch.testing.assert_close(out_BND.mean(-1), torch.zeros(3, 7), rtol=0, atol=1e-5)
    torch.testing.assert_close(out_BND.std(-1, correction=0), torch.ones(3, 7), rtol=0, atol=1e-3)


@pytest.mark.parametrize("sub_bits", [1, 2, 3, 6])
def test_masked_lm_split_and_join_bits_roundtrip(sub_bits):
    model = small_model(sub_bits=sub_bits)
    bits_BNL = torch.rand(5, 6, 6) < 0.5
    tokens_BNS = model.split_bits(bits_BNL)
    assert tokens_BNS.shape == (5, 6, 6 // sub_bits)
    assert torch.equal(model.join_bits(tokens_BNS), bits_BNL)
    assert model(tokens_BNS, model.class_weights(torch.arange(5) % 4)).shape == (5, 6, 6 // sub_bits, 2**sub_bits)


def test_masked_lm_uneven_sub_bits_raises():
    with pytest.raises(ValueError, match="bits 6 is not a multiple of sub_bits 4"):
        small_config(sub_bits=4)


def test_masked_lm_masked_token_has_no_effect():
    model = small_model()
    classes_BC = model.class_weights(torch.tensor([1]))
    tokens_BNS = torch.randint(0, 8, (1, 6, 2))
    tokens_BNS[0, 2] = model.mask_token
    other_BNS = tokens_BNS.clone()
    assert torch.equal(model(tokens_BNS, classes_BC), model(other_BNS, classes_BC))
    other_BNS[0, 3] = (other_BNS[0, 3] + 1) % 8
    assert not torch.allclose(model(tokens_BNS, classes_BC)[0, 2], model(other_BNS, classes_BC)[0, 2])


def test_masked_lm_embedding_depends_on_sub_token_index():
    model = small_model()
    classes_BC = model.class_weights(torch.tensor([0]))
    first = torch.full((1, 6, 2), model.mask_token)
    second = first.clone()
    first[0, 0, 0], second[0, 0, 1] = 3, 3
    assert not torch.allclose(model(first, classes_BC), model(second, classes_BC))


def test_class_weights_unknown_class_raises():
    with pytest.raises(ValueError, match="classes 0 to 3, not 1 to 5"):
        small_model().class_weights(torch.tensor([1, 5]))
    assert small_model().class_weights(torch.tensor([4]))[0, 4] == 1


def test_masked_cross_entropy_counts_masked_positions_only():
    logits = torch.randn(2, 6, 2, 8)
    tokens = torch.randint(0, 8, (2, 6, 2))
    masked = torch.zeros(2, 6, 2, dtype=torch.bool)
    masked[1, 4, 0] = True
    expected = -logits[1, 4, 0].log_softmax(-1)[tokens[1, 4, 0]]
    assert masked_cross_entropy(logits, tokens, masked, 0.0) == pytest.approx(expected.item(), rel=1e-6)
    assert masked_cross_entropy(logits, tokens, masked, 0.5) != masked_cross_entropy(logits, tokens, masked, 0.0)


def test_masked_lm_save_and_load_roundtrip(tmp_path):
    model = small_model()
    model_id = model.save_pretrained(str(tmp_path / "model"))
    loaded = MaskedLM.from_pretrained(str(tmp_path / "model"))
    assert loaded.model_id == model_id
    tokens_BNS, classes_BC = torch.randint(0, 8, (3, 6, 2)), model.class_weights(torch.tensor([0, 1, 4]))
    assert torch.equal(model(tokens_BNS, classes_BC), loaded(tokens_BNS, classes_BC))
    assert "6 bits, 2 sub-tokens of 3 bits" in (tmp_path / "model" / "README.md").read_text()
    with pytest.raises(ValueError, match="has stage 'masked-lm'; expected stage 'tokenizer'"):
        Tokenizer.from_pretrained(str(tmp_path / "model"))
