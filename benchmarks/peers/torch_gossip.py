"""A process for each node, as kits of decentralised learning on PyTorch are built: D-PSGD on a ring over gloo.

    python torch_gossip.py NODES ROUNDS

Each node has the 2NN, one thread, its own images; a round is one gradient with momentum, then its parameters travel as
one vector to both neighbours, and theirs here. Prints the median seconds of a round and the mean resident bytes of a
process at its end, proportional to what it shares with others.
"""

import json
import os
import socket
import statistics
import sys
import time

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

BATCH, EACH = 20, 40


def node(rank, nodes, rounds, port, out):
    """One node of the ring."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    dist.init_process_group("gloo", rank=rank, world_size=nodes)
    model = torch.nn.Sequential(
        torch.nn.Linear(784, 200), torch.nn.ReLU(), torch.nn.Linear(200, 200), torch.nn.ReLU(), torch.nn.Linear(200, 10)
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    generator = torch.Generator().manual_seed(rank)
    x = torch.randn(EACH, 784, generator=generator)
    y = torch.randint(0, 10, (EACH,), generator=generator)
    size = sum(p.numel() for p in model.parameters())
    left, right = torch.empty(size), torch.empty(size)
    seconds = []
    for t in range(rounds + 1):
        dist.barrier()
        began = time.perf_counter()
        batch = torch.randperm(EACH, generator=generator)[:BATCH]
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(x[batch]), y[batch]).backward()
        optimizer.step()
        flat = torch.nn.utils.parameters_to_vector(model.parameters()).detach()
        before, after = (rank - 1) % nodes, (rank + 1) % nodes
        waits = [dist.isend(flat, before, tag=0), dist.isend(flat, after, tag=1)]
        waits += [dist.irecv(right, after, tag=0), dist.irecv(left, before, tag=1)]
        for wait in waits:
            wait.wait()
        torch.nn.utils.vector_to_parameters((flat + left + right) / 3, model.parameters())
        dist.barrier()
        seconds.append(time.perf_counter() - began)
    with open("/proc/self/smaps_rollup") as file:
        held = next(int(line.split()[1]) * 1024 for line in file if line.startswith("Pss:"))
    dist.barrier()
    out.put((statistics.median(seconds[1:]), held))
    dist.destroy_process_group()


def main():
    """Starts the nodes."""
    nodes, rounds = int(sys.argv[1]), int(sys.argv[2])
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = mp.get_context("spawn")
    out = context.Queue()
    processes = [context.Process(target=node, args=(i, nodes, rounds, port, out)) for i in range(nodes)]
    for process in processes:
        process.start()
    found = [out.get() for _ in processes]
    for process in processes:
        process.join()
    print(
        json.dumps(
            {
                "round": statistics.median(seconds for seconds, _ in found),
                "bytes": statistics.mean(held for _, held in found),
                "cores": len(os.sched_getaffinity(0)),
                "torch": torch.__version__,
            }
        )
    )


if __name__ == "__main__":
    main()
