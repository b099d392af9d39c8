"""`optimum-cli sparse`: what the library does, from the command line.

Nothing here imports torch or transformers before a command runs: Optimum imports these files for every `optimum-cli`.
"""

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager

logger = logging.getLogger(__name__)


@contextmanager
def user_errors() -> Iterator[None]:
    """End the program with one line on stderr, and exit code 2, if what the user gave does not work.

    The traceback is logged at level DEBUG. Ctrl-C ends it with one line, too.
    """
    try:
        yield
    except (ValueError, TypeError, OSError, ImportError) as error:
        logger.debug("The error below was raised here.", exc_info=True)
        print("error:", " ".join(str(error).split()) or type(error).__name__, file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)  # as a shell reports a program that Ctrl-C ended
