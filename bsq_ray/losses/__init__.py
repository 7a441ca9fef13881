"""Training losses in plain PyTorch."""
