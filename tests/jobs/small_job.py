"""Overrides that make the demo preset tiny."""

TINY_OVERRIDES = [
    *("model.image_size=16", "model.patch_size=4", "loss.perceptual_weight=0", "loss.adversarial.channel_max=8"),
    *(f"model.{half}.{key}" for half in ("encoder", "decoder") for key in ("width=16", "layers=1", "heads=2")),
    *("training.batch_size=16", "training.log_every=5", "training.eval_samples=16", "training.checkpoint_every=20"),
]
