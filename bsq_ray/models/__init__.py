"""Networks in plain PyTorch, usable without Ray."""
