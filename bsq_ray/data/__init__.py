"""Photographs and clips to shards, shards to batches in a reproducible order."""
