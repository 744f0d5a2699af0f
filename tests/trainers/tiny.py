"""A model with what makes sharding hard, and steps of training it."""

import torch
from torch import Tensor, nn

VOCABULARY = 11


class Tiny(nn.Module):
    """Sizes that no number of ranks divides, fewer rows than ranks, tied and scalar weights."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, 6)
        self.layers = nn.ModuleList([nn.Linear(6, 5), nn.Linear(5, 3), nn.Linear(3, 6)])
        self.brief = nn.Linear(6, 7, dtype=torch.bfloat16)
        self.norm = nn.BatchNorm1d(6)
        self.head = nn.Linear(6, VOCABULARY, bias=False)
        self.head.weight = self.embed.weight
        self.scale = nn.Parameter(torch.tensor(1.5))
        self.register_buffer("frequencies", torch.linspace(1.0, 2.0, 3))
        self.register_buffer("seen", torch.tensor(0))
        self.seen: Tensor
        self.frequencies: Tensor

    def forward(self, tokens: Tensor) -> Tensor:
        """Return the logits of the next token, one row per token."""
        self.seen += tokens.numel()
        self.frequencies *= 1.01
        value = self.embed(tokens).flatten(0, 1)  # (tokens, 6)
        for layer in self.layers:
            value = torch.tanh(layer(value))
        brief = self.brief(value.to(self.brief.weight.dtype)).to(value.dtype)
        value = value + brief.mean(dim=1, keepdim=True)
        logits: Tensor = self.head(self.norm(value)) * self.scale  # (tokens, VOCABULARY)
        return logits


def build() -> Tiny:
    """Return a new model, the same in every process."""
    torch.manual_seed(0)
    return Tiny()


def tokens(step: int) -> Tensor:
    """Return the batch of a step."""
    generator = torch.Generator().manual_seed(step)
    return torch.randint(0, VOCABULARY, (4, 5), generator=generator)


def train_step(model: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> None:
    """Learn to say each token again."""
    batch = tokens(step)
    loss = nn.functional.cross_entropy(model(batch), batch.flatten())
    torch.autograd.backward(loss)
    optimizer.step()
    optimizer.zero_grad()
