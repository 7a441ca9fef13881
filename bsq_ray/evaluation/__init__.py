"""Evaluate trained models: reconstruction, generation, compression."""
