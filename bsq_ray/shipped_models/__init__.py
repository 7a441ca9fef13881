"""Models that are part of the package: one model folder each, and the catalog of their names."""
