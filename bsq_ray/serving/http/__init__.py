"""HTTP API of the service: routes, admission control, request and response bodies."""
