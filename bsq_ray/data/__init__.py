"""Images and videos to shards, and shards to batches in a reproducible order."""
