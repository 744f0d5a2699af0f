"""A Hugging Face Hub on loopback: the real client talks to it, tests look at what it saw."""

from pathlib import Path

from loopback_hub.faults import Fault
from loopback_hub.messages import Request
from loopback_hub.repositories import Commit
from loopback_hub.server import LoopbackHub

__all__ = ["Commit", "Fault", "LoopbackHub", "Request", "hub_environment"]


def hub_environment(hub: LoopbackHub, home: Path, token: str | None = "hf_test") -> dict[str, str]:
    """Return the environment variables that make a client talk to this hub, and to it directly.

    The client reads them when it is imported, so they are for a process yet to be started.
    """
    environment = {
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(home),
        "HF_TOKEN": token or "",  # empty hides one that is set outside
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "NO_PROXY": "127.0.0.1,localhost",
        "no_proxy": "127.0.0.1,localhost",
    }
    if not hub.xet:
        environment["HF_HUB_DISABLE_XET"] = "1"
    return environment
