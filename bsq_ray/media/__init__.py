"""Decode and encode image and video files: one reader for packing, training, codec, evaluation and service."""
