"""Default limits of decoding."""

# Largest image or video frame that is read unless the caller sets another limit: 134 megapixels.
MAX_PIXELS = 2**27
