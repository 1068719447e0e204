"""The command line. Starting it, ``--help`` and ``list`` import nothing heavier than argparse."""

from __future__ import annotations

import os
import sys
import traceback
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from interp.cli.parsers import parse
from interp.errors import InputError


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: the words after ``interp``; those of this process by default.

    Returns:
        The exit code: 0 done; 1 done in part (the page says what is missing); 2 something given
        cannot be used, said in one line on stderr; 130 interrupted.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in words
    try:
        with _notes_on_stderr():
            args = parse(words)
            return args.action(args)
    except InputError as error:
        return _refuse(str(error), debug)
    except BrokenPipeError:  # the reader of our output has gone, as in `interp list | head -1`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        if error.filename is None:
            raise
        return _refuse(f"{error.filename}: {error.strerror}", debug)
    except KeyboardInterrupt:
        print("interp: stopped; results that were finished are kept", file=sys.stderr)
        return 130


def _refuse(sentence: str, debug: bool) -> int:
    if debug:
        traceback.print_exc()
    print(f"interp: {' '.join(sentence.split())}", file=sys.stderr)
    return 2


@contextmanager
def _notes_on_stderr() -> Iterator[None]:
    """Show a warning as one line without a path of ours in it; those that libraries give their developers not at all."""
    with warnings.catch_warnings():
        for kind in (DeprecationWarning, FutureWarning, PendingDeprecationWarning):
            warnings.simplefilter("ignore", kind)

        def show(message: Warning | str, *_: object, **__: object) -> None:
            print(f"interp: note: {' '.join(str(message).split())}", file=sys.stderr)

        warnings.showwarning = show  # type: ignore[assignment]
        yield
