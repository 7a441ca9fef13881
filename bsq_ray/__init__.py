"""Binary Spherical Quantization tokenizers, trained and served on Ray."""
