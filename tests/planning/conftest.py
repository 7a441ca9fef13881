"""Fixtures of the planning tests."""

import pytest


@pytest.fixture
def fused_attention(monkeypatch):
    """Use fused attention, which saves no scores: the formulas are for GPUs."""
    monkeypatch.setattr("bsq_ray.models.layers.attention._EAGER_MAX_KEYS", 0)
