"""`optimum-cli sparse`: what the library does, from the command line.

Nothing here imports torch or transformers before a command runs: Optimum imports these files for every `optimum-cli`.
"""

from __future__ import annotations

import argparse
import logging
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)

DTYPES = ("auto", "float32", "bfloat16", "float16")


def add_trust_option(parser: argparse._ActionsContainer) -> None:
    """Declare `--trust-remote-code`."""
    parser.add_argument(
        "--trust-remote-code",
        action="store_true",
        default=None,
        help="run the code that comes with a model (default: ask, where there is a terminal)",
    )


@contextmanager
def user_errors() -> Iterator[None]:
    """End the program with one line on stderr, and exit code 2, if what the user gave does not work.

    The traceback is logged at level DEBUG. Ctrl-C ends it with one line, too.
    """
    try:
        yield
    except (ValueError, TypeError, OSError, ImportError) as error:
        if _comes_from(error, KeyboardInterrupt):  # which has become an error in an import of transformers
            _interrupted()
        logger.debug("The error below was raised here.", exc_info=True)
        print("error:", " ".join(str(error).split()) or type(error).__name__, file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        _interrupted()


def _comes_from(error: BaseException | None, kind: type[BaseException]) -> bool:
    while error is not None and not isinstance(error, kind):
        error = error.__cause__ or error.__context__
    return error is not None


def _interrupted() -> NoReturn:
    print("interrupted", file=sys.stderr)
    sys.exit(130)  # as a shell reports a program that Ctrl-C ended


def folder_called(name: str) -> Path:
    """The path of a folder on a command line, where an empty name is a variable that was not set."""
    if not name:
        raise argparse.ArgumentTypeError("an empty name is no folder ('.' is the one you are in)")
    return Path(name)


def device_called(name: str, given: torch.device | None = None) -> torch.device:
    """The device of that name.

    Args:
        name: As `torch.device` takes it, or `"auto"`.
        given: What `"auto"` is; by default the first GPU, if there is one, else the CPU.

    Raises:
        ValueError: There is no such device.
    """
    import torch

    if name == "auto":
        return given or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"--device {name!r} is no device that torch knows: use cpu, cuda or cuda:N.") from error
    if device.type == "cuda" and not (torch.cuda.is_available() and (device.index or 0) < torch.cuda.device_count()):
        raise ValueError(f"--device {name} is not there: this machine has {torch.cuda.device_count()} CUDA devices.")
    return device


def check_file(name: str | Path | None, option: str) -> None:
    """Raise an `OSError` unless a file that was asked for, if any, can be written."""
    if name is not None:
        if not str(name) or Path(name).is_dir():
            raise IsADirectoryError(f"{option} {str(name)!r} must name a file, not a folder.")
        check_writable(Path(name).absolute().parent)


def check_output(output: Path, source: Path | None, name: str) -> None:
    """See that a model can be saved in a folder, and that none is lost there but one that was pruned.

    Args:
        output: The folder, OUT.
        source: Where the model is that is to be changed, unless it is on the Hub.
        name: What that is called.

    Raises:
        ValueError: `output` is a file or `source`, or holds a dense model.
        OSError: Nothing can be written there.
    """
    from ..loading import PACKED, quantization_method, read_json

    if output.exists() and not output.is_dir():
        raise ValueError(f"OUT must be a folder, and {output} is a file: give another path.")
    if source is not None and output.exists() and output.samefile(source):
        raise ValueError(f"OUT is {name} ({output}): give another folder, it is not overwritten.")
    file = output / "config.json"
    config = read_json(file) if file.is_file() else None
    if config is not None and "sparsity_config" not in config and quantization_method(config) != PACKED:
        raise ValueError(f"OUT ({output}) holds a dense model, which would be lost: give another folder.")
    check_writable(output)


def check_writable(folder: Path) -> None:
    """Raise an `OSError` unless files can be written in `folder`, or in the folder where it would be created."""
    existing = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    if not existing.is_dir():
        raise NotADirectoryError(f"{folder} cannot be a folder, since {existing} is a file: give another path.")
    try:
        tempfile.TemporaryFile(dir=existing).close()
    except OSError as error:
        raise OSError(f"Nothing can be written in {folder}: {error.strerror} ({existing}).") from error
