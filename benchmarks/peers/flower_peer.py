"""Flower: its FedAvg strategy over its simulation on Ray.

Variants: "tuned" has one actor a core, a thread each, which keeps the model and steps by hand; "tutorial" has the
simulation's default resources, two CPUs a client, and trains as Flower's PyTorch tutorial does: a new model, a
DataLoader and an optimizer for every client of every round.

Data lie in each actor's memory. There is one virtual node a client of the COHORT and the server tells it
whom to play, which is lighter on Flower than a node for each client of the population. No evaluation, no logs.
"""

import logging
import sys
import threading
import time

import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import ServerApp
from flwr.serverapp.strategy import FedAvg
from flwr.simulation import run_simulation
from protocol import load, open_channel
from torch.utils.data import DataLoader, TensorDataset
from torch_models import Client, client_at, losses, model_of, total_loss

app = ClientApp()


@app.train()
def train(message: Message, context) -> Message:
    """One client's epoch, in an actor that keeps the data between calls."""
    config = message.content["config"]
    client, arrays, i = client_at(config["job"]), message.content["arrays"].to_torch_state_dict(), config["client"]
    if client.job.variant == "tuned":
        torch.set_num_threads(1)
        client.model.load_state_dict(arrays)
        client.train(i)
        model = client.model
    else:
        model = model_of(client.job)
        model.load_state_dict(arrays)
        as_in_the_tutorial(client, model, i)
    content = {
        "arrays": ArrayRecord(model.state_dict()),
        "metrics": MetricRecord({"num-examples": int(client.job.size[i])}),
    }
    return Message(content=RecordDict(content), reply_to=message)


def as_in_the_tutorial(client: Client, model: torch.nn.Module, i: int) -> None:
    """One client's epoch with what PyTorch has for it."""
    rows = slice(int(client.job.start[i]), int(client.job.start[i] + client.job.size[i]))
    examples = TensorDataset(client.x[rows], client.y[rows])
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=client.job.learning_rate)
    for x, y in DataLoader(examples, batch_size=client.job.batch_size, shuffle=True):
        optimizer.zero_grad()
        losses(model(x), y).mean().backward()
        optimizer.step()


def main() -> None:
    """Runs Flower's own loop over rounds, held up between two of them until the next is asked for."""
    logging.getLogger("flwr").setLevel(logging.ERROR)
    hear, say = open_channel()
    path = sys.argv[1]
    job = load(path)
    say({"ready": True})
    if hear() != "round":
        return
    started = time.perf_counter()
    model = model_of(job)

    class Cohorts(FedAvg):
        """FedAvg whose cohorts are given."""

        began = started

        def configure_train(self, server_round, arrays, config, grid):
            """Waits for the word, then names the client of every node."""
            if server_round > 1:
                if hear() != "round":
                    model.load_state_dict(arrays.to_torch_state_dict())
                    say({"loss": total_loss(job, model)})
                    threading.Event().wait()  # to be killed: Flower cannot end before its rounds do
                self.began = time.perf_counter()
            nodes, clients = sorted(grid.get_node_ids()), job.cohorts[server_round - 1].tolist()
            while len(nodes) < len(clients):  # the simulation is still starting
                time.sleep(0.1)
                nodes = sorted(grid.get_node_ids())
            return [
                Message(
                    content=RecordDict({"arrays": arrays, "config": ConfigRecord({"job": path, "client": client})}),
                    message_type="train",
                    dst_node_id=node,
                )
                for node, client in zip(nodes, clients, strict=True)
            ]

        def aggregate_train(self, server_round, replies):
            """Flower's own aggregation, and the time."""
            replies = list(replies)
            for reply in replies:
                if reply.has_error():
                    raise RuntimeError(reply.error.reason)
            result = super().aggregate_train(server_round, replies)
            say({"seconds": time.perf_counter() - self.began})
            return result

    server = ServerApp()

    @server.main()
    def serve(grid, context):
        strategy = Cohorts(fraction_evaluate=0.0)
        strategy.start(grid, ArrayRecord(model.state_dict()), num_rounds=len(job.cohorts) + 1)

    run_simulation(
        server,
        app,
        num_supernodes=job.cohorts.shape[1],
        backend_config=({"client_resources": {"num_cpus": 1, "num_gpus": 0.0}} if job.variant == "tuned" else {})
        | {
            "init_args": {"num_cpus": job.cores, "log_to_driver": False, "logging_level": "error"},
        },
    )


if __name__ == "__main__":
    main()
