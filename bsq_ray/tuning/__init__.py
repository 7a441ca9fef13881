"""Sweeps: many trainings of one model with different values of its configuration, as trials of Ray Tune."""
