"""Optimizers of the engines: AdamW of PyTorch, and Muon for the matrices of transformer blocks."""
