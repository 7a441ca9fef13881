"""Images and videos in requests and responses."""
