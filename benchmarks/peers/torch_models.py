"""The four models in PyTorch, and one client's training as one would write it by hand.

Letters: B batch size, T time steps.
"""

import functools

import numpy as np
import torch
from protocol import Job, load, mean_over
from torch import nn
from torch.nn import functional as F

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


class MLP(nn.Module):
    """Dense layers with ReLU between them; one layer is logistic regression."""

    def __init__(self, *sizes: int):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in zip(sizes[:-1], sizes[1:], strict=True))

    def forward(self, x):
        """[B, features] -> [B, classes]."""
        for layer in self.layers[:-1]:
            x = F.relu(layer(x))
        return self.layers[-1](x)


class CNN(nn.Module):
    """Two convolutions, one pooling, two dense layers."""

    def __init__(self, pooling: str):
        super().__init__()
        self.pooling = pooling
        self.convs = nn.ModuleList((nn.Conv2d(3, 32, 3), nn.Conv2d(32, 64, 3)))
        self.layers = nn.ModuleList((nn.Linear(14 * 14 * 64, 128), nn.Linear(128, 10)))

    def forward(self, x):
        """[B, 3, 32, 32] -> [B, 10]."""
        x = F.relu(self.convs[1](F.relu(self.convs[0](x))))
        if self.pooling == "reshape":
            x = x.unflatten(2, (-1, 2)).unflatten(4, (-1, 2)).amax((3, 5))
        else:
            x = F.max_pool2d(x, 2)
        return self.layers[1](F.relu(self.layers[0](x.flatten(1))))


class LSTM(nn.Module):
    """Embedding, one LSTM layer, dense; PyTorch's second bias stays zero, so that parameters and steps match."""

    def __init__(self, symbols: int, embedding: int, hidden: int):
        super().__init__()
        self.embed = nn.Embedding(symbols, embedding)
        self.lstm = nn.LSTM(embedding, hidden, batch_first=True)
        self.lstm.bias_hh_l0.requires_grad_(False)
        self.out = nn.Linear(hidden, symbols)

    def forward(self, x):
        """[B, T] -> [B, T, symbols]."""
        return self.out(self.lstm(self.embed(x))[0])


def model_of(job: Job) -> nn.Module:
    """The task's model with the job's initial parameters."""
    p = {name: torch.from_numpy(value) for name, value in job.params.items()}
    dense = sorted(name.split("/")[0] for name in p if name.startswith("dense") and name.endswith("kernel"))
    if job.task == "lstm":
        (symbols, embedding), hidden = p["embed/embedding"].shape, p["layer_0/recurrent"].shape[0]
        model = LSTM(symbols, embedding, hidden)
        pairs = [
            (model.embed.weight, p["embed/embedding"]),
            (model.lstm.weight_ih_l0, p["layer_0/input"].T),
            (model.lstm.weight_hh_l0, p["layer_0/recurrent"].T),
            (model.lstm.bias_ih_l0, p["layer_0/bias"]),
            (model.lstm.bias_hh_l0, torch.zeros(4 * hidden)),
            (model.out.weight, p["out/kernel"].T),
            (model.out.bias, p["out/bias"]),
        ]
    else:
        if job.task == "cnn":
            model = CNN(job.pooling)
            # Dense rows are ordered as a [height, width, channels] image is flattened; PyTorch's has channels first.
            kernel = p["dense_0/kernel"]
            p["dense_0/kernel"] = kernel.reshape(14, 14, 64, -1).permute(2, 0, 1, 3).reshape(kernel.shape)
        else:
            model = MLP(p["dense_0/kernel"].shape[0], *(p[f"{name}/kernel"].shape[1] for name in dense))
        pairs = []
        for name, layer in zip(dense, model.layers, strict=True):
            pairs += [(layer.weight, p[f"{name}/kernel"].T), (layer.bias, p[f"{name}/bias"])]
        for i, layer in enumerate(getattr(model, "convs", ())):
            pairs += [(layer.weight, p[f"conv_{i}/kernel"].permute(3, 2, 0, 1)), (layer.bias, p[f"conv_{i}/bias"])]
    with torch.no_grad():
        for mine, given in pairs:
            mine.copy_(given)
    return model.to(DEVICE)


def examples_of(job: Job) -> tuple[torch.Tensor, torch.Tensor]:
    """All examples as PyTorch has them: channels first, labels int64."""
    x, y = torch.from_numpy(job.x), torch.from_numpy(job.y).long()
    return (x.permute(0, 3, 1, 2).contiguous() if x.ndim == 4 else x.long() if job.task == "lstm" else x).to(
        DEVICE
    ), y.to(DEVICE)


def losses(logits: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """[B] cross-entropy of each example, a sequence's being the mean over where `y` is not -1."""
    if y.ndim == 1:
        return F.cross_entropy(logits, y, reduction="none")
    each = F.cross_entropy(logits.transpose(1, 2), y, reduction="none", ignore_index=-1)
    return each.sum(1) / (y >= 0).sum(1).clamp(min=1)


def total_loss(job: Job, model: nn.Module) -> float:
    """The mean over the examples that are judged."""

    @torch.no_grad()
    def of(x: np.ndarray, y: np.ndarray) -> np.ndarray:
        part = job._replace(x=x, y=y)
        x, y = examples_of(part)
        return losses(model(x), y).cpu().numpy()

    return mean_over(job, of)


class Client:
    """Trains one model on one client after another."""

    def __init__(self, job: Job):
        self.job, self.model = job, model_of(job)
        self.x, self.y = examples_of(job)
        self.trained = [p for p in self.model.parameters() if p.requires_grad]

    def train(self, i: int) -> None:
        """One epoch of plain SGD on client `i`, from where the model is."""
        first, size = int(self.job.start[i]), int(self.job.size[i])
        order = first + torch.randperm(size, device=self.x.device)
        for rows in order.split(self.job.batch_size):
            loss = losses(self.model(self.x[rows]), self.y[rows]).mean()
            gradients = torch.autograd.grad(loss, self.trained)
            with torch.no_grad():
                torch._foreach_add_(self.trained, gradients, alpha=-self.job.learning_rate)


@functools.cache
def client_at(path: str) -> Client:
    """The client of the job in a JSON file, kept for as long as the process lives."""
    return Client(load(path))


def synchronize() -> None:
    """Waits for the device."""
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
