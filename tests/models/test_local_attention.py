"""Rotary positions and attention to nearby tokens, against one attention over all pairs with explicit rotations.

Shape suffixes: B images or clips, H heads, N tokens, E width of a head.
"""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bsq_ray.models.layers.attention import attention
from bsq_ray.models.layers.local_attention import RotaryPositions, local_attention, rotate

HEADS, HEAD_DIM = 2, 8
CPU = torch.device("cpu")


def reference(q_BHNE, k_BHNE, v_BHNE, grid, radius, frames=1, causal=False):
    """Attention over all pairs in fp64; complex numbers rotate."""
    axes = torch.cartesian_prod(*(torch.arange(length) for length in (frames, *grid))).double()
    times, positions = axes[:, 0], axes[:, 1:]
    frequency = 100.0 ** (-torch.arange(HEAD_DIM // 4, dtype=torch.float64) / (HEAD_DIM // 4))
    assert HEAD_DIM == 8, "two frequencies: the second one of rows and of columns turns with time"
    time_frequency = torch.tensor([[0, 1], [0, 0.1]], dtype=torch.float64)
    angles = positions[..., None] * frequency + times[:, None, None] * time_frequency
    turns = torch.polar(torch.ones_like(angles), angles)

    def turn(x):
        pairs = x.unflatten(-1, (2, 2, -1))  # row or column, real or imaginary, frequency
        turned = torch.complex(pairs[..., 0, :], pairs[..., 1, :]) * turns
        return torch.stack([turned.real, turned.imag], -2).flatten(-3)

    scores = turn(q_BHNE) @ turn(k_BHNE).transpose(-1, -2) * HEAD_DIM**-0.5
    distance = (positions[:, None] - positions).abs().amax(-1)
    if radius is not None:
        scores = scores.masked_fill(distance > radius, -torch.inf)
    if causal:
        scores = scores.masked_fill(times > times[:, None], -torch.inf)
    return (scores.softmax(-1) @ v_BHNE).transpose(1, 2)


def random_qkv(grid, batch_size=2, seed=0, frames=1):
    generator = torch.Generator().manual_seed(seed)
    shape = 3, batch_size, HEADS, frames * grid[0] * grid[1], HEAD_DIM
    return torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()


def geometry(grid, radius, dtype=torch.float64, frames=1):
    return RotaryPositions(radius, 1, frames).neighborhood(grid, range(frames), HEAD_DIM, CPU, dtype)


def rotate_and_attend(q_BHNE, k_BHNE, v_BHNE, neighborhood):
    q_BHNE, k_BHNE = rotate(q_BHNE, neighborhood), rotate(k_BHNE, neighborhood)
    return local_attention(q_BHNE, k_BHNE, v_BHNE, q_BHNE.shape[2], neighborhood)


@given(rows=st.integers(1, 21), columns=st.integers(1, 21), radius=st.one_of(st.none(), st.integers(1, 6)))
def test_local_attention_any_grid_equals_all_pairs(rows, columns, radius):
    """Blocks, margins and padding change neither values nor gradients, for grids of one block and of many."""
    grid, qkv = (rows, columns), random_qkv((rows, columns))
    result, expected = rotate_and_attend(*qkv, geometry(grid, radius)), reference(*qkv, grid, radius)
    torch.testing.assert_close(result, expected, rtol=1e-10, atol=1e-12)
    weights = torch.randn_like(result)
    gradients = [torch.autograd.grad((value * weights).sum(), qkv)[0] for value in (result, expected)]
    torch.testing.assert_close(*gradients, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("causal", [True, False])
@given(
    rows=st.integers(1, 19),
    columns=st.integers(1, 19),
    radius=st.one_of(st.none(), st.integers(1, 6)),
    frames=st.integers(1, 3),
)
def test_attention_in_clips_equals_all_pairs(causal, rows, columns, radius, frames):
    """Values and gradients, frame by frame in a causal model."""
    grid, qkv = (rows, columns), random_qkv((rows, columns), frames=frames)
    neighborhood = geometry(grid, radius, frames=frames)
    q_BHNE, k_BHNE = rotate(qkv[0], neighborhood), rotate(qkv[1], neighborhood)
    span = rows * columns if causal else frames * rows * columns
    result = local_attention(q_BHNE, k_BHNE, qkv[2], span, neighborhood)
    expected = reference(*qkv, grid, radius, frames, causal)
    torch.testing.assert_close(result, expected, rtol=1e-10, atol=1e-12)
    weights = torch.randn_like(result)
    gradients = [torch.autograd.grad((value * weights).sum(), qkv)[0] for value in (result, expected)]
    torch.testing.assert_close(*gradients, rtol=1e-9, atol=1e-11)


def test_first_frame_of_a_clip_is_rotated_as_an_image():
    """An image model initializes a video model, so positions in the first frame are those of an image, bit for bit."""
    image, clip = geometry((6, 7), 2), geometry((6, 7), 2, frames=5)
    assert torch.equal(clip.row_rotation[:, :1], image.row_rotation)
    assert torch.equal(clip.column_rotation[:, :1], image.column_rotation)
    later = RotaryPositions(2, 1, 5).neighborhood((6, 7), range(3, 5), HEAD_DIM, CPU, torch.float64)
    assert torch.equal(later.row_rotation, clip.row_rotation[:, 3:])


def test_local_attention_bf16_training_equals_fp32():
    """The eager kernel that trains in bf16 masks the same pairs."""
    grid, qkv = (16, 16), random_qkv((16, 16)).detach()
    half = qkv.bfloat16().requires_grad_()
    result = rotate_and_attend(*half, geometry(grid, 3, torch.float32))
    assert result.dtype == torch.bfloat16
    torch.testing.assert_close(result.double(), reference(*qkv, grid, 3), rtol=0.05, atol=0.05)


def test_rotate_shifted_positions_keep_scores():
    """Scores depend on differences of positions only."""
    q_BHNE, k_BHNE, _ = random_qkv((6, 7)).detach()
    neighborhood = geometry((6, 7), None)
    q_BHNE, k_BHNE = (x[:, :, :1].expand(-1, -1, 42, -1) for x in (q_BHNE, k_BHNE))
    scores = rotate(q_BHNE, neighborhood) @ rotate(k_BHNE, neighborhood).transpose(-1, -2)
    scores = scores.unflatten(2, (6, 7)).unflatten(4, (6, 7))
    torch.testing.assert_close(scores[:, :, :-2, :-3, :-2, :-3], scores[:, :, 2:, 3:, 2:, 3:])
    assert (scores[:, :, 0, 0] - scores[:, :, 0, 0, :1, :1]).abs().max() > 0.1


def test_neighborhood_without_radius_masks_nothing():
    """Without a radius, and in grids that every neighborhood covers, fused attention needs no mask."""
    for radius, grid in ((None, (30, 20)), (4, (5, 3))):
        assert geometry(grid, radius).row_masks is None
    qkv = random_qkv((5, 3)).detach()
    assert torch.equal(local_attention(*qkv, 15, geometry((5, 3), 4)), attention(*qkv).transpose(1, 2))


def test_neighborhood_from_inference_mode_can_train():
    """Rotations that an evaluation has computed first can take part in a backward pass."""
    with torch.inference_mode():
        rotate(random_qkv((9, 11))[0].detach(), geometry((9, 11), 2))
    qkv = random_qkv((9, 11))
    rotate_and_attend(*qkv, geometry((9, 11), 2)).sum().backward()
    assert qkv.grad is not None


@pytest.mark.parametrize("grid", [(17, 16), (64, 96), (1, 5000), (3000, 2000)])
def test_neighborhood_tables_grow_with_sides_of_grid(grid):
    """Cached tables have a size of rows plus columns, not of the number of tokens."""
    neighborhood = geometry(grid, 4)
    tensors = [value for value in neighborhood if isinstance(value, torch.Tensor)]
    assert len(tensors) == 4
    assert sum(value.numel() for value in tensors) < 64 * (grid[0] + grid[1] + 16)
