"""Clips of any length, chunk by chunk: the same tokens and pixels as in one pass, and no growing memory."""

import gc

import pytest
import torch
from real_clips import iter_frames, street_clip

from bsq_ray import Tokenizer, config
from bsq_ray.models.streaming import StreamingWindow
from bsq_ray.models.tokenizer import Tokens

T, S = 6, 16
CUTS = {"frame by frame": [1] * 12, "uneven": [2, 5, 1, 4], "one chunk": [12]}


def video_tokenizer(frames=T, causal=True):
    """An untrained model whose temporal positions matter, as those of a trained one do."""
    torch.manual_seed(0)
    sizes = {"width": 32, "layers": 2, "heads": 4}
    model = config.TokenizerModelConfig(
        image_size=32,
        frames=frames,
        causal=causal,
        encoder=config.TransformerConfig(**sizes),
        decoder=config.DecoderConfig(**sizes, head_hidden_dim=32),
        quantizer=config.BSQConfig(bits=10),
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


def normalized_features(tokenizer, clips):
    """Compute the coordinates whose signs are the bits."""
    with torch.no_grad():
        return torch.nn.functional.normalize(tokenizer._features(clips), dim=-1)


def assert_same_bits(left, right, vectors):
    """Bits may differ only where a coordinate is within rounding of zero."""
    assert not (left != right)[vectors.abs() > 1e-5].any()
    assert (left == right).float().mean() > 0.999


@pytest.mark.parametrize("cuts", [[1] * 6, [2, 3, 1], [6]], ids=str)
def test_stream_within_window_matches_single_pass(cuts):
    """Up to the model's number of frames, streaming gives the tokens and pixels of one pass over the clip."""
    tokenizer, clip = video_tokenizer(), street_clip(T, 32)
    whole = tokenizer.encode(clip)
    parts = list(tokenizer.encode_stream(chunks(clip, cuts)))
    assert [part.grid for part in parts] == [(frames, 4, 4) for frames in cuts]
    assert_same_bits(
        torch.cat([part.bits_BNL for part in parts], 1), whole.bits_BNL, normalized_features(tokenizer, clip)
    )
    pixels = torch.cat(list(tokenizer.decode_stream(token_chunks(whole, cuts))), 2)
    torch.testing.assert_close(pixels, tokenizer.decode(whole), rtol=0, atol=1e-5)


@pytest.mark.parametrize("overlap", [0, 2, 3, 5])
@pytest.mark.parametrize("cuts", CUTS.values(), ids=CUTS.keys())
def test_stream_beyond_window_matches_pass_over_window(cuts, overlap):
    """Beyond the model's number of frames, every frame equals that of one pass over its window."""
    tokenizer, clip = video_tokenizer(), street_clip(12, 32)
    bits = torch.cat([part.bits_BNL for part in tokenizer.encode_stream(chunks(clip, cuts), overlap)], 1)
    pixels = torch.cat(list(tokenizer.decode_stream(token_chunks(Tokens(bits, (12, 4, 4)), cuts), overlap)), 2)
    num_checked = 0
    for start in range(0, 12, T - overlap):
        stop = min(start + T, 12)
        if stop <= num_checked:
            break
        window, new = clip[:, :, start:stop], slice((num_checked - start) * S, None)
        expected = tokenizer.encode(window).bits_BNL[:, new]
        assert_same_bits(bits[:, num_checked * S : stop * S], expected, normalized_features(tokenizer, window)[:, new])
        expected = tokenizer.decode(Tokens(bits[:, start * S : stop * S], (stop - start, 4, 4)))
        expected = expected.reshape(1, 3, stop - start, 32, 32)[:, :, num_checked - start :]
        torch.testing.assert_close(pixels[:, :, num_checked:stop], expected, rtol=0, atol=1e-5)
        num_checked = stop
    assert num_checked == 12


def test_stream_default_overlap_is_half_the_window():
    tokenizer, clip = video_tokenizer(), street_clip(12, 32)
    default, three = (
        torch.cat([part.bits_BNL for part in tokenizer.encode_stream(chunks(clip, [4] * 3), overlap)], 1)
        for overlap in (None, 3)
    )
    assert torch.equal(default, three)


def test_stream_accepts_single_frames_and_batches():
    tokenizer = video_tokenizer()
    clips = torch.cat([street_clip(4, 32), street_clip(4, 32, start=100)])
    frames = tokenizer.encode_stream(frame for frame in clips.unbind(2))
    bits = torch.cat([part.bits_BNL for part in frames], 1)
    assert_same_bits(bits, tokenizer.encode(clips).bits_BNL, normalized_features(tokenizer, clips))


def test_stream_image_model_encodes_each_frame():
    tokenizer, clip = video_tokenizer(frames=1), street_clip(3, 32)
    parts = list(tokenizer.encode_stream(chunks(clip, [2, 1])))
    bits = torch.cat([part.bits_BNL for part in parts], 1)
    expected = torch.cat([tokenizer.encode(frame).bits_BNL for frame in clip.unbind(2)], 1)
    assert_same_bits(bits, expected, torch.cat([normalized_features(tokenizer, f) for f in clip.split(1, 2)], 1))


def test_stream_yields_without_lookahead():
    tokenizer, clip = video_tokenizer(), street_clip(T, 32)
    consumed = []

    def frames():
        for number, frame in enumerate(clip.unbind(2)):
            consumed.append(number)
            yield frame

    stream = tokenizer.decode_stream(tokenizer.encode_stream(frames()))
    for number in range(3):
        assert next(stream).shape == (1, 3, 1, 32, 32)
        assert consumed == list(range(number + 1))


def live_tensor_bytes():
    """Bytes of all tensors that this process holds."""
    gc.collect()
    storages = {
        value.untyped_storage().data_ptr(): value.untyped_storage().nbytes()
        for value in gc.get_objects()
        if isinstance(value, torch.Tensor)
    }
    return sum(storages.values())


def test_stream_memory_stays_constant():
    """After 300 real frames the process holds no more tensor bytes than after the first windows."""
    tokenizer = video_tokenizer()
    stream = tokenizer.decode_stream(tokenizer.encode_stream(iter_frames("demo.3gp", 32, 0, 300)))
    bytes_at_frame, num_frames = {}, 0
    for pixels in stream:
        num_frames += pixels.shape[2]
        # At the same place in a window each.
        if num_frames in (12, 150, 300):
            bytes_at_frame[num_frames] = live_tensor_bytes()
    assert num_frames == 300
    assert bytes_at_frame[12] == bytes_at_frame[150] == bytes_at_frame[300]


def test_streaming_window_caches_stay_within_one_window():
    tokenizer = video_tokenizer()
    window = StreamingWindow(tokenizer.encoder.transformer, 2)
    with torch.no_grad():
        for _ in range(20):
            window.push(torch.randn(1, S, 32), (4, 4))
            assert window.caches[0].length <= T * S
            assert window._recent_BND.shape[1] <= 2 * S


# Mistakes


def test_stream_non_causal_model_raises():
    tokenizer = video_tokenizer(causal=False)
    for call in (tokenizer.encode_stream, tokenizer.decode_stream):
        with pytest.raises(ValueError, match="model.causal=false needs whole clips of up to 6 frames"):
            call([])


@pytest.mark.parametrize("overlap", [-1, 6])
def test_stream_invalid_overlap_raises(overlap):
    with pytest.raises(ValueError, match=f"overlap {overlap} must be 0 or more and less than the model's 6 frames"):
        video_tokenizer().encode_stream([], overlap)


def test_stream_wrong_chunk_shape_raises():
    tokenizer = video_tokenizer()
    with pytest.raises(ValueError, match="clips have 0 frames, but this model takes 1 or more"):
        list(tokenizer.encode_stream([torch.zeros(1, 3, 0, 32, 32)]))
    with pytest.raises(ValueError, match="started with batch size 1 but got 2"):
        list(tokenizer.encode_stream([torch.zeros(1, 3, 32, 32), torch.zeros(2, 3, 32, 32)]))
    with pytest.raises(ValueError, match=r"grid \(2, 8, 8\), but this model takes \(1 or more, 4, 4\)"):
        list(tokenizer.decode_stream([Tokens(torch.zeros(1, 128, 10, dtype=torch.bool), (2, 8, 8))]))
