"""Running a function in several processes that form a gloo group, as Ray's workers do."""

import os
import socket
import traceback

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def in_group(world, function, *arguments):
    """Calls `function(rank, world, *arguments)` in `world` processes; returns their results in order of rank."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = mp.get_context("spawn")
    answers = context.Queue()
    processes = [
        context.Process(target=_member, args=(rank, world, port, answers, function, arguments)) for rank in range(world)
    ]
    for process in processes:
        process.start()
    try:
        results = dict(answers.get(timeout=240) for _ in processes)
    finally:
        for process in processes:
            process.join(10)
            process.kill()
    failures = [result for result in results.values() if isinstance(result, _Failure)]
    if failures:
        raise AssertionError("\n".join(failure.text for failure in failures))
    return [results[rank] for rank in range(world)]


class _Failure:
    def __init__(self, text):
        self.text = text


def _member(rank, world, port, answers, function, arguments):
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world),
        LOCAL_WORLD_SIZE=str(world),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        GLOO_SOCKET_IFNAME="lo",
    )
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=world)
    try:
        result = function(rank, world, *arguments)
    except BaseException:
        answers.put((rank, _Failure(traceback.format_exc())))
        return
    answers.put((rank, result))
    dist.barrier()
    dist.destroy_process_group()
