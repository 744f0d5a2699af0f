"""Options that several commands share, under the same names and words everywhere."""

from collections.abc import Callable
from typing import Any, TypeVar, get_args

import click

from ckptavg.cli.option_types import ByteSize, StepRange
from ckptavg.cycles import Recorded
from ckptavg.metrics import Mode
from ckptavg.tensors import OutputFormat

Command = TypeVar("Command", bound=Callable[..., Any])


def _list_schemes(ctx: click.Context, param: click.Parameter, value: bool) -> None:
    if value and not ctx.resilient_parsing:
        from ckptavg.cli.schemes import scheme_lines

        for line in scheme_lines():
            click.echo(line)
        ctx.exit()


def combined(*decorators: Callable[[Command], Command]) -> Callable[[Command], Command]:
    """Return one decorator that adds the options of several, in their order."""

    def decorate(function: Command) -> Command:
        for decorator in reversed(decorators):
            function = decorator(function)
        return function

    return decorate


output_options = combined(
    click.option(
        "-o", "--output", required=True, type=click.Path(), metavar="OUT",
        help="Model directory to make, for example -o swa.",
    ),
    click.option(
        "--overwrite", is_flag=True,
        help="Replace OUT if it is a model directory, in one step at the end.",
    ),
    click.option(
        "--output-format", type=click.Choice(get_args(OutputFormat)), default="safetensors",
        show_default=True,
        help="How the weights are stored; torch: one file model.pt, a state dict as torch.save "
        "writes it.",
    ),
    click.option(
        "--max-shard-size", type=ByteSize(),
        help="Largest weight file, for example 10GB; default: 5GB (torch files are never split).",
    ),
    click.option(
        "--no-code", is_flag=True,
        help="Leave out the *.py files of the model directory (they are copied, never run).",
    ),
)  # fmt: skip


checksum_option = click.option(
    "--checksum", is_flag=True,
    help="Hash the input files while they are read (SHA-256, and the CRC-32 of torch files), and "
    "record it, so that ckptavg verify finds any change; what comes from the Hub always is.",
)  # fmt: skip


_COUNT = click.IntRange(min=1)
selection_options = combined(
    click.option(
        "--last", type=_COUNT, metavar="N",
        help="Of all checkpoints that SOURCES stand for, take the newest N, for example 10.",
    ),
    click.option("--first", type=_COUNT, metavar="N", help="Take the oldest N, for example 3."),
    click.option(
        "--every", type=_COUNT, metavar="M",
        help="Take every M-th, counted back from the newest, for example 2; applies before --last "
        "and --first.",
    ),
    click.option(
        "--steps", type=StepRange(),
        help="Take those of training steps A to B, for example 1000:9000 or 1000:; applies before "
        "--every.",
    ),
    click.option(
        "--match", multiple=True, metavar="GLOB",
        help="Take those whose names match, for example 'checkpoint-*' (repeatable); "
        "applies first.",
    ),
    click.option(
        "--at-lr-minima", is_flag=True,
        help="Take those at the minimum of each cycle of the learning rate, as checkpoints, "
        "trainer_state.json or --log tell it; applies after --steps.",
    ),
    click.option(
        "--constant-lr", is_flag=True,
        help="Take the last stretch of those trained at one constant learning rate, such as before "
        "the decay of a warmup-stable-decay schedule; applies after --steps.",
    ),
    click.option(
        "--swad", is_flag=True,
        help="Take those in SWAD's window of a validation loss (--metric; default: the only loss "
        "there is); applies after --steps.",
    ),
    click.option(
        "--swad-tolerance", type=click.FloatRange(min=0), metavar="RATIO",
        help="By what part losses may exceed those at the window's beginning, for example 0.2; "
        "default: 0.3.",
    ),
    click.option(
        "--best", type=_COUNT, metavar="N",
        help="Take the N with the best --metric that was recorded, for example 5; applies before "
        "--every.",
    ),
    click.option(
        "--log", type=click.Path(), metavar="FILE",
        help="Log that tells learning rates or metrics by step or epoch, for example metrics.csv: "
        "CSV with a header, JSONL, trainer_state.json; default: what the checkpoints tell.",
    ),
    click.option(
        "--lr-recorded", type=click.Choice(get_args(Recorded)),
        help="Whether the learning rates on record are those of the update before (used) or after "
        "(next) a checkpoint; default: found out, or asked for where it matters.",
    ),
)  # fmt: skip


def _metric_options(metric_help: str) -> Callable[[Command], Command]:
    return combined(
        click.option("--metric", metavar="NAME", help=metric_help),
        click.option(
            "--mode", type=click.Choice(get_args(Mode)),
            help="Whether less or more of it is better, for example min; default: by its name "
            "(loss, accuracy, ...).",
        ),
    )  # fmt: skip


metric_options = _metric_options("What --best and --swad go by, for example eval_loss.")
judging_options = _metric_options(
    "The metric that decides, for example accuracy; default: the only one there is. --best and "
    "--swad go by it, too: the log has to know it by the same name."
)

scheme_options = combined(
    click.option(
        "--scheme", "schemes", multiple=True, metavar="[LABEL=]NAME[:KEY=VALUE,...]",
        help="What to average, for example uniform:last=5, ema:decay=0.9, late=linear:last=10; "
        "uniform:last=1..8 stands for eight. Given several times, one pass makes all averages, "
        "called by label or scheme; default: uniform.",
    ),
    click.option(
        "--list-schemes", is_flag=True, is_eager=True, expose_value=False, callback=_list_schemes,
        help="Explain all schemes on one screen, and exit.",
    ),
)  # fmt: skip

averaging_options = combined(
    click.option(
        "--accumulate",
        type=click.Choice(["auto", "float32", "float64"]),
        default="auto",
        show_default=True,
        help="dtype of the sums; auto is float64 for float32 inputs, float32 for 16-bit ones.",
    ),
    click.option(
        "--dtype",
        type=click.Choice(["same", "float64", "float32", "bfloat16", "float16"]),
        default="same",
        show_default=True,
        help="dtype of averaged tensors, for example bfloat16.",
    ),
    click.option(
        "--buffers",
        type=click.Choice(["last", "first", "refuse"]),
        default="last",
        show_default=True,
        help="Which checkpoint gives integer and bool tensors that differ.",
    ),
    click.option(
        "--allow-nonfinite", is_flag=True, help="Keep infinity and NaN instead of refusing them."
    ),
    click.option(
        "--adapter-rank",
        type=click.IntRange(min=1),
        metavar="R",
        help="Rank of averaged LoRA adapters, for example 16: the best approximation, with its "
        "error; default: the exact mean of the products, whose rank is the sum of the ranks.",
    ),
    click.option(
        "--adapter-factors",
        is_flag=True,
        help="Average the factors of LoRA adapters (or the parameters of others) apart, which is "
        "not the mean of their products; the difference is measured.",
    ),
)

publish_options = combined(
    click.option("--private", is_flag=True, help="Make the repository private, if it is made now."),
    click.option(
        "--card", type=click.Path(dir_okay=False), metavar="FILE",
        help="Markdown that the model card ends with, for example notes.md.",
    ),
)  # fmt: skip

push_options = combined(
    click.option(
        "--push", metavar="ORG/NAME[@BRANCH]",
        help="Publish OUT on the Hugging Face Hub when it is done, for example me/pythia-swa; "
        "several averages go to a branch each.",
    ),
    publish_options,
)  # fmt: skip

reading_options = combined(
    click.option(
        "--cache", is_flag=True,
        help="Keep what comes from the Hub in the Hugging Face cache; default: the bytes are "
        "streamed and stored nowhere. Files that are in the cache are used either way.",
    ),
    click.option(
        "--state-key", metavar="KEY",
        help="Entry of torch files that holds the weights, for example ema or ema.module, or . for "
        "the top level; "
        "default: the usual one (state_dict, model, ...).",
    ),
    click.option(
        "--strip-prefix", "strip_prefixes", multiple=True, metavar="PREFIX",
        help="Remove a prefix from tensor names, for example model. (repeatable); module. and "
        "_orig_mod. go by themselves where all names have them.",
    ),
    click.option(
        "--keep-prefix", is_flag=True,
        help="Compare names without those prefixes, but write them as in the last checkpoint.",
    ),
)  # fmt: skip

machine_options = combined(
    click.option(
        "--device", default="auto", show_default=True, metavar="auto|cpu|cuda[:i]",
        help="Where the arithmetic runs, for example cuda:1; auto takes a GPU where there is one "
        "and it pays (a model to run, or 40 GB to read).",
    ),
    click.option(
        "--memory", type=ByteSize(), default="512MiB", show_default=True,
        help="Upper bound for the buffers in host memory, for example 2GiB.",
    ),
    click.option(
        "--io-threads", type=click.IntRange(min=1), metavar="N",
        help="Threads that read, or connections to the Hub, for example 8; default: chosen by the "
        "machine.",
    ),
)  # fmt: skip

json_option = click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
debug_option = click.option("--debug", is_flag=True, help="Show the traceback of an error.")
talk_options = combined(
    json_option,
    click.option("--quiet", is_flag=True, help="Show no progress and no notes on stderr."),
    debug_option,
)


_SELECTION_ARGUMENTS = (
    "last", "first", "every", "steps", "match", "at_lr_minima", "constant_lr", "swad",
    "swad_tolerance", "best", "log", "lr_recorded", "metric", "mode",
)  # fmt: skip


def selection_arguments(options: dict[str, Any]) -> dict[str, Any]:
    """Take what ``selection_options`` and ``metric_options`` gave out of a command's options."""
    return {name: options.pop(name) for name in _SELECTION_ARGUMENTS if name in options}


def averaging_arguments(options: dict[str, Any]) -> dict[str, Any]:
    """Return what ``averaging_options`` gave, under their names in Python."""
    names = (
        "accumulate", "dtype", "buffers", "allow_nonfinite", "adapter_rank", "adapter_factors",
    )  # fmt: skip
    return {name: options[name] for name in names}


def pipeline_arguments(options: dict[str, Any]) -> dict[str, Any]:
    """Return output, reading and machine options under their names in Python."""
    return {
        "overwrite": options["overwrite"],
        "max_shard_bytes": options["max_shard_size"],
        "output_format": options["output_format"],
        "state_key": options["state_key"],
        "strip_prefixes": options["strip_prefixes"],
        "keep_prefix": options["keep_prefix"],
        "device": options["device"],
        "memory_budget_bytes": options["memory"],
        "n_threads": options["io_threads"],
        "cache": options["cache"],
        "include_code": not options["no_code"],
        **({"checksum": options["checksum"]} if "checksum" in options else {}),
    }
