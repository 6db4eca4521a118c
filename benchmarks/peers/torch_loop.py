"""Hand-written PyTorch: a loop over clients, data in one tensor, SGD by fused in-place operations.

Variants are numbers of threads.
"""

import numpy as np
import torch
from protocol import Job, Peer, serve
from torch_models import Client, synchronize, total_loss


def build(job: Job) -> Peer:
    """The peer; one model is trained in place and set back for every client."""
    torch.set_num_threads(int(job.variant))
    client = Client(job)
    trained = client.trained

    @torch.no_grad()
    def copies() -> list[torch.Tensor]:
        return [p.detach().clone() for p in trained]

    def one_round(ids: np.ndarray) -> None:
        start, total = copies(), [torch.zeros_like(p) for p in trained]
        whole = int(job.size[ids].sum())
        for i in ids:
            with torch.no_grad():
                torch._foreach_copy_(trained, start)
            client.train(i)
            with torch.no_grad():
                torch._foreach_add_(total, trained, alpha=int(job.size[i]) / whole)
        with torch.no_grad():
            torch._foreach_copy_(trained, total)
        synchronize()

    return Peer(one_round, lambda: total_loss(job, client.model))


if __name__ == "__main__":
    serve(build)
