"""What a call to the Hub is about, once its address is taken apart."""

from collections.abc import Mapping
from dataclasses import dataclass

from loopback_hub.repositories import Commit, Repository


@dataclass(frozen=True)
class Target:
    """A repository, a commit of it, and the other names in the address."""

    repository: Repository
    commit: Commit  # the head of main if the address names no revision
    names: Mapping[str, str]  # decoded; "" for what the address leaves out
