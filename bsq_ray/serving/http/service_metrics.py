"""`/metrics`: the metrics of Ray Serve on all nodes, merged into one text in the Prometheus format.

Ray Serve counts requests, latencies, queues and replicas of every deployment, and the replicas count batch sizes. Each
node exports them at a port of its own.

`prometheus_client.parser` is not used: it renames counters without the suffix `_total`, and Ray exports each counter
also under its plain name. Here all lines stay as Ray wrote them.
"""

from __future__ import annotations

import asyncio
import urllib.request
from collections.abc import Iterable
from http.client import HTTPException

import ray

_PREFIX = "ray_serve_"
_COMMENT_PREFIXES = (f"# HELP {_PREFIX}", f"# TYPE {_PREFIX}")
_TIMEOUT_S = 5
# Nodes of the cluster are reached directly, whatever HTTP proxy the environment names.
_direct_opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))


async def cluster_metrics() -> str:
    """Return the metrics of Ray Serve on all nodes; a node that does not respond is skipped."""
    nodes = [node for node in await asyncio.to_thread(ray.nodes) if node["Alive"] and node["MetricsExportPort"]]
    urls = [f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics" for node in nodes]
    return merge_metrics(await asyncio.gather(*(asyncio.to_thread(_fetch, url) for url in urls)))


def merge_metrics(texts: Iterable[str]) -> str:
    """Merge texts in the Prometheus format: the comments of a metric once, followed by the series of all texts."""
    lines_by_metric: dict[str, dict[str, None]] = {}
    for text in texts:
        lines: dict[str, None] = {}
        for line in text.splitlines():
            if line.startswith(_COMMENT_PREFIXES):
                metric_name = line.split(" ")[2]
                lines = lines_by_metric.setdefault(metric_name, {})
                lines[line] = None
            elif line.startswith(_PREFIX):
                lines[line] = None
    return "".join(line + "\n" for lines in lines_by_metric.values() for line in lines)


def _fetch(url: str) -> str:
    try:
        with _direct_opener.open(url, timeout=_TIMEOUT_S) as response:
            text: str = response.read().decode()
            return text
    except (OSError, HTTPException):
        return ""
