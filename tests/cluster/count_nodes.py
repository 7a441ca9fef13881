"""Writes the number of nodes of the cluster it is run on to a file, a line for each change.

python count_nodes.py FILE
"""

import sys
import time
from pathlib import Path

import ray


def count_alive_nodes():
    """Nodes that are alive."""
    return sum(node["Alive"] for node in ray.nodes())


if __name__ == "__main__":
    while not ray.is_initialized():
        try:
            ray.init("auto", log_to_driver=False, logging_level="error")
        except ConnectionError:
            time.sleep(0.5)
    last_count = None
    while True:
        if count_alive_nodes() != last_count:
            last_count = count_alive_nodes()
            with Path(sys.argv[1]).open("a") as file:
                file.write(f"{last_count}\n")
        time.sleep(0.3)
