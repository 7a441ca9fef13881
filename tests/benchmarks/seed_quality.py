"""Quality of a training setting over several seeds, as columns of a result."""

import statistics

from bsq_ray.config import load_config
from bsq_ray.data.pack import PackOptions, pack_videos
from bsq_ray.demos.prepare_data import CLIPS
from bsq_ray.evaluation.reconstruction.evaluate_reconstruction import evaluate_reconstruction
from bsq_ray.training.launch import train

SEEDS = (0, 1, 2)


def quality_columns(psnr, lpips):
    """Return mean, minimum and maximum over the seeds."""
    return {
        "psnr_db": statistics.mean(psnr),
        "psnr_min_db": min(psnr),
        "psnr_max_db": max(psnr),
        "lpips": statistics.mean(lpips),
        "lpips_min": min(lpips),
        "lpips_max": max(lpips),
    }


def clip_quality(preset, overrides, video_folders, out):
    """Train a video tokenizer with each seed on the clips of the quickstart; return the columns of held-out quality."""
    urls = [str(out / "shards" / split) for split in ("train", "held_out")]
    for folder, url in zip(video_folders, urls, strict=True):
        pack_videos(str(folder), url, PackOptions(max_side=CLIPS.max_side, num_workers=0))
    psnr, lpips = [], []
    for seed in SEEDS:
        run = out / str(seed)
        train(load_config(preset, [*overrides, f"training.seed={seed}"]), urls[0], str(run), 0, held_out_url=urls[1])
        results = evaluate_reconstruction(f"{run}/model", urls[1], str(run / "evaluation"), workers=0)
        psnr.append(results["rows"]["model"]["psnr"])
        lpips.append(results["rows"]["model"]["lpips"])
    return quality_columns(psnr, lpips)
