"""Checkpoints: training state, its copy in host memory, and its files on any storage."""
