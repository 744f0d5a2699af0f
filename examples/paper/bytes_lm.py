"""A language model of bytes without BatchNorm, and the text that is on every machine: Python code.

Everything a step needs is on the device: the text is one tensor of bytes, and a batch is one
indexing operation.
"""

import copy
import hashlib
import math
import sysconfig
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

N_BYTES = 256
VALIDATION_SHARE = 1 / 16  # of the files
HEAD_WIDTH = 64
WARMUP_STEPS = 200
MAX_GRADIENT_NORM = 1.0
TIMED_STEPS = 40  # after as many that are not: the first are slow

Text = tuple[Tensor, Tensor]  # bytes to learn, and bytes to validate with; uint8, on the device


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """Sizes of the model and its training.

    Attributes:
        n_blocks, width, context: Of the network.
        batch: Windows of ``context`` bytes a step.
        stable_steps: Steps at the constant rate before the first checkpoint that is averaged.
        more_steps: Steps from there: at the constant rate with checkpoints, and again with decay.
        n_checkpoints: So many are saved on the way.
        rate: The constant learning rate.
        max_bytes: Where the text ends.
        validation_bytes: So many are validated with.
    """

    n_blocks: int = 12
    width: int = 512
    context: int = 512
    batch: int = 128
    stable_steps: int = 2000
    more_steps: int = 1000
    n_checkpoints: int = 20
    rate: float = 1e-3
    max_bytes: int = 400_000_000
    validation_bytes: int = 2_000_000

    @property
    def interval(self) -> int:
        """Steps from checkpoint to checkpoint."""
        return self.more_steps // self.n_checkpoints

    def cut(self, seconds_a_step: float, seconds: float) -> "Sizes":
        """Return sizes with so many fewer steps that training takes no longer than it may."""
        share = min(1.0, seconds / (seconds_a_step * (self.stable_steps + 2 * self.more_steps)))
        return replace(
            self,
            stable_steps=max(1, int(self.stable_steps * share)),
            more_steps=max(1, int(self.interval * share)) * self.n_checkpoints,
        )


class Block(nn.Module):
    """Pre-normalised transformer block: attention, then a feed-forward network."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.n_heads = max(1, width // HEAD_WIDTH)
        self.norm1 = nn.LayerNorm(width, bias=False)
        self.query_key_value = nn.Linear(width, 3 * width, bias=False)
        self.attention_out = nn.Linear(width, width, bias=False)
        self.norm2 = nn.LayerNorm(width, bias=False)
        self.up = nn.Linear(width, 4 * width, bias=False)
        self.down = nn.Linear(4 * width, width, bias=False)

    def forward(self, hidden: Tensor) -> Tensor:
        """Map ``(batch, length, width)`` to the same."""
        batch, length, width = hidden.shape
        heads = self.query_key_value(self.norm1(hidden))
        query, key, value = heads.view(batch, length, 3, self.n_heads, -1).permute(2, 0, 3, 1, 4)
        attended = functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        attended = attended.transpose(1, 2).reshape(batch, length, width)
        hidden = hidden + self.attention_out(attended)
        out: Tensor = hidden + self.down(functional.gelu(self.up(self.norm2(hidden))))
        return out


class Gpt(nn.Module):
    """A model of bytes with tied embeddings; 38 million parameters at 12 blocks of width 512."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.bytes = nn.Embedding(N_BYTES, sizes.width)
        self.positions = nn.Embedding(sizes.context, sizes.width)
        self.blocks = nn.Sequential(*[Block(sizes.width) for _ in range(sizes.n_blocks)])
        self.norm = nn.LayerNorm(sizes.width, bias=False)
        self.head = nn.Linear(sizes.width, N_BYTES, bias=False)
        self.head.weight = self.bytes.weight
        for name, parameter in self.named_parameters():
            if parameter.dim() > 1:
                into_the_sum = name.endswith(("attention_out.weight", "down.weight"))
                nn.init.normal_(
                    parameter, std=0.02 / math.sqrt(2 * sizes.n_blocks) if into_the_sum else 0.02
                )

    def forward(self, read: Tensor) -> Tensor:
        """Map bytes ``(batch, length)`` to logits ``(batch, length, 256)``."""
        hidden = self.bytes(read) + self.positions.weight[: read.shape[1]]
        logits: Tensor = self.head(self.norm(self.blocks(hidden)))
        return logits


def python_text(sizes: Sizes, device: str) -> Text:
    """Return all Python files of this installation, each once; every 16th is held out.

    A file's place follows from the hash of its content: copies of one file are on one side.
    """
    parts: tuple[list[bytes], list[bytes]] = ([], [])
    n_bytes, seen = 0, set[bytes]()
    for path in python_files():
        try:
            content = path.read_bytes()
        except OSError:  # such as a link to nowhere
            continue
        digest = hashlib.sha256(content).digest()
        if digest in seen or not content:
            continue
        seen.add(digest)
        parts[digest[0] < VALIDATION_SHARE * 256].append(content)
        n_bytes += len(content)
        if n_bytes >= sizes.max_bytes:
            break
    learn, validate = (
        torch.frombuffer(bytearray(b"\n".join(part)), dtype=torch.uint8).to(device)
        for part in parts
    )
    return learn, validate


def python_files() -> Iterator[Path]:
    """Yield the files of the standard library, then those of packages, in a fixed order."""
    folders = [Path(sysconfig.get_path(name)) for name in ("stdlib", "purelib", "platlib")]
    for folder in dict.fromkeys(folders):
        yield from sorted(folder.rglob("*.py"))


class Training:
    """A model in training, which can go back to where it was."""

    def __init__(self, text: Text, sizes: Sizes, seed: int, device: str, *, compiled: bool) -> None:
        torch.manual_seed(seed)
        self.text, self.sizes, self.device = text, sizes, device
        self.model = Gpt(sizes).to(device)
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(),
            sizes.rate,
            betas=(0.9, 0.95),
            weight_decay=0.1,
            fused=device.startswith("cuda"),
        )
        self.random = torch.Generator(device).manual_seed(seed)
        self._offsets = torch.arange(sizes.context + 1, device=device)
        self._called: Callable[[Tensor], Tensor] = (
            torch.compile(self.model) if compiled else self.model
        )

    def step(self, rate: float) -> Tensor:
        """Take one step; return its loss in nats a byte, on the device."""
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        n_starts = len(self.text[0]) - self.sizes.context
        starts = torch.randint(
            n_starts, (self.sizes.batch, 1), generator=self.random, device=self.device
        )
        loss = loss_of(self._called, self.text[0][starts + self._offsets], self.device)
        self.optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
        nn.utils.clip_grad_norm_(self.model.parameters(), MAX_GRADIENT_NORM)
        self.optimizer.step()
        return loss.detach()

    def state(self) -> tuple[object, ...]:
        """Return a copy of all that a step changes."""
        return copy.deepcopy(
            (self.model.state_dict(), self.optimizer.state_dict(), self.random.get_state())
        )

    def go_back(self, state: tuple[object, ...]) -> None:
        """Go back to a state."""
        weights, moments, random = copy.deepcopy(state)
        self.model.load_state_dict(weights)  # type: ignore[arg-type]
        self.optimizer.load_state_dict(moments)  # type: ignore[arg-type]
        self.random.set_state(random)  # type: ignore[arg-type]

    def save(self, step: int, path: Path) -> None:
        """Save the weights, which are float32."""
        torch.save({"step": step, "model": self.model.state_dict()}, path)


@dataclass(frozen=True, slots=True, kw_only=True)
class Trained:
    """What a run was, and came to.

    Attributes:
        sizes: With the steps that were taken.
        seconds_a_step: Measured near the beginning.
        seconds: Of all training, saving included.
        bytes_learned: How many there are to learn.
        train_loss: Mean of the constant phase's last hundred steps, in nats a byte.
        decayed: What validation says after the decay.
    """

    sizes: Sizes
    seconds_a_step: float
    seconds: float
    bytes_learned: int
    train_loss: float
    decayed: dict[str, float]


def train(
    training: Training, run_dir: Path, *, seconds: float, say: Callable[[str], None]
) -> Trained:
    """Train at a constant rate and save checkpoints; then decay from where they begin.

    The decay is 1-sqrt to zero, which Hagele et al. 2024 found best.

    Args:
        training: At its beginning.
        run_dir: Gets ``step-*.pt``.
        seconds: What it may take: where it would take longer, there are fewer steps.
        say: Told how it goes.
    """
    started = time.perf_counter()
    sizes, seconds_a_step = training.sizes, 0.0
    run_dir.mkdir(parents=True, exist_ok=True)
    number, timed_from = 0, 0.0
    while number < sizes.stable_steps:
        number += 1
        loss = training.step(sizes.rate * min(1.0, number / WARMUP_STEPS))
        if number == TIMED_STEPS:
            loss.item()  # waits for the device
            timed_from = time.perf_counter()
        if number == 2 * TIMED_STEPS:
            loss.item()
            seconds_a_step = (time.perf_counter() - timed_from) / TIMED_STEPS
            sizes = sizes.cut(seconds_a_step, seconds)
            say(
                f"{1000 * seconds_a_step:.1f} ms a step: {sizes.stable_steps} steps, then "
                f"{sizes.more_steps} more, twice"
            )
        if number % 200 == 0:
            say(f"step {number}: {loss.item():.4f} nats a byte")
    n_stable = number
    stable = training.state()
    training.save(n_stable, run_dir / f"step-{n_stable:05d}.pt")
    total = torch.zeros((), device=training.device)
    n_last = min(100, sizes.more_steps)
    for number in range(1, sizes.more_steps + 1):
        loss = training.step(sizes.rate)
        total += loss if number > sizes.more_steps - n_last else 0
        if number % sizes.interval == 0:
            training.save(n_stable + number, run_dir / f"step-{n_stable + number:05d}.pt")
    say(f"step {n_stable + number}: {total.item() / n_last:.4f} nats a byte")
    training.go_back(stable)
    for number in range(sizes.more_steps):
        training.step(sizes.rate * (1 - math.sqrt((number + 0.5) / sizes.more_steps)))
    decayed = validation_loss(training.text, sizes, training.device, training.model)
    return Trained(
        sizes=replace(sizes, stable_steps=n_stable),
        seconds_a_step=seconds_a_step,
        seconds=time.perf_counter() - started,
        bytes_learned=len(training.text[0]),
        train_loss=total.item() / n_last,
        decayed=decayed,
    )


def loss_of(model: Callable[[Tensor], Tensor], windows: Tensor, device: str) -> Tensor:
    """Return the mean cross-entropy of the next byte in nats; ``windows`` is (n, length) uint8."""
    windows = windows.long()
    with torch.autocast(
        torch.device(device).type, dtype=torch.bfloat16, enabled=device.startswith("cuda")
    ):
        logits = model(windows[:, :-1])
    return functional.cross_entropy(logits.float().flatten(0, 1), windows[:, 1:].flatten())


@torch.no_grad()
def validation_loss(text: Text, sizes: Sizes, device: str, model: nn.Module) -> dict[str, float]:
    """Judge a model by the bytes that are held out: nats a byte, and bits."""
    model.eval()
    n_windows = min(len(text[1]) - 1, sizes.validation_bytes) // sizes.context
    at = torch.arange(n_windows, device=device)[:, None] * sizes.context
    windows = text[1][at + torch.arange(sizes.context + 1, device=device)]
    total = torch.zeros((), dtype=torch.float64, device=device)
    for part in torch.split(windows, sizes.batch):
        total += len(part) * loss_of(model, part, device)
    nats = total.item() / n_windows
    return {"val_loss": nats, "bits": nats / math.log(2)}
