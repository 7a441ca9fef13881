"""`/metrics` of several machines: one text that Prometheus takes."""

import asyncio
import re
import socket
import threading

import pytest
import ray

from bsq_ray.serving.http.service_metrics import cluster_metrics

TEXT = """# HELP ray_serve_latency_ms how long
# TYPE ray_serve_latency_ms histogram
ray_serve_latency_ms_bucket{node="N",le="1"} 4
ray_serve_latency_ms_count{node="N"} 5
# HELP python_gc collections
# TYPE python_gc counter
python_gc{node="N"} 9
# HELP ray_serve_requests how many
# TYPE ray_serve_requests counter
ray_serve_requests{node="N"} 7
"""


@pytest.fixture
def metrics_server():
    """Starts a machine's port of metrics, which answers with the text and claims a length; the port."""
    servers = []

    def serve_once(server, text, length):
        connection, _ = server.accept()
        with connection:
            connection.recv(4096)
            connection.sendall(f"HTTP/1.1 200 OK\r\nContent-Length: {length or len(text)}\r\n\r\n{text}".encode())

    def start(text, length=None):
        server = socket.create_server(("127.0.0.1", 0))
        servers.append(server)
        threading.Thread(target=serve_once, args=(server, text, length), daemon=True).start()
        return server.getsockname()[1]

    yield start
    for server in servers:
        server.close()


def collect_metrics(monkeypatch, ports):
    nodes = [{"Alive": True, "NodeManagerAddress": "127.0.0.1", "MetricsExportPort": port} for port in ports]
    monkeypatch.setattr(ray, "nodes", lambda: nodes)
    return asyncio.run(cluster_metrics())


def test_cluster_metrics_merges_series_by_metric(monkeypatch, metrics_server):
    """Each metric is described once, followed by the series of all nodes."""
    text = collect_metrics(monkeypatch, [metrics_server(TEXT.replace("N", name)) for name in "AB"])
    assert re.sub("{.*?}", "", text).split("\n") == [
        "# HELP ray_serve_latency_ms how long", "# TYPE ray_serve_latency_ms histogram",
        "ray_serve_latency_ms_bucket 4", "ray_serve_latency_ms_count 5",
        "ray_serve_latency_ms_bucket 4", "ray_serve_latency_ms_count 5",
        "# HELP ray_serve_requests how many", "# TYPE ray_serve_requests counter",
        "ray_serve_requests 7", "ray_serve_requests 7", "",
    ]  # fmt: skip


def test_cluster_metrics_skips_failing_node(monkeypatch, metrics_server):
    """A node whose response is incomplete is skipped."""
    text = collect_metrics(monkeypatch, [metrics_server(TEXT, length=9999), metrics_server(TEXT.replace("N", "whole"))])
    assert set(re.findall('node="(.*?)"', text)) == {"whole"}
