"""Token models: formulas against the parameters, operations and saved bytes of PyTorch."""

import pytest
import torch
from test_flops import FlopCounter
from test_memory import autocast, saved_tensor_bytes
from torch.nn.attention import SDPBackend, sdpa_kernel

from bsq_ray.config import load_config, preset_names
from bsq_ray.models.masked_lm import MaskedLM, masked_cross_entropy
from bsq_ray.models.prior import Prior, code_length
from bsq_ray.planning.token_costs import (
    num_token_model_parameters,
    token_model_activation_bytes,
    token_model_forward_flops,
    token_model_step_flops,
)

PRESETS = [name for name in preset_names() if load_config(name).stage != "tokenizer"]
SMALL = ["masked-lm-demo", "prior-demo", "prior-demo-nested"]
SAMPLES = 4


def build(run):
    return (MaskedLM if run.stage == "masked-lm" else Prior)(run.model)


def training_loss(run, model, sub_tokens_BNS):
    """Return the training loss; for the masked model with the mean fraction of masked tokens."""
    if run.stage == "prior":
        return code_length(model(sub_tokens_BNS), sub_tokens_BNS, run.model.sub_bits).sum(2).mean()
    count = round(run.model.num_tokens * 2 / torch.pi)
    masked_BNS = (torch.arange(run.model.num_tokens) < count)[None, :, None].expand_as(sub_tokens_BNS)
    classes_BC = model.class_weights(torch.arange(len(sub_tokens_BNS)))
    logits_BNSV = model(sub_tokens_BNS.masked_fill(masked_BNS, model.mask_token), classes_BC)
    return masked_cross_entropy(logits_BNSV, sub_tokens_BNS, masked_BNS, run.loss.label_smoothing)


def random_tokens(run, samples=SAMPLES):
    return torch.randint(0, 2**run.model.sub_bits, (samples, run.model.num_tokens, run.model.num_sub_tokens))


@pytest.mark.parametrize("overrides", [[], ["model.sub_bits=6", "model.mlp_ratio=2.5"], ["model.sub_bits=18"]])
@pytest.mark.parametrize("name", PRESETS)
def test_token_model_parameter_counts_are_exact(name, overrides):
    overrides = ["model.bits=14", "model.sub_bits=14"] if overrides == ["model.sub_bits=18"] else overrides
    run = load_config(name, overrides)
    with torch.device("meta"):
        assert num_token_model_parameters(run.model) == sum(value.numel() for value in build(run).parameters())


@pytest.mark.parametrize("name", SMALL)
def test_token_model_flops_are_exact(name):
    run = load_config(name)
    model, sub_tokens_BNS = build(run), random_tokens(run)
    # On CPUs the operations of fused attention are not registered.
    with sdpa_kernel(SDPBackend.MATH):
        with FlopCounter() as counter, torch.no_grad():
            training_loss(run, model, sub_tokens_BNS)
        assert token_model_forward_flops(run.model) * SAMPLES == counter.total
        with FlopCounter() as counter:
            training_loss(run, model, sub_tokens_BNS).backward()
        assert token_model_step_flops(run.model) * SAMPLES == pytest.approx(counter.total, rel=0.02)


@pytest.mark.parametrize("half", [True, False])
@pytest.mark.parametrize("overrides", [[], ["model.sub_bits=6", "model.grid=[1,16,16]", "model.layers=2"]])
@pytest.mark.parametrize("name", SMALL)
def test_token_model_bytes_within_five_percent(name, overrides, half, fused_attention):
    """The formula is within five percent of the bytes that PyTorch saves for the backward pass."""
    run = load_config(name, ["model.dropout=0", *overrides])
    model, sub_tokens_BNS = build(run), random_tokens(run)

    def forward():
        with autocast(half):
            return training_loss(run, model, sub_tokens_BNS)

    # Autocast copies only the table that computes the logits.
    tables = () if run.stage == "masked-lm" else ("embedding", "earlier")
    cast = sum(value.numel() for name, value in model.named_parameters() if name.split(".")[0] not in tables)
    saved_bytes = saved_tensor_bytes(forward, model, 2 * cast if half else 0) / SAMPLES
    # The input of the head's norm has half precision on CPUs and fp32 on GPUs.
    heads = 1 if run.stage == "masked-lm" else run.model.num_sub_tokens
    saved_bytes += 2 * half * heads * run.model.num_tokens * run.model.width
    assert token_model_activation_bytes(run.model, half) == pytest.approx(saved_bytes, rel=0.05)
