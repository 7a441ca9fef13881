"""Measure reconstructions of a tokenizer."""
