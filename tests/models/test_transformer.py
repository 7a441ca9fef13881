"""The transformer body: masking, checkpointing, compiling."""

import torch

from bsq_ray import config
from bsq_ray.models.transformer import VisionTransformer, block_causal_mask


def small_transformer(frames=1, causal=True, gradient_checkpointing=False):
    torch.manual_seed(0)
    sizes = config.Transformer(width=32, layers=2, heads=4)
    return VisionTransformer(sizes, 4, frames, causal, gradient_checkpointing)


def test_block_causal_mask_lets_a_frame_see_itself_and_the_past():
    mask = block_causal_mask(3, 2, torch.device("cpu"))
    assert mask.dtype == torch.bool
    assert mask.int().tolist() == [
        [1, 1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0],
        [1, 1, 1, 1, 0, 0],
        [1, 1, 1, 1, 0, 0],
        [1, 1, 1, 1, 1, 1],
        [1, 1, 1, 1, 1, 1],
    ]


def test_changing_a_frame_changes_no_earlier_frame_when_causal_and_all_of_them_when_not():
    x = torch.randn(2, 12, 32)
    changed = x.clone()
    changed[:, 4:8] = torch.randn(2, 4, 32)
    causal, free = small_transformer(3), small_transformer(3, causal=False)
    assert torch.equal(causal(x)[:, :4], causal(changed)[:, :4])
    assert not torch.equal(causal(x)[:, 8:], causal(changed)[:, 8:])
    assert not torch.equal(free(x)[:, :4], free(changed)[:, :4])


def test_a_shorter_clip_gives_the_first_frames_of_a_longer_one_when_causal():
    transformer = small_transformer(3)
    x = torch.randn(2, 12, 32)
    torch.testing.assert_close(transformer(x[:, :4]), transformer(x)[:, :4])


def test_temporal_positions_start_at_zero_so_that_equal_frames_of_a_new_model_look_equal():
    transformer = small_transformer(3, causal=False)
    x = torch.randn(1, 4, 32).repeat(1, 3, 1)
    frames = transformer(x).unflatten(1, (3, 4))
    torch.testing.assert_close(frames[:, 0], frames[:, 2])
    assert transformer.temporal_position.abs().max() == 0
    assert small_transformer().temporal_position is None


def test_gradient_checkpointing_changes_neither_values_nor_gradients_and_keeps_less_memory():
    x = torch.randn(2, 12, 32)
    kept = {}
    gradients = {}
    for checkpointing in (False, True):
        transformer = small_transformer(3, gradient_checkpointing=checkpointing)
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, s=sizes: (s.append(t.numel()), t)[1], lambda t: t):
            y = transformer(x)
        kept[checkpointing] = sum(sizes)
        y.square().mean().backward()
        gradients[checkpointing] = [p.grad for p in transformer.parameters()]
    for plain, recomputed in zip(gradients[False], gradients[True], strict=True):
        torch.testing.assert_close(plain, recomputed)
    assert kept[True] < 0.2 * kept[False]
