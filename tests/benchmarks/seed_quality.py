"""Quality of a training setting over several seeds, as columns of a result."""

import statistics


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
