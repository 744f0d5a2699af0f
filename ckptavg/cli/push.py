"""``ckptavg push``: a model directory onto the Hugging Face Hub; what ``--push`` does, too."""

import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple

import click

from ckptavg.cli.options import debug_option, json_option, publish_options
from ckptavg.cli.render import echo_json, echo_lines, echo_result
from ckptavg.errors import AfterPublishError, UsageError, without_token

if TYPE_CHECKING:
    from ckptavg.results import AverageResult
    from ckptavg.tensors import PushResult

_EPILOG = """\b
Examples:
  ckptavg push swa me/pythia-160m-swa
  ckptavg push averages/last5 me/pythia-160m-swa --revision last5 --private
  ckptavg push swa me/pythia-160m-swa --create-pr --message "Average of the last ten"
"""


@click.command("push", epilog=_EPILOG)
@click.argument("directory", metavar="DIR")
@click.argument("repo", metavar="ORG/NAME")
@click.option(
    "--revision",
    metavar="BRANCH",
    help="Branch to push to, made if need be, for example last5; default: main.",
)
@publish_options
@click.option("--create-pr", is_flag=True, help="Open a pull request instead.")
@click.option(
    "--message", metavar="TEXT", help="First line of the commit's message; default: what it is."
)
@json_option
@debug_option
def command(
    directory: str,
    repo: str,
    revision: str | None,
    private: bool,
    create_pr: bool,
    message: str | None,
    card: str | None,
    as_json: bool,
    debug: bool,
) -> None:
    """Publish a model directory that ckptavg wrote on the Hugging Face Hub.

    One commit with the weights, the side files and a model card; weights that were there before
    and are replaced go with it. Pushing again what is there makes no commit.
    """
    from ckptavg.pipeline import push_model

    pushed = push_model(
        directory,
        repo,
        revision=revision,
        private=private,
        create_pr=create_pr,
        message=message,
        card_text=_card_text(card),
    )
    if as_json:
        echo_json(asdict(pushed))
    else:
        echo_lines([push_line(pushed)])


class Push(NamedTuple):
    """What ``--push`` and its companions ask for."""

    repo: str
    revision: str | None
    private: bool
    card: str | None  # the file, and what was in it
    card_text: str | None


def chosen_push(
    options: dict[str, Any], *, first: bool, several: bool | None = None
) -> Push | None:
    """Take the options of a push out of a command's options; see that it may be done.

    Args:
        options: Those of the command.
        first: Whether this process is the one that will push.
        several: Whether there are several outputs; None goes by the schemes among the options.

    Raises:
        UsageError: If they make no sense, or there is no token.
        SourceError: If the Hub does not know the token.
        HubError: If the Hub cannot be reached.
    """
    target, private, card = (options.pop(name) for name in ("push", "private", "card"))
    if target is None:
        if private or card:
            raise UsageError("--private and --card belong to --push")
        return None
    from ckptavg.hub import parse_reference
    from ckptavg.publishing import check_target

    reference = parse_reference(target)
    repo = target if reference is None else reference.repo
    revision = reference.revision if reference is not None and reference.has_revision else None
    check_target(repo)
    if reference is not None and reference.path:
        raise UsageError(f"{target}: is not of the form org/name or org/name@branch")
    several = _makes_several(options) if several is None else several
    if revision is not None and several:
        raise UsageError(f"{target}: several averages go to a branch each, named like them")
    card_text = _card_text(card)
    if first:
        from ckptavg.hub.push import check_may_push

        check_may_push(repo)
    return Push(repo, revision, private, card, card_text)


def _makes_several(options: dict[str, Any]) -> bool:
    """Tell whether the schemes that a command was given make more than one model."""
    from ckptavg.prepare import chosen_schemes
    from ckptavg.schemes import output_names

    schemes = chosen_schemes(options.get("schemes", ()), None)
    return len(output_names(schemes)) > 1


def push_and_echo(
    result: "AverageResult",
    done: str,
    push: Push | None,
    *,
    as_json: bool,
    quiet: bool,
    more: Sequence[str] = (),
    json_fields: Mapping[str, Any] = MappingProxyType({}),
) -> None:
    """Print what a run did, and push every output; several go to a branch each, named like it.

    ``more`` are further lines for people, ``json_fields`` what JSON tells beside the result.

    Raises:
        AfterPublishError: If a push fails or is interrupted; it says what finishes the work.
    """
    pushed: list[PushResult] = []
    if not as_json:
        echo_result(result, done, as_json=False, quiet=quiet, more=more)
    try:
        if push is not None:
            _push_outputs(result, push, pushed)
    finally:
        if as_json:
            echo_result(
                result, done, as_json=True, quiet=quiet, pushed=pushed, json_fields=json_fields
            )
        else:
            echo_lines(map(push_line, pushed))


def _push_outputs(result: "AverageResult", push: Push, pushed: "list[PushResult]") -> None:
    from ckptavg.pipeline import push_model

    several = len(result.outputs) > 1
    targets = [(one.path, one.path.name if several else push.revision) for one in result.outputs]
    for path, revision in targets:
        try:
            pushed.append(
                push_model(
                    path,
                    push.repo,
                    revision=revision,
                    private=push.private,
                    card_text=push.card_text,
                )
            )
        except BaseException as error:
            rest = " && ".join(_finishing(push, *target) for target in targets[len(pushed) :])
            raise AfterPublishError(
                f"{path}: is published here and whole, but not on the Hub: "
                f"{str(error) or type(error).__name__}; finish it with: {rest}"
            ) from error


def push_line(pushed: "PushResult") -> str:
    """Return what a push says."""
    what = "pushed" if pushed.changed else "is there already"
    return f"{pushed.repo}@{pushed.revision}: {what}, commit {pushed.commit}; {pushed.url}"


def typed_command() -> str:
    """Return the command line as it was typed, tokens blanked out."""
    return without_token(shlex.join(["ckptavg", *sys.argv[1:]]))


def _finishing(push: Push, directory: Path, revision: str | None) -> str:
    words = ["ckptavg", "push", str(directory), push.repo]
    if revision is not None:
        words += ["--revision", revision]
    if push.private:
        words.append("--private")
    if push.card is not None:
        words += ["--card", push.card]
    return shlex.join(words)


def _card_text(path: str | None) -> str | None:
    if path is None:
        return None
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise UsageError(f"{path}: cannot be read as text: {error}") from error
