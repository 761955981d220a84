"""Arguments of the commands, and the checks that need no data."""

from __future__ import annotations

import argparse
import difflib
import math
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from fasterai.cli.errors import UsageError, told_as_usage
from fasterai.study.arguments import ABOUT, add_study_arguments

if TYPE_CHECKING:
    from fasterai.prune.choice.budget import Budget

__all__ = ["Axes", "check_arguments", "check_prune_arguments", "make_parser", "read_budget"]

Axes = dict[str, "str | float"]
#: Those that take one share for all channels.
CONTEXTS = ("local", "global", "erk", "lamp")
HOW_MUCH = "how much a weight matters; 'variety(large_final)' takes redundant units first (default: %(default)s)"

SPARSIFY_HELP = """\
Trains a classifier of torchvision on a folder of images, dense and then the same network sparse (same start, same epochs),
and compares the two. With --granularity coupled or filter it ends with a small network beside them: the sparse one without its
silent channels, which computes the same.

DATA holds one sub-folder a class; if it has train/ and one of valid/, val/ or test/ (each with one sub-folder a class),
these are used, else a fifth of each class is kept for validation. Images are cut to a square and resized, then kept in
memory up to 2 GiB; larger sets are decoded anew in every epoch. Networks are torchvision's own, as they are: a resnet
shrinks its input 32 times, so 32x32 images are worth a larger --image-size where accuracy counts more than time.

With --weights both trainings start from the same trained weights instead of random ones. A head of another number of classes is
left as initialised, and named.
"""

PRUNE_HELP = """\
Takes the channels that matter least out of a trained classifier of torchvision, and writes the smaller network: it computes
what the network with these channels masked computes, which is checked. Or takes out only what is silent already, such as the
channels that `fasterai sparsify --granularity coupled` has masked: then nothing is lost.

WEIGHTS is a state dict written by torch.save, or a file of safetensors. The number of classes is read off it.
"""


class _Parser(argparse.ArgumentParser):
    """Parser that reports its errors as `UsageError`, as the rest of the program does."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message} (see {self.prog} --help)")


def make_parser() -> argparse.ArgumentParser:
    """Make the parser of the whole command line."""
    from fasterai import __version__

    parser = _Parser(prog="fasterai", description="Makes PyTorch networks sparse, and small.")
    parser.add_argument("--version", action="version", version=f"fasterai {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="demo | sparsify | prune | study")
    _add_demo(commands.add_parser("demo", help="dense, sparse and small on 1,797 handwritten digits, in under a minute"))
    described = (
        ("sparsify", "train a sparse classifier on a folder of images", SPARSIFY_HELP, _add_sparsify),
        ("prune", "make a trained classifier small", PRUNE_HELP, _add_prune),
        ("study", "compare methods over settings and seeds", ABOUT, add_study_arguments),
    )
    for name, brief, text, add in described:
        add(commands.add_parser(name, help=brief, description=text, formatter_class=argparse.RawDescriptionHelpFormatter))
    return parser


def _path(text: str) -> Path:
    if os.fsencode(text).decode(errors="replace") != text:  # it could be neither printed nor written to the report
        raise argparse.ArgumentTypeError(f"must be UTF-8, got {text!r}")
    return Path(text)


def _weights(text: str) -> Path | str:
    from fasterai.cli.start import DEFAULT

    return text if text == DEFAULT else _path(text)


def _add_demo(demo: argparse.ArgumentParser) -> None:
    demo.add_argument(
        "-o", "--output", type=_path, default=Path("fasterai-demo"), help="folder to write (default: %(default)s)"
    )
    demo.add_argument("--seed", type=int, default=0, help="of the split, the start and the order (default: %(default)s)")


def _add_sparsify(sparsify: argparse.ArgumentParser) -> None:
    add = sparsify.add_argument
    add("data", type=_path, metavar="DATA", help="a folder with one sub-folder of images a class")
    add("-o", "--output", type=_path, default=Path("run"), help="folder to write (default: %(default)s)")
    axes = sparsify.add_argument_group("sparsity")
    axes.add_argument("--sparsity", type=float, default=0.9, help="share to prune, in [0, 1] (default: %(default)s)")
    axes.add_argument("--granularity", default="weight", help="which weights share one decision (default: %(default)s)")
    axes.add_argument("--context", default="global", help="which units compete (default: %(default)s)")
    axes.add_argument("--criteria", default="large_final", help=HOW_MUCH)
    axes.add_argument("--schedule", default="one_cycle", help="how much is pruned when (default: %(default)s)")
    training = sparsify.add_argument_group("training")
    training.add_argument("--arch", default="resnet18", help="a classifier of torchvision.models (default: %(default)s)")
    training.add_argument(
        "--weights",
        type=_weights,
        metavar="FILE|DEFAULT",
        help="trained weights to start from: a state dict of --arch, or torchvision's own, which it downloads "
        "(default: random ones)",
    )
    training.add_argument("--epochs", type=int, default=5, help="of each of the two trainings (default: %(default)s)")
    training.add_argument("--batch-size", type=int, default=128, help="images in a step, at most (default: %(default)s)")
    training.add_argument("--lr", type=float, default=1e-3, help="highest learning rate of AdamW (default: %(default)s)")
    training.add_argument("--seed", type=int, default=0, help="of the split, the start and the order (default: %(default)s)")
    training.add_argument("--device", default="auto", help="cpu, cuda, mps, ... (default: %(default)s)")
    training.add_argument("--no-dense", action="store_true", help="train the sparse network only")
    images = sparsify.add_argument_group("images")
    images.add_argument(
        "--image-size",
        type=int,
        metavar="N",
        help="side of the square (default: the first image's shorter side; above 64 a multiple of 32, at most 224)",
    )
    images.add_argument("--no-flip", action="store_true", help="do not mirror training images (for digits, text, signs)")
    images.add_argument("--skip-unreadable", action="store_true", help="leave unreadable images out instead of stopping")
    images.add_argument("--workers", type=int, default=0, help="threads that decode images (default: %(default)s)")
    add("--resume", action="store_true", help="go on from the last full epoch of an interrupted run in --output")


def _add_prune(prune: argparse.ArgumentParser) -> None:
    add = prune.add_argument
    add("weights", type=_path, metavar="WEIGHTS", help="a state dict: of torch.save, or safetensors")
    add("--arch", required=True, help="the classifier of torchvision.models that the weights are of")
    add("-o", "--output", type=_path, default=Path("small"), help="folder to write, not there yet (default: %(default)s)")
    add("--onnx", action="store_true", help="write small.onnx as well")
    add("--device", default="auto", help="cpu, cuda, mps, ... (default: %(default)s)")
    axes = prune.add_argument_group("what goes")
    much = axes.add_mutually_exclusive_group(required=True)
    much.add_argument("--sparsity", type=float, help="share of the channels that goes, in [0, 1)")
    much.add_argument("--budget", metavar="KIND=SHARE", help="macs, params or latency that may be left, such as macs=0.5")
    much.add_argument("--remove-only", action="store_true", help="only what is silent already")
    axes.add_argument("--context", default="local", help="which channels compete (default: %(default)s)")
    axes.add_argument("--criteria", default="large_final", help=HOW_MUCH)
    axes.add_argument(
        "--round-to", type=int, metavar="N", help="keep multiples of N channels (default: 8, in groups of 32 and more)"
    )
    axes.add_argument("--ignore", nargs="+", action="extend", metavar="LAYER", help="layers whose outputs all stay")
    images = prune.add_argument_group("images")
    images.add_argument("--batch", type=int, default=1, help="images that it is checked and timed on (default: %(default)s)")
    images.add_argument("--image-size", type=int, metavar="N", help="side of the square (default: the run's, else 224)")
    images.add_argument(
        "--data", type=_path, help="a folder as for sparsify: accuracy on its validation part, and criteria's data"
    )
    images.add_argument("--seed", type=int, help="of the split of the data (default: the run's, else 0)")
    images.add_argument("--skip-unreadable", action="store_true", help="leave unreadable images out instead of stopping")
    images.add_argument("--workers", type=int, default=0, help="threads that decode images (default: %(default)s)")


def check_arguments(arguments: argparse.Namespace) -> None:
    """Check the arguments of `sparsify`, as far as that needs no data, and put entries' names in place of words for them.

    Raises:
        UsageError: An argument is out of range or unknown; the known names are listed.
    """
    from fasterai.core import contexts, criteria, granularities, schedules
    from fasterai.core.checks import check_count, check_fraction

    with told_as_usage():
        check_fraction("--sparsity", arguments.sparsity)
        arguments.granularity = _entry("--granularity", arguments.granularity, granularities)
        arguments.context = _entry("--context", arguments.context, contexts)
        arguments.criteria = _entry("--criteria", arguments.criteria, criteria)
        arguments.schedule = _entry("--schedule", arguments.schedule, schedules)
        check_count("--epochs", arguments.epochs)
        check_count("--batch-size", arguments.batch_size, 2)
        check_count("--workers", arguments.workers, 0)
        check_seed(arguments.seed)
        if arguments.image_size is not None:
            check_count("--image-size", arguments.image_size, 8)
    if not (math.isfinite(arguments.lr) and arguments.lr > 0):
        raise UsageError(f"--lr must be above 0, got {arguments.lr!r}")
    _check_arch(arguments.arch)


def check_prune_arguments(arguments: argparse.Namespace) -> None:
    """Check the arguments of `prune`, as far as that needs no weights and data, with names put in place as for `sparsify`.

    Raises:
        UsageError: An argument is out of range or unknown; the known names are listed.
    """
    from fasterai.core import contexts, criteria
    from fasterai.core.checks import check_count, check_fraction, from_catalogue

    with told_as_usage():
        if arguments.sparsity is not None and check_fraction("--sparsity", arguments.sparsity) == 1:
            raise UsageError("--sparsity must be below 1, got 1.0: it would leave a layer without a channel")
        arguments.context = _entry("--context", arguments.context, contexts, CONTEXTS)
        arguments.criteria = _entry("--criteria", arguments.criteria, criteria)
        check_count("--batch", arguments.batch)
        check_count("--workers", arguments.workers, 0)
        check_seed(arguments.seed or 0)
        if arguments.round_to is not None:
            check_count("--round-to", arguments.round_to)
        if arguments.image_size is not None:
            check_count("--image-size", arguments.image_size, 8)
    if arguments.budget is not None:
        read_budget(arguments.budget)
    _check_evidence(from_catalogue("--criteria", arguments.criteria, criteria).needs, arguments)
    _check_arch(arguments.arch)
    if arguments.onnx:
        _check_onnx()


def _entry(name: str, value: str, *catalogue: Any) -> str:
    """Return the name of an entry for a word, with errors in words that can be typed on the command line.

    Raises:
        UsageError: There is no such entry.
    """
    from fasterai.core.checks import entry_name

    try:
        return entry_name(name, value, *catalogue)
    except ValueError as error:
        said = re.sub(r"\b(granularity|context|criteria|schedule|sparsity)=(?:'(\w+)'|([\d.]+))", r"--\1 \2\3", str(error))
        in_python = (
            " (in Python: the command line takes names alone)" if re.search(r"lambda|import|\b(?!variety\()\w+\(", said) else ""
        )
        raise UsageError(said + in_python) from error


def read_budget(text: str) -> Budget:
    """Read a budget from text such as `macs=0.5`, `params=0.3` or `latency=0.5`.

    Raises:
        UsageError: It is none of these.
    """
    from fasterai.core.words import find_entry
    from fasterai.prune.choice.budget import Budget

    kind, _, share = text.partition("=")
    try:
        shares = {kind: float(share)}
    except ValueError:
        shares = {}
    if not shares or kind not in ("macs", "params", "latency"):
        meant = find_entry("budgets", kind)
        hint = f"; did you mean {meant}={share}?" if meant != kind else ""
        raise UsageError(f"--budget must be macs=SHARE, params=SHARE or latency=SHARE, got {text!r}{hint}")
    try:
        return Budget(macs=shares.get("macs"), params=shares.get("params"), latency=shares.get("latency"))
    except ValueError as error:
        raise UsageError(f"--budget {error}") from error


def _check_evidence(needs: frozenset[str], arguments: argparse.Namespace) -> None:
    if earlier := sorted(needs & {"initial", "previous"}):
        raise UsageError(
            f"--criteria must be one that reads no earlier weights, got {arguments.criteria!r}, which reads the "
            f"{earlier[0]} ones; it needs a training: fasterai sparsify --granularity coupled"
        )
    if needs & {"gradient", "activation", "hessian_gradient", "hessian_diagonal", "outputs"} and arguments.data is None:
        raise UsageError(f"--data must be given for --criteria {arguments.criteria}, which looks at images")


def _check_onnx() -> None:
    from fasterai.export.checking import require

    try:
        require("onnx", "onnxscript", "onnxruntime")
    except ImportError as error:
        raise UsageError(f"--onnx cannot be done: {error}") from error


def check_seed(seed: int) -> None:
    """Refuse a seed that torch does not take.

    Raises:
        UsageError: It is negative or takes more than 63 bits.
    """
    if not 0 <= seed < 2**63:
        raise UsageError(f"--seed must be in [0, 2^63), got {seed}")


def _check_arch(arch: str) -> None:
    from fasterai.cli.networks import classifiers

    known = classifiers()
    if arch not in known:
        close = difflib.get_close_matches(arch, known, n=5, cutoff=0.5)
        hint = f"close matches: {', '.join(close)}" if close else f"such as {', '.join(known[:8])}"
        raise UsageError(f"--arch must be a classifier of torchvision.models, got {arch!r}; {hint}")
