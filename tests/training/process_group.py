"""Running a function in several processes that form a gloo group, as Ray's workers do."""

import os
import socket
import traceback

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def spawn_group(world_size, function, *arguments):
    """Calls `function(rank, world, *arguments)` in `world` processes; returns their results in order of rank."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = mp.get_context("spawn")
    result_queue = context.Queue()
    processes = [
        context.Process(target=_group_process, args=(rank, world_size, port, result_queue, function, arguments))
        for rank in range(world_size)
    ]
    for process in processes:
        process.start()
    try:
        results = dict(result_queue.get(timeout=240) for _ in processes)
    finally:
        for process in processes:
            process.join(10)
            process.kill()
    failures = [result for result in results.values() if isinstance(result, _Failure)]
    if failures:
        raise AssertionError("\n".join(failure.text for failure in failures))
    return [results[rank] for rank in range(world_size)]


class _Failure:
    def __init__(self, text):
        self.text = text


def _group_process(rank, world_size, port, result_queue, function, arguments):
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world_size),
        LOCAL_WORLD_SIZE=str(world_size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        GLOO_SOCKET_IFNAME="lo",
    )
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=world_size)
    try:
        result = function(rank, world_size, *arguments)
    except BaseException:
        result_queue.put((rank, _Failure(traceback.format_exc())))
        return
    result_queue.put((rank, result))
    dist.barrier()
    dist.destroy_process_group()
