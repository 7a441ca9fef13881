"""Learned against rotary positions of `demo-video`: held-out quality of three seeds each, after equal steps.

Single-threaded, so that another benchmark can run at the same time.
"""

import pytest
from seed_quality import clip_quality

pytestmark = [pytest.mark.benchmark, pytest.mark.usefixtures("single_thread"), pytest.mark.timeout(7200)]
STEPS = 120
# The GAN starts at half of the steps.
OVERRIDES = (
    f"training.steps={STEPS}",
    f"loss.adversarial.start_step={STEPS // 2}",
    "training.engine.kind=ddp",
    "training.eval_every=1000000",
    "training.sample_every=1000000",
)
SETTINGS = {"learned": "demo-video", "rotary": "demo-video-any-size"}


@pytest.mark.parametrize("setting", list(SETTINGS))
def test_video_positions(setting, video_folders, tmp_path, record):
    columns = clip_quality(SETTINGS[setting], OVERRIDES, video_folders, tmp_path)
    record("video-positions-cpu", setting, steps=STEPS, **columns)
