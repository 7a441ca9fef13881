"""Discriminators of the adversarial loss."""
