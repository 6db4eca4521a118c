"""Hand-written PyTorch, the cohort side by side: `torch.func.vmap` over clients, masked, padded to the longest.

`vmap` has no rule for PyTorch's LSTM, so that its cell is written out.
"""

import numpy as np
import torch
from protocol import Job, Peer, padded, serve
from torch.func import functional_call, grad, vmap
from torch_models import DEVICE, LSTM, examples_of, losses, model_of, synchronize, total_loss


def unrolled(params: dict, x: torch.Tensor) -> torch.Tensor:
    """The model of `torch_models.LSTM`, step by step."""
    u = params["embed.weight"][x] @ params["lstm.weight_ih_l0"].T + params["lstm.bias_ih_l0"]
    h = c = torch.zeros(x.shape[0], params["lstm.weight_hh_l0"].shape[1], device=x.device)
    outputs = []
    for u_t in u.unbind(1):
        i, f, g, o = (u_t + h @ params["lstm.weight_hh_l0"].T).chunk(4, -1)
        c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
        h = torch.sigmoid(o) * torch.tanh(c)
        outputs.append(h)
    return torch.stack(outputs, 1) @ params["out.weight"].T + params["out.bias"]


def build(job: Job) -> Peer:
    """The peer."""
    torch.set_num_threads(job.cores)
    model = model_of(job)
    x, y = examples_of(job)
    shared = {name: p for name, p in model.named_parameters() if p.requires_grad}
    rng = np.random.default_rng(0)

    def batch_loss(params, x, y, real):
        logits = unrolled(params, x) if isinstance(model, LSTM) else functional_call(model, params, (x,))
        return (losses(logits, y) * real).sum() / real.sum().clamp(min=1)

    gradients = vmap(grad(batch_loss))

    def one_round(ids: np.ndarray) -> None:
        rows, real, steps = (torch.from_numpy(a).to(DEVICE) for a in padded(job, ids, rng))
        weight = torch.from_numpy(job.size[ids] / job.size[ids].sum()).float().to(DEVICE)
        with torch.no_grad():
            clients = {name: p.expand(len(ids), *p.shape).clone() for name, p in shared.items()}
            for t in range(int(steps.max())):
                at = rows[:, t]
                g = gradients(clients, x[at], y[at], real[:, t].float())
                torch._foreach_add_(list(clients.values()), [g[name] for name in clients], alpha=-job.learning_rate)
            for name, p in shared.items():
                p.copy_(torch.tensordot(weight, clients[name], 1))
        synchronize()

    return Peer(one_round, lambda: total_loss(job, model))


if __name__ == "__main__":
    serve(build)
