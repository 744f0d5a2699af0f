"""``python -m tests.faults``: try every promise, and print a table of what came of it.

``python -m tests.faults fuzz --count 2000000`` reads mutated files for as long as you like.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

_TESTS = Path(__file__).parent.parent
_PROMISES = {
    1: "Nothing in an input runs code",
    2: "Every malformed input is refused in one line naming it, before the first write",
    3: "... including inputs nobody wrote",
    4: "Every truncation is refused; every changed byte of a torch file is refused or harmless",
    5: "The output is old or new, and whole, after a kill or a signal",
    6: "... and after power loss",
    7: "Any failed system call: one line, the documented exit code, no leftovers, old output kept",
    8: "It never dies of SIGBUS; a file that changes is noticed",
    9: "Memory is bounded, whatever the number of checkpoints",
    10: "Wrong bytes from the Hub are never averaged",
    11: "The token never leaves",
    12: "The result does not depend on order; equal inputs give themselves back, bit for bit",
    13: "One writer wins",
    14: "The user's model is as it was if the BatchNorm pass fails",
    15: "verify finds any changed byte of an output, and of inputs that were hashed",
}


def main() -> int:
    """Run what the arguments ask for; return the exit code."""
    environment = {**os.environ, "PYTHONPATH": str(_TESTS)}
    if sys.argv[1:2] == ["fuzz"]:
        command = [sys.executable, "-m", "faults.fuzz", *sys.argv[2:]]
        return subprocess.run(command, env=environment, check=False).returncode
    with tempfile.TemporaryDirectory() as directory:
        tally = Path(directory) / "tally.json"
        command = [
            sys.executable, "-m", "pytest", "-m", "promise", "--timed", f"--tally={tally}",
            *sys.argv[1:], str(_TESTS),
        ]  # fmt: skip
        code = subprocess.run(
            command, cwd=_TESTS.parent, env={**os.environ, "FAULTS_THOROUGH": "yes"}, check=False
        ).returncode
        rows = json.loads(tally.read_text()) if tally.exists() else []
    print(table(rows))
    return code


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return a table in Markdown: a line for each promise."""
    lines = ["| # | promise | tests | cases | result |", "|---|---|---|---|---|"]
    for number, promise in _PROMISES.items():
        of = [row for row in rows if row["promise"] == number]
        files = sorted({row["test"].partition("::")[0].removeprefix("tests/") for row in of})
        n_cases = sum(row["cases"] for row in of if row["outcome"] == "passed")
        failed = [row["test"] for row in of if row["outcome"] == "failed"]
        skipped = sorted({row["reason"] for row in of if row["outcome"] == "skipped"})
        result = "holds" if of and not failed else "not tried" if not of else "broken"
        if failed:
            result += f": {', '.join(dict.fromkeys(failed))}"
        if skipped:
            result += f" (skipped: {'; '.join(skipped)})"
        lines.append(f"| {number} | {promise} | {', '.join(files)} | {n_cases:,} | {result} |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
