"""Plain PyTorch models, usable without Ray."""
