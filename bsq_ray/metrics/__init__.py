"""Metrics of images and clips, one per module."""
