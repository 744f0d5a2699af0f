"""From a model directory to a repository on the Hub: what is checked, and what the card says."""

from pathlib import Path

from ckptavg.checkpoint.folder import PROVENANCE_NAME, read_local_json
from ckptavg.errors import UsageError
from ckptavg.hub import CARD_NAME, parse_reference
from ckptavg.tensors import PushResult


def push_written(
    directory: Path,
    repo: str,
    *,
    revision: str | None,
    private: bool,
    create_pr: bool,
    message: str | None,
    card_text: str | None,
) -> PushResult:
    """Publish what ckptavg wrote; see ``ckptavg.pipeline.push_model``."""
    check_target(repo)
    if create_pr and revision is not None:
        raise UsageError("a pull request is made against main: leave out the revision")
    told = read_local_json(directory / PROVENANCE_NAME)
    if told is None:
        raise UsageError(f"{directory}: {_why_not(directory)}")
    # imported here: importing huggingface_hub takes longer than averaging many models
    from ckptavg.hub.card import model_card
    from ckptavg.hub.push import push_folder

    own_card = directory / CARD_NAME
    try:
        default_message = f"Average of {len(told['checkpoints'])} checkpoints ({told['scheme']})"
        if own_card.exists():
            card = _with_text(_own_text(own_card), card_text)
        else:
            config = read_local_json(directory / "config.json") or {}
            card = model_card(told, repo, has_config="model_type" in config, own_text=card_text)
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise UsageError(
            f"{directory}: its {PROVENANCE_NAME} is of another version, or was changed by hand"
        ) from error
    return push_folder(
        directory,
        repo,
        card=card,
        revision=revision,
        private=private,
        create_pr=create_pr,
        message=message or default_message,
    )


def check_target(repo: str) -> None:
    """Refuse what is not the name of a repository.

    Raises:
        UsageError: If so.
    """
    reference = parse_reference(repo)
    if reference is None or reference.has_revision or reference.path:
        raise UsageError(f"{repo}: is not of the form org/name")


def _own_text(card: Path) -> str:
    try:
        return card.read_bytes().decode("utf-8")  # ends of lines stay as they are
    except (OSError, ValueError) as error:
        raise UsageError(f"{card}: cannot be read as text: {error}") from error


def _with_text(card: str, text: str | None) -> str:
    if not text or text.strip() in card:
        return card
    return f"{card.rstrip()}\n\n{text.strip()}\n"


def _why_not(directory: Path) -> str:
    if not directory.is_dir():
        return "is not a directory"
    inside = sorted(path.parent.name for path in directory.glob(f"*/{PROVENANCE_NAME}"))
    if inside:
        return f"holds {len(inside)} models: push one of them, such as {directory / inside[0]}"
    return f"holds no {PROVENANCE_NAME}: only what ckptavg wrote is pushed"
