"""Compression of images and clips to `.bsq` files that decode to the same bytes on every machine."""
