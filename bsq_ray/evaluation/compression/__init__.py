"""Compare our codec with standard image and video codecs."""
