"""Measuring trained models, and telling what was measured."""
