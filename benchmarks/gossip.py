"""What peers without a server cost: rounds a second and memory of many in one process, and what mixing alone takes.

Asked: how many peers with FedAvg's 2NN (199,210 parameters) one machine can simulate, what a round of each way to mix
costs, and what existing kits' design, a PyTorch process for each node, would need for as many.

Every peer takes one gradient of a batch of 20 images of MNIST's shape with momentum, then averages with its neighbours
(D-PSGD, adapt then combine). Each row is a process of its own, so that its peak memory is its own. The design with a
process a node is measured with a few nodes that exchange whole models with both neighbours of a ring over gloo, one
thread each, and multiplied: nodes share cores, so time grows with their number, and so does memory.

Command: python benchmarks/gossip.py
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

EACH, BATCH = 40, 20


def row(name: str, peers: int, rounds: int, cores: int | None) -> dict:
    """Measures one row in this process."""
    import jax
    import optax

    from jfed import clients, data, gossip, local, mesh, models, run, sampling

    mesh.use_cores(cores)
    graphs = gossip.topology
    graph = {
        "ring": graphs.ring,
        "one-peer exponential": graphs.one_peer_exponential,
        "exponential": graphs.exponential,
        "complete": graphs.complete,
    }[name](peers)
    devices = mesh.make((jax.device_count(),), ("peers",))
    on_cpu = jax.default_backend() == "cpu"
    if on_cpu and name != "complete":
        how = {
            "mixing": gossip.mix.on_mesh(devices),
            "client_map": clients.stationary(devices, clients.lanes(1), axis="peers"),
        }
    else:
        how = {"client_map": clients.lanes(1) if on_cpu else clients.vectorised()}
    model = models.two_nn()
    work = local.stochastic_gradient(models.cross_entropy(model), batch_size=BATCH)
    rng = np.random.default_rng(0)
    examples = {
        "x": rng.normal(size=(peers * EACH, 28, 28, 1)).astype(np.float32),
        "y": rng.integers(0, 10, peers * EACH).astype(np.int32),
    }
    population = data.population(examples, [EACH] * peers)
    params = model.init(jax.random.key(0))
    found = {"parameters": sum(x.size for x in jax.tree.leaves(params))}
    trains = gossip.adapt_then_combine(work, graph, optimizer=optax.sgd(0.05, momentum=0.9), **how)
    mixes = gossip.averaging(graph, mixing=how.get("mixing"))
    for what, algorithm in (("round", trains), ("mixing", mixes)):
        state = algorithm.init(params)
        moments = run.iterate(
            algorithm,
            sampling.full(steps=work.steps),
            population,
            state,
            jax.random.key(1),
            rounds=rounds + 1,
            donate=True,
        )
        del state
        seconds, began = [], time.perf_counter()
        for moment in moments:
            jax.block_until_ready(moment.state)
            now = time.perf_counter()
            seconds.append(now - began)
            began = now
            loss = float(moment.metrics["loss"][-1])
        if what == "round":
            found |= {"loss": loss, "first": seconds[0], "bytes up": int(moment.metrics["traffic"].up.max())}
            found["peak bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
            if not on_cpu:
                found["peak bytes"] = jax.devices()[0].memory_stats()["peak_bytes_in_use"]
        found[what] = statistics.median(seconds[1:])
    return found | {"device": jax.devices()[0].device_kind, "jax": jax.__version__, "devices": jax.device_count()}


def why(done: subprocess.CompletedProcess) -> str:
    """The last line of what a process that failed said."""
    return (done.stderr.strip().splitlines() or ["killed"])[-1]


def main() -> None:
    """Measures each row in a process of its own and prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers", type=int, nargs="+", default=[64, 256, 1024])
    parser.add_argument("--topologies", nargs="+", default=["ring", "one-peer exponential", "exponential", "complete"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--nodes", type=int, nargs="*", default=[4, 8, 16], help="processes of the other design")
    parser.add_argument("--torch", default=sys.executable, help="a Python that has PyTorch")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--smoke", action="store_true")
    parser.add_argument("--row", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.row:
        print(json.dumps(row(args.row[0], int(args.row[1]), args.rounds, None)))
        return
    from jfed import report

    if args.smoke:
        args.peers, args.topologies, args.rounds, args.nodes = [8], ["ring", "complete"], 1, []
    table, found = [], {}
    for name in args.topologies:
        for peers in args.peers:
            command = [sys.executable, __file__, "--row", name, str(peers), "--rounds", str(args.rounds)]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                table.append(
                    {
                        "topology": name,
                        "peers": peers,
                        "round, s": why(done)[:60],
                    }
                )
                continue
            one = found[f"{name}, {peers}"] = json.loads(done.stdout.splitlines()[-1])
            table.append(
                {
                    "topology": name,
                    "peers": peers,
                    "round, s": f"{one['round']:.3g}",
                    "mixing alone, s": f"{one['mixing']:.3g}",
                    "rounds a second": f"{1 / one['round']:.3g}",
                    "peak memory, GB": f"{one['peak bytes'] / 1e9:.3g}",
                    "MB sent a peer": f"{one['bytes up'] / 1e6:.3g}",
                }
            )
    print(report.table(f"A round, {BATCH} examples a peer, median of {args.rounds}", table))
    rows = []
    for nodes in args.nodes:
        script = Path(__file__).parent / "peers" / "torch_gossip.py"
        done = subprocess.run(
            [args.torch, str(script), str(nodes), str(4 * args.rounds)], capture_output=True, text=True
        )
        if done.returncode:
            print(f"{nodes} processes of PyTorch: {(done.stderr.strip().splitlines() or ['killed'])[-1]}")
            continue
        one = found[f"processes, {nodes}"] = json.loads(done.stdout.splitlines()[-1])
        most = max(args.peers)
        rows.append(
            {
                "processes": nodes,
                "cores": one["cores"],
                "round, s": f"{one['round']:.3g}",
                "MB a process": f"{one['bytes'] / 1e6:.0f}",
                f"{most} nodes: round, s": f"{one['round'] * most / nodes:.3g}",
                f"{most} nodes: GB": f"{one['bytes'] * most / 1e9:.0f}",
            }
        )
    if rows:
        print(report.table("A PyTorch process for each node, on a ring", rows))
    if args.out:
        args.out.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
