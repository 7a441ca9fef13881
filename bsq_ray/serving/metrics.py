"""`/metrics`: what Ray Serve counts, of every machine of the cluster, in Prometheus' text format.

Requests, latencies, queues, replicas and sizes of batches of every deployment are counted by Ray Serve itself; each
machine gives them out at its own port.
"""

from __future__ import annotations

import asyncio
import re

import httpx
import ray

_OURS = re.compile(r"(# (HELP|TYPE) )?ray_serve_")


async def cluster_metrics() -> str:
    """The series of Ray Serve, machine by machine; one that does not answer is left out."""
    nodes = [node for node in await asyncio.to_thread(ray.nodes) if node["Alive"] and node["MetricsExportPort"]]
    urls = [f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics" for node in nodes]
    async with httpx.AsyncClient(timeout=5, trust_env=False) as client:
        texts = await asyncio.gather(*(_read(client, url) for url in urls))
    return "".join(texts)


async def _read(client: httpx.AsyncClient, url: str) -> str:
    try:
        text = (await client.get(url)).text
    except httpx.HTTPError:
        return ""
    return "".join(line + "\n" for line in text.splitlines() if _OURS.match(line))
