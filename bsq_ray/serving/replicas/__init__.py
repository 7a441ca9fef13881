"""Ray Serve replicas: one deployment and engine per kind of model."""
