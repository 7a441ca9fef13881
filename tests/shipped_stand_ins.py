"""A folder of shipped models for tests: an untrained tokenizer `photo` and an untrained prior `photo-prior`."""

import torch
from small_codecs import PRIOR_CONFIG
from small_models import save_tokenizer

from bsq_ray import Prior
from bsq_ray.model_card import CardContent
from bsq_ray.model_export import export_model
from bsq_ray.shipped_models import catalog

CARD = CardContent(
    fields={"data": "12 photos", "licenses": "CC0", "recipe": "untrained", "seeds": "0"},
    metrics={"psnr": 21.5},
    measured_on="3 photos",
)


def ship_stand_ins(folder, monkeypatch):
    """Make the package ship the two models of 10 bits at 32 px for the duration of a test; return their folder."""
    tokenizer = save_tokenizer(folder / "trained" / "photo", seed=0)
    export_model(tokenizer, str(folder / "trained" / "photo-prior" / "tokenizer"), card=CARD)
    torch.manual_seed(0)
    Prior(PRIOR_CONFIG).save_pretrained(str(folder / "trained" / "photo-prior"))
    export_model(str(folder / "trained" / "photo-prior"), str(folder / "shipped" / "photo-prior"))
    monkeypatch.setattr(catalog, "MODELS_FOLDER", folder / "shipped")
    return folder / "shipped"
