"""One page that shows everything: tables, claims and pictures."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from claims import Claim
from setups import Setup
from table import Table

FIGURES = {
    "fig1-left": ("plane", "Fig. 1, left: three samples of the cyclical rate and their mean"),
    "fig1-right": ("plane", "Fig. 1, middle and right: where SGD and SWA come from and end"),
    "fig3": ("plane", "Fig. 3: iterates at the constant rate, and their mean"),
    "fig4": ("width", "Fig. 4: random rays from SWA, SGD and the last iterate"),
    "fig5": ("path", "Fig. 5: from SWA (0) to the SGD run that it branched off (1)"),
    "fig5-barriers": ("path", "Beside Fig. 5: from SWA to another schedule, and to another seed"),
}


class Found(NamedTuple):
    """What was found of one set-up."""

    setup: Setup
    table: Table
    claims: Sequence[Claim]


def write_page(output: Path, found: Sequence[Found], facts: Mapping[str, object]) -> None:
    """Write ``index.md``; pictures are those that are there."""
    lines = ["# The SWA paper, reproduced small", ""]
    lines += [f"- {name}: {value}" for name, value in facts.items()]
    for setup, table, claims in found:
        lines += ["", f"## {setup.name}", "", table.text(), "", table.text("nll"), ""]
        lines += [f"- {claim.verdict.strip()}: {claim.text}" for claim in claims]
        for name, (command, caption) in FIGURES.items():
            lines += _picture(output, Path(f"{name}-{setup.name}", f"{command}.png"), caption)
        for number, caption in (("6", "learning rates after the branch"), ("7", "a fixed rate")):
            lines += _picture(
                output, Path(f"fig{number}-{setup.name}.png"), f"Fig. {number}: {caption}"
            )
    (output / "index.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


def _picture(output: Path, path: Path, caption: str) -> list[str]:
    return ["", f"{caption}", "", f"![{caption}]({path})"] if (output / path).exists() else []
