"""Losses in plain PyTorch."""
