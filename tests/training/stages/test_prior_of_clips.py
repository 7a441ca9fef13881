"""Training stage of the prior on clips: tokens of a video tokenizer, trained in temporal order."""

import numpy as np
import pytest
import torch

from bsq_ray import Codec, Tokenizer, config
from bsq_ray.data.token_table import TokenTable, TokenTableInfo, completed_part, write_part, write_table
from bsq_ray.data.transforms import to_float
from bsq_ray.media.video_reader import read_video
from bsq_ray.models.quantizers.bits import pack_bits
from bsq_ray.training.launch import train

FRAMES, SIDE = 4, 16
SMALL = [
    "model.grid=[4,2,2]",
    "model.bits=6",
    "model.sub_bits=3",
    "model.width=32",
    "model.layers=2",
    "model.heads=2",
    "model.dropout=0",
    "training.steps=30",
    "training.batch_size=16",
    "training.micro_batch_size=8",
    "training.schedule.warmup_steps=0",
    "training.optimizer.base_learning_rate=0.1",
    "training.optimizer.kind=adamw",
    "training.engine.kind=deepspeed",
    "training.engine.precision=fp32",
    "training.ema_decay=0.5",
    "training.log_every=1",
]


@pytest.fixture(scope="module")
def frames(video_folders):
    """Forty frames of a real clip, 176 x 144 of its 193 x 144 pixels."""
    video = read_video(str(video_folders[1] / "carphone_pristine.mp4"))
    return [frame[:, :176] for frame, _ in zip(video.frames, range(40), strict=False)]


@pytest.fixture(scope="module")
def table(frames, tmp_path_factory):
    """URL of the tokens of every fourth frame's tiles."""
    url = str(tmp_path_factory.mktemp("tokens"))
    torch.manual_seed(0)
    sizes = {"width": 32, "layers": 1, "heads": 2}
    model_config = config.TokenizerModelConfig(
        image_size=SIDE,
        frames=FRAMES,
        encoder=config.TransformerConfig(**sizes),
        decoder=config.DecoderConfig(**sizes, head_hidden_dim=32),
        quantizer=config.BSQConfig(bits=6),
    )
    tokenizer_id = Tokenizer(model_config).save_pretrained(f"{url}/tokenizer")
    tokenizer = Tokenizer.from_pretrained(f"{url}/tokenizer")
    clips = np.stack(frames).reshape(-1, FRAMES, 144 // SIDE, SIDE, 176 // SIDE, SIDE, 3)
    clips = torch.from_numpy(clips.transpose(0, 2, 4, 6, 1, 3, 5).reshape(-1, 3, FRAMES, SIDE, SIDE))
    packed = pack_bits(tokenizer.encode(to_float(clips)).bits_BNL.flatten(1)).numpy()
    facts = TokenTableInfo(tokenizer_id, 6, (FRAMES, 2, 2), ("clip",), 1, "carphone")
    labels = np.zeros(len(packed), np.int64)
    write_part(f"{url}/part-000000.parquet", facts, [f"{n}" for n in labels], labels, labels, packed)
    rows, digest = completed_part(f"{url}/part-000000.parquet", facts)
    write_table(TokenTable(url, facts, (("part-000000.parquet", rows, digest),)))
    return url


def test_clip_prior_trains_and_compresses(table, frames, tmp_path):
    """A prior trained on clips lowers its loss and compresses the clips it was trained on."""
    records = []
    train(
        config.load_config("ucf101-prior", [*SMALL, "training.eval_every=30", "training.sample_every=30"]),
        table, str(tmp_path), 0, held_out_url=table, on_record=records.append,
    )  # fmt: skip
    training = [record["bits_per_token"] for record in records if record["kind"] == "training"]
    assert training[-1] < 0.8 * training[0]
    assert any(record["kind"] == "evaluation" for record in records)
    codec = Codec.from_pretrained(str(tmp_path / "model"))
    encoded = codec.compress_clip(frames[:8], 30)
    assert encoded.cross_entropy_bits < 0.8 * encoded.raw_bits
    assert len(list(codec.decompress_clip(encoded.data))) == 8
