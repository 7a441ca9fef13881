"""What the tests of the plan share."""

import pytest


@pytest.fixture
def fused_attention(monkeypatch):
    """Formulas are of a GPU, whose attention keeps no scores."""
    monkeypatch.setattr("bsq_ray.models.layers.attention._EAGER_MAX_TOKENS", 0)
