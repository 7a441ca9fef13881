"""Compare the BSQ codec with standard image and video codecs."""
