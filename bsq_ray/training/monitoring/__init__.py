"""Metrics log, console, Prometheus gauges, throughput and run summary."""
