"""Differentiable operations with hand-written backward passes."""
