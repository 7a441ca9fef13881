"""HTTP service for trained models: Ray Serve deployments, a FastAPI ingress and a web page."""
