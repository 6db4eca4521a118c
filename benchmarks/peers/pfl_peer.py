"""pfl-research: FederatedAveraging on its simulated backend, users' data in memory.

Variants are numbers of processes. The first process starts the others as `torchrun` would and passes on
what it is told; pfl deals users to processes by their number of examples and sums over gloo. Each user's
data set keeps its batches, as pfl does it: they are not shuffled.
"""

import itertools
import os
import socket
import subprocess
import sys
import time

from protocol import load, open_channel


def launch(processes: int) -> list[subprocess.Popen]:
    """Makes this process the first of several, and starts the others."""
    if processes == 1 or "RANK" in os.environ:
        return []
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    os.environ.update(
        TORCHELASTIC_RUN_ID="pfl", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), WORLD_SIZE=str(processes),
        LOCAL_WORLD_SIZE=str(processes), OMP_NUM_THREADS="1",
    )  # fmt: skip
    others = [
        subprocess.Popen(
            [sys.executable, *sys.argv],
            env=os.environ | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            text=True,
        )
        for rank in range(1, processes)
    ]
    os.environ.update(RANK="0", LOCAL_RANK="0")
    return others


def main() -> None:
    """Runs pfl's own loop over rounds, held up between two of them until the next is asked for."""
    hear, say = open_channel()
    job = load(sys.argv[1])
    processes = int(job.variant)
    others = launch(processes)

    import torch
    from pfl.aggregate.simulate import SimulatedBackend
    from pfl.aggregate.weighting import WeightByDatapoints
    from pfl.algorithm.base import NNAlgorithmParams
    from pfl.algorithm.federated_averaging import FederatedAveraging
    from pfl.callback.base import TrainingProcessCallback
    from pfl.data import FederatedDataset
    from pfl.data.dataset import Dataset
    from pfl.hyperparam import NNTrainHyperParams
    from pfl.metrics import Metrics
    from pfl.model.pytorch import PyTorchModel
    from torch_models import examples_of, losses, model_of, total_loss

    torch.set_num_threads(job.cores // processes)

    def command() -> str:
        heard = hear()
        for other in others:
            print(heard, file=other.stdin, flush=True)
        return heard

    say({"ready": True})
    if command() != "round":
        return
    started = time.perf_counter()
    module = model_of(job)
    module.loss = lambda x, y: losses(module(x), y).mean()
    module.metrics = lambda x, y: {}
    x, y = examples_of(job)
    users = [
        Dataset((x[first : first + n], y[first : first + n]), user_id=i)
        for i, (first, n) in enumerate(zip(job.start.tolist(), job.size.tolist(), strict=True))
    ]
    order = itertools.cycle(job.cohorts.ravel().tolist())  # without end, for pfl draws users far ahead
    sizes = dict(enumerate(job.size.tolist())) if processes > 1 else None
    backend = SimulatedBackend(
        training_data=FederatedDataset(users.__getitem__, lambda: next(order), user_id_to_weight=sizes),
        val_data=None,
        postprocessors=[WeightByDatapoints()],
    )

    class Between(TrainingProcessCallback):
        """Answers, waits for the next command."""

        began = started

        def after_central_iteration(self, aggregate_metrics, model, *, central_iteration):
            """True to stop."""
            say({"seconds": time.perf_counter() - self.began})
            heard = command()
            self.began = time.perf_counter()
            return heard != "round", Metrics()

    rounds = job.cohorts.shape[0]
    FederatedAveraging().run(
        NNAlgorithmParams(
            central_num_iterations=rounds + 1,
            evaluation_frequency=rounds + 1,
            train_cohort_size=job.cohorts.shape[1],
            val_cohort_size=0,
        ),
        backend,
        PyTorchModel(
            model=module,
            local_optimizer_create=torch.optim.SGD,
            central_optimizer=torch.optim.SGD(module.parameters(), lr=1.0),
        ),
        NNTrainHyperParams(local_batch_size=job.batch_size, local_num_epochs=1, local_learning_rate=job.learning_rate),
        callbacks=[Between()],
        send_metrics_to_platform=False,
    )
    say({"loss": total_loss(job, module)})
    for other in others:
        other.wait(30)


if __name__ == "__main__":
    main()
