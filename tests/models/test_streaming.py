"""Clips of any length, chunk by chunk: the same tokens and pixels as in one pass, and no growing memory."""

import gc

import pytest
import torch
from real_clips import iter_frames, street_clip

from bsq_ray import Tokenizer, config
from bsq_ray.models.streaming import Window
from bsq_ray.models.tokenizer import Tokens

T, S = 6, 16
CUTS = {"frame by frame": [1] * 12, "uneven": [2, 5, 1, 4], "one chunk": [12]}


def video_tokenizer(frames=T, causal=True):
    """An untrained model whose temporal positions matter, as those of a trained one do."""
    torch.manual_seed(0)
    sizes = {"width": 32, "layers": 2, "heads": 4}
    model = config.TokenizerModel(
        image_size=32,
        frames=frames,
        causal=causal,
        encoder=config.Transformer(**sizes),
        decoder=config.Decoder(**sizes, head_width=32),
        quantizer=config.BSQ(bits=10),
    )
    tokenizer = Tokenizer(model)
    for part in (tokenizer.encoder, tokenizer.decoder):
        if part.transformer.temporal_position is not None:
            torch.nn.init.normal_(part.transformer.temporal_position, std=0.5)
    return tokenizer.eval()


def chunks(clip, cuts):
    return iter(clip.split(cuts, 2))


def token_chunks(tokens, cuts):
    side = tokens.grid[1]
    parts = tokens.bits_BNL.split([frames * side**2 for frames in cuts], 1)
    return [Tokens(part, (frames, side, side)) for part, frames in zip(parts, cuts, strict=True)]


def unit_vectors(tokenizer, clips):
    """What the signs of the tokens are taken of."""
    with torch.no_grad():
        return torch.nn.functional.normalize(tokenizer._features(clips), dim=-1)


def assert_same_bits(left, right, vectors):
    """Bits may differ only where a coordinate is within rounding of zero."""
    assert not (left != right)[vectors.abs() > 1e-5].any()
    assert (left == right).float().mean() > 0.999


@pytest.mark.parametrize("cuts", [[1] * 6, [2, 3, 1], [6]], ids=str)
def test_a_clip_of_the_models_length_has_the_tokens_and_pixels_of_one_pass(cuts):
    tokenizer, clip = video_tokenizer(), street_clip(T, 32)
    whole = tokenizer.encode(clip)
    parts = list(tokenizer.encode_stream(chunks(clip, cuts)))
    assert [part.grid for part in parts] == [(frames, 4, 4) for frames in cuts]
    assert_same_bits(torch.cat([part.bits_BNL for part in parts], 1), whole.bits_BNL, unit_vectors(tokenizer, clip))
    pixels = torch.cat(list(tokenizer.decode_stream(token_chunks(whole, cuts))), 2)
    torch.testing.assert_close(pixels, tokenizer.decode(whole), rtol=0, atol=1e-5)


@pytest.mark.parametrize("overlap", [0, 2, 3, 5])
@pytest.mark.parametrize("cuts", CUTS.values(), ids=CUTS.keys())
def test_beyond_it_every_frame_is_that_of_one_pass_over_its_window(cuts, overlap):
    tokenizer, clip = video_tokenizer(), street_clip(12, 32)
    bits = torch.cat([part.bits_BNL for part in tokenizer.encode_stream(chunks(clip, cuts), overlap)], 1)
    pixels = torch.cat(list(tokenizer.decode_stream(token_chunks(Tokens(bits, (12, 4, 4)), cuts), overlap)), 2)
    made = 0
    for start in range(0, 12, T - overlap):
        stop = min(start + T, 12)
        if stop <= made:
            break
        window, new = clip[:, :, start:stop], slice((made - start) * S, None)
        expected = tokenizer.encode(window).bits_BNL[:, new]
        assert_same_bits(bits[:, made * S : stop * S], expected, unit_vectors(tokenizer, window)[:, new])
        expected = tokenizer.decode(Tokens(bits[:, start * S : stop * S], (stop - start, 4, 4)))
        expected = expected.reshape(1, 3, stop - start, 32, 32)[:, :, made - start :]
        torch.testing.assert_close(pixels[:, :, made:stop], expected, rtol=0, atol=1e-5)
        made = stop
    assert made == 12


def test_half_of_the_frames_stay_in_sight_by_default():
    tokenizer, clip = video_tokenizer(), street_clip(12, 32)
    default, three = (
        torch.cat([part.bits_BNL for part in tokenizer.encode_stream(chunks(clip, [4] * 3), overlap)], 1)
        for overlap in (None, 3)
    )
    assert torch.equal(default, three)


def test_single_frames_and_several_clips_at_once_are_taken():
    tokenizer = video_tokenizer()
    clips = torch.cat([street_clip(4, 32), street_clip(4, 32, start=100)])
    frames = tokenizer.encode_stream(frame for frame in clips.unbind(2))
    bits = torch.cat([part.bits_BNL for part in frames], 1)
    assert_same_bits(bits, tokenizer.encode(clips).bits_BNL, unit_vectors(tokenizer, clips))


def test_an_image_model_takes_each_frame_by_itself():
    tokenizer, clip = video_tokenizer(frames=1), street_clip(3, 32)
    parts = list(tokenizer.encode_stream(chunks(clip, [2, 1])))
    bits = torch.cat([part.bits_BNL for part in parts], 1)
    expected = torch.cat([tokenizer.encode(frame).bits_BNL for frame in clip.unbind(2)], 1)
    assert_same_bits(bits, expected, torch.cat([unit_vectors(tokenizer, f) for f in clip.split(1, 2)], 1))


def test_tokens_come_as_soon_as_their_frames_do():
    tokenizer, clip = video_tokenizer(), street_clip(T, 32)
    taken = []

    def frames():
        for number, frame in enumerate(clip.unbind(2)):
            taken.append(number)
            yield frame

    stream = tokenizer.decode_stream(tokenizer.encode_stream(frames()))
    for number in range(3):
        assert next(stream).shape == (1, 3, 1, 32, 32)
        assert taken == list(range(number + 1))


def held_bytes():
    """Bytes of all tensors that this process holds."""
    gc.collect()
    storages = {
        value.untyped_storage().data_ptr(): value.untyped_storage().nbytes()
        for value in gc.get_objects()
        if isinstance(value, torch.Tensor)
    }
    return sum(storages.values())


def test_three_hundred_real_frames_pass_without_more_being_held_at_the_end_than_after_a_window():
    tokenizer = video_tokenizer()
    stream = tokenizer.decode_stream(tokenizer.encode_stream(iter_frames("demo.3gp", 32, 0, 300)))
    held, passed = {}, 0
    for pixels in stream:
        passed += pixels.shape[2]
        # At the same place in a window each.
        if passed in (12, 150, 300):
            held[passed] = held_bytes()
    assert passed == 300
    assert held[12] == held[150] == held[300]


def test_the_caches_have_room_for_one_window():
    tokenizer = video_tokenizer()
    window = Window(tokenizer.encoder.transformer, 2)
    with torch.no_grad():
        for _ in range(20):
            window.push(torch.randn(1, S, 32))
            assert window.caches[0].length <= T * S
            assert window._recent_BND.shape[1] <= 2 * S


# Mistakes


def test_a_model_that_looks_ahead_cannot_stream():
    tokenizer = video_tokenizer(causal=False)
    for call in (tokenizer.encode_stream, tokenizer.decode_stream):
        with pytest.raises(ValueError, match="model.causal=false looks at whole clips of up to 6 frames"):
            call([])


@pytest.mark.parametrize("overlap", [-1, 6])
def test_an_overlap_that_leaves_no_room_is_refused(overlap):
    with pytest.raises(ValueError, match=f"overlap {overlap} must be 0 or more and below the model's 6 frames"):
        video_tokenizer().encode_stream([], overlap)


def test_a_chunk_of_another_shape_is_refused():
    tokenizer = video_tokenizer()
    with pytest.raises(ValueError, match="clips have 0 frames, but this model takes 1 or more"):
        list(tokenizer.encode_stream([torch.zeros(1, 3, 0, 32, 32)]))
    with pytest.raises(ValueError, match="began with 1 clips at once and now has 2"):
        list(tokenizer.encode_stream([torch.zeros(1, 3, 32, 32), torch.zeros(2, 3, 32, 32)]))
    with pytest.raises(ValueError, match=r"grid \(2, 8, 8\), but this model takes \(1 or more, 4, 4\)"):
        list(tokenizer.decode_stream([Tokens(torch.zeros(1, 128, 10, dtype=torch.bool), (2, 8, 8))]))
