"""Decoders and encoders of the image and video files that users have."""
