"""Trained models behind HTTP: Ray Serve deployments, a FastAPI application in front of them, and a page."""
