"""The codec: images to `.bsq` files that decode anywhere, to the last bit."""
