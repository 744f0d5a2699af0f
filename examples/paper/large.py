"""The same questions at a larger size, for one GPU and ten minutes.

Run it in an environment with ckptavg; a GPU with 24 GB or more is best, 6 GB of disk are needed::

    python large.py                      # both parts within --minutes
    python large.py --only lm
    python large.py --only batchnorm     # needs mnist1d
    python large.py --tiny --device cpu  # does it run at all? A minute, and no meaning

1. **lm**: a language model without BatchNorm (BN), 38 million parameters, learns the bytes of all
   Python files of this installation; every 16th file is held out. After a stable phase it goes on
   at its constant rate, with 20 checkpoints, and again with a learning rate that falls to zero.
   How much of what the real decay brings do averages of the checkpoints bring, for nothing?
2. **batchnorm**: the SWA paper's Table 1 with the network of ``reproduce.py``, eight times as wide.

Where time is short there are fewer steps, or fewer seeds; what was run is said in the results.
"""

import argparse
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from bytes_lm import Gpt, Sizes, Text, Trained, Training, python_text, train, validation_loss
from files import has_matplotlib, print_facts, write_csv, write_json, write_pictures

import ckptavg
from ckptavg.plots.style import BLUE, GREEN, ORANGE, open_up, pictures, styled

SCHEMES = {
    "uniform": "uniform",
    "linear": "linear",
    "EMA 0.9": "ema:decay=0.9",
    "EMA 0.8": "ema:decay=0.8",
    "EMA 0.5": "ema:decay=0.5",
    "power-function EMA 0.05": "power:sigma=0.05",
    "power-function EMA 0.10": "power:sigma=0.1",
    "WSM linear": "wsm:decay=linear",
    "WSM cosine": "wsm:decay=cosine",
    "WSM 1-sqrt": "wsm:decay=1-sqrt",
    "last 2": "uniform:last=2",
    "last 3": "uniform:last=3",
    "last 4": "uniform:last=4",
    "last 6": "uniform:last=6",
    "last 10": "uniform:last=10",
    "last 15": "uniform:last=15",
}
TINY = Sizes(
    n_blocks=1, width=64, context=64, batch=8, stable_steps=100, more_steps=60, n_checkpoints=20,
    rate=3e-3, max_bytes=2_000_000, validation_bytes=50_000,
)  # fmt: skip
LM_SHARE, LM_TRAINING_SHARE = 0.6, 0.75  # of all time, and of the language model's
BN_SHARE = 0.6  # of what is left: no seed is begun after that


def main() -> None:
    """Run the parts that were asked for."""
    arguments = parse_arguments()
    started = time.perf_counter()
    torch.set_float32_matmul_precision("high")  # TF32 where autocast leaves float32
    if arguments.device == "cpu":
        torch.set_num_threads(1)  # more are many times slower on a machine that is busy
    arguments.output.mkdir(parents=True, exist_ok=True)

    def left() -> float:
        return 60 * float(arguments.minutes) - (time.perf_counter() - started)

    def say(text: str) -> None:
        print(f"[{time.perf_counter() - started:4.0f} s] {text}", flush=True)

    if arguments.only != "batchnorm":
        share = 1.0 if arguments.only == "lm" else LM_SHARE
        language_model(arguments, LM_TRAINING_SHARE * share * left(), say)
    if arguments.only != "lm":
        wide_batchnorm(arguments, left, say)
    say("done")


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description="Averages at a larger size, for one GPU.")
    parser.add_argument("--only", choices=["lm", "batchnorm"], help="one part; default: both")
    parser.add_argument("--minutes", type=float, default=9, help="in all (%(default)s)")
    parser.add_argument(
        "--device", default="cuda" if torch.cuda.is_available() else "cpu", help="(%(default)s)"
    )
    parser.add_argument("--output", type=Path, default=Path("paper-large-output"))
    parser.add_argument("--tiny", action="store_true", help="sizes for a test")
    parser.add_argument("--compile", action="store_true", help="compile the language model")
    parser.add_argument("--blocks", type=int, help="of the language model (12)")
    parser.add_argument("--model-width", type=int, help="of the language model (512)")
    parser.add_argument("--batch", type=int, help="windows of text a step (128)")
    parser.add_argument("--rate", type=float, help="learning rate of the language model (1e-3)")
    parser.add_argument("--stable", type=int, help="steps before the first checkpoint (2000)")
    parser.add_argument("--more", type=int, help="steps to average, or to decay in (1000)")
    parser.add_argument("--width", type=int, default=64, help="of the BN network (%(default)s)")
    parser.add_argument(
        "--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4], help="of the BN network"
    )
    parser.add_argument(
        "--setups", choices=["clean", "noisy"], nargs="+", default=["noisy"],
        help="of the BN network: labels as they are, or a fifth of them redrawn (noisy)",
    )  # fmt: skip
    parser.add_argument(
        "--jobs", type=int, default=2,
        help="runs of the BN network at a time (%(default)s): more share a GPU badly",
    )  # fmt: skip
    return parser.parse_args()


# --- The language model -----------------------------------------------------------------------


def language_model(
    arguments: argparse.Namespace, seconds: float, say: Callable[[str], None]
) -> None:
    """Train, decay, sweep; write a table and a picture."""
    device: str = arguments.device
    given = {
        "n_blocks": arguments.blocks,
        "width": arguments.model_width,
        "batch": arguments.batch,
        "rate": arguments.rate,
        "stable_steps": arguments.stable,
        "more_steps": arguments.more,
    }
    sizes = replace(
        TINY if arguments.tiny else Sizes(),
        **{name: value for name, value in given.items() if value is not None},
    )
    text = python_text(sizes, device)
    say(f"{len(text[0]):,} bytes of Python to learn, {len(text[1]):,} held out")
    training = Training(text, sizes, 0, device, compiled=arguments.compile)
    n_parameters = sum(one.numel() for one in training.model.parameters())
    say(f"a language model of {n_parameters:,} parameters, on {device_name(device)}")
    run_dir = arguments.output / "runs" / "lm"
    for old in run_dir.glob("step-*.pt"):
        old.unlink()
    trained = train(training, run_dir, seconds=seconds, say=say)
    del training
    found = sweep(text, trained.sizes, run_dir, arguments.output / "best-lm", device)
    report = lm_report(trained, found, n_parameters, device_name(device))
    write_lm(arguments.output, report)
    print(f"\n{(arguments.output / 'lm.md').read_text(encoding='utf-8')}")
    print_facts(lm_facts(report))


def device_name(device: str) -> str:
    """Return what a device is called."""
    return torch.cuda.get_device_name(device) if device.startswith("cuda") else device


def sweep(
    text: Text, sizes: Sizes, run_dir: Path, output: Path, device: str
) -> ckptavg.SweepResult:
    """Make and judge all averages of the checkpoints, from one read."""
    return ckptavg.sweep(
        run_dir,
        output,
        schemes=list(SCHEMES.values()),
        evaluation=ckptavg.BnPass(
            model=partial(Gpt, sizes), evaluate=partial(validation_loss, text, sizes, device)
        ),
        metric="val_loss",
        overwrite=True,
        device=device,
    )


def lm_report(
    trained: Trained, found: ckptavg.SweepResult, n_parameters: int, where: str
) -> dict[str, Any]:
    """Return all that was measured of the language model, in the form that JSON keeps."""
    losses = {row.scheme: row.metrics["val_loss"] for row in found.rows if row.kind == "average"}
    singles = {row.name: row.metrics["val_loss"] for row in found.rows if row.kind == "single"}
    last = next(row.metrics["val_loss"] for row in found.rows if row.kind == "last")
    result = found.result
    return {
        "device": where,
        "torch": torch.__version__,
        "n_parameters": n_parameters,
        "trained": asdict(trained),
        "val_loss": {
            "last checkpoint (constant)": last,
            "real decay, 1-sqrt": trained.decayed["val_loss"],
            **{name: losses[scheme] for name, scheme in SCHEMES.items()},
        },
        "singles": [singles[name] for name in sorted(singles)],
        "sweep": {
            "seconds": result.seconds,
            "average_seconds": result.average_seconds,
            "read_bytes": result.read_nbytes,
            "written_bytes": result.written_nbytes,
            "times": asdict(result.times),
            "peak_host_bytes": result.peak_host_bytes,
            "peak_device_bytes": result.peak_device_bytes,
        },
    }


def write_lm(output: Path, report: dict[str, Any]) -> None:
    """Write the numbers as JSON, CSV and Markdown, and a picture where matplotlib is there."""
    losses: dict[str, float] = report["val_loss"]
    last, decayed = losses["last checkpoint (constant)"], losses["real decay, 1-sqrt"]
    shares = {name: (last - loss) / (last - decayed) for name, loss in losses.items()}
    write_json(output / "lm.json", report)
    write_csv(
        output / "lm.csv",
        ["model", "validation_loss_nats", "share_of_the_decays_gain"],
        [(name, loss, shares[name]) for name, loss in losses.items()],
    )
    lines = [
        f"| {'validation loss, nats a byte':<28} | nats   | of the decay's gain |",
        "|---|---|---|",
        *(f"| {name:<28} | {loss:.4f} | {shares[name]:>19.0%} |" for name, loss in losses.items()),
    ]
    (output / "lm.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    if has_matplotlib():
        draw_lm(output, report)


@styled()
def draw_lm(output: Path, report: dict[str, Any]) -> None:
    """Draw the losses of all averages between those of the constant rate and of the decay."""
    from matplotlib.figure import Figure

    losses: dict[str, float] = dict(report["val_loss"])
    last, decayed = (
        losses.pop(name) for name in ("last checkpoint (constant)", "real decay, 1-sqrt")
    )
    worst_first = sorted(losses, key=losses.__getitem__, reverse=True)
    figure = Figure(figsize=(8, 4.8), layout="constrained")
    panel = figure.subplots()
    values = [losses[name] for name in worst_first]
    panel.hlines(range(len(values)), decayed, values, color=BLUE, alpha=0.3, linewidth=1)
    panel.plot(values, range(len(values)), "o", color=BLUE, label="average of checkpoints")
    panel.set_yticks(range(len(values)), worst_first)
    panel.axvline(decayed, color=GREEN, linestyle="--", label="learning rate decayed to 0")
    panel.axvline(last, color=ORANGE, linestyle="--", label="last checkpoint, constant rate")
    panel.set_xlabel("validation loss, nats a byte (lower is better)")
    steps = report["trained"]["sizes"]
    panel.set_title(
        f"{report['n_parameters'] / 1e6:.0f} million parameters, {steps['stable_steps']} + "
        f"{steps['more_steps']} steps"
    )
    figure.legend(loc="outside lower center", ncols=3)
    open_up(figure)
    write_pictures(output, pictures("lm", figure))


def lm_facts(report: dict[str, Any]) -> dict[str, bool]:
    """Return what the numbers say about the claims that averaging makes."""
    losses: dict[str, float] = report["val_loss"]
    last, decayed = losses["last checkpoint (constant)"], losses["real decay, 1-sqrt"]
    averages = [losses[name] for name in SCHEMES]
    return {
        "every average beats the last checkpoint": max(averages) < last,
        "the best average has at least half of what the real decay brings": (
            last - min(averages) >= 0.5 * (last - decayed)
        ),
        "no average beats the real decay": min(averages) > decayed,
    }


# --- BatchNorm --------------------------------------------------------------------------------


def wide_batchnorm(
    arguments: argparse.Namespace, left: Callable[[], float], say: Callable[[str], None]
) -> None:
    """Run the arms of ``reproduce.py`` with a wider network: Table 1, Figs. 6 and 7."""
    try:
        from figures import figure_6, figure_7
        from seeds import run_all
        from setups import CLEAN, NOISY
        from table import Table
    except ModuleNotFoundError as error:
        say(
            f"without the module '{error.name}' there is no part batchnorm: pip install mnist1d "
            "(where there is no network: pip install --target FOLDER mnist1d elsewhere, and "
            "PYTHONPATH=FOLDER here)"
        )
        return
    setups = [
        replace(setup, budget_epochs=8, n_train=500, n_test=500)
        if arguments.tiny
        else replace(setup, width=arguments.width)
        for setup in (NOISY, CLEAN)
        if setup.name in arguments.setups
    ]
    seeds: list[int] = arguments.seeds[:1] if arguments.tiny else arguments.seeds
    say(f"MNIST-1D, a network of width {setups[0].width}, {len(seeds)} seeds")
    measured = run_all(
        setups, seeds, arguments.output, arguments.device,
        n_jobs=arguments.jobs, say=say, seconds=BN_SHARE * left(),
    )  # fmt: skip
    for setup in setups:
        if not measured[setup.name]:
            say(f"{setup.name}: no time was left for a single seed")
            continue
        table = Table(setup, measured[setup.name])
        table.write(arguments.output)
        print(f"\n{len(measured[setup.name])} seeds\n{table.text()}")
        figure_6(arguments.output, setup, measured[setup.name])
        figure_7(arguments.output, setup, measured[setup.name])


if __name__ == "__main__":
    main()
