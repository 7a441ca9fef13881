"""Whole paths in one command each, on real photographs and two cores."""
