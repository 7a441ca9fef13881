"""`/metrics`: what Ray Serve counts, of every machine of the cluster, in Prometheus' text format.

Requests, latencies, queues and replicas of every deployment are counted by Ray Serve itself, sizes of batches by the
replicas; each machine gives them out at its own port.
"""

from __future__ import annotations

import asyncio
import re
import urllib.request
from collections.abc import Iterable
from http.client import HTTPException

import ray

_SERVE_METRIC = re.compile(r"(# (HELP|TYPE) )?ray_serve_")
# Machines of the cluster are not reached through a proxy.
_direct_opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))


async def cluster_metrics() -> str:
    """The series of Ray Serve, machine by machine; one that does not answer is left out."""
    nodes = [node for node in await asyncio.to_thread(ray.nodes) if node["Alive"] and node["MetricsExportPort"]]
    urls = [f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics" for node in nodes]
    return merge_metrics(await asyncio.gather(*(asyncio.to_thread(_fetch, url) for url in urls)))


def merge_metrics(texts: Iterable[str]) -> str:
    """One text of several: each metric once, with the series of all of them."""
    metrics: dict[str, dict[str, None]] = {}
    for text in texts:
        lines: dict[str, None] = {}
        for line in filter(_SERVE_METRIC.match, text.splitlines()):
            if line.startswith("#"):
                lines = metrics.setdefault(line.split(" ")[2], {})
            lines[line] = None
    return "".join(line + "\n" for lines in metrics.values() for line in lines)


def _fetch(url: str) -> str:
    try:
        with _direct_opener.open(url, timeout=5) as response:
            text: str = response.read().decode()
            return text
    except (OSError, HTTPException):
        return ""
