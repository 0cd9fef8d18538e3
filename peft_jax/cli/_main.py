"""From the arguments of the command line to a command, and from its errors to one sentence."""

from __future__ import annotations

import argparse
import contextlib
import importlib
import importlib.metadata
import io
import os
import signal
import sys
from collections.abc import Iterator, Sequence

from peft_jax.cli._options import COMMANDS, Command

PROGRAM = "peft-jax"
FAILED, INTERRUPTED, TERMINATED = 2, 130, 143


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command.

    Args:
      arguments: of the command line; None: those of the process.

    Returns:
      The exit status: 0; 1 where `diff` finds a difference; 2 on an error, which is told on
      stderr; 130 after Ctrl-C.
    """
    options = _parser().parse_args(arguments)
    command: Command = options.command
    module = f"{__package__}._{command.name}"
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # names that the terminal cannot show
    try:
        with _terminated_as_interrupted():
            status: int = importlib.import_module(module).run(options)
            sys.stdout.flush()
    except KeyboardInterrupt as interrupt:
        ended = TERMINATED if isinstance(interrupt, _Terminated) else INTERRUPTED
        print(f"{PROGRAM} {command.name}: interrupted; nothing was written.", file=sys.stderr)
        return ended
    except BrokenPipeError:  # the reader of stdout, such as `head`, has enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:  # files come from anywhere: whatever is wrong is told in a line
        print(f"{PROGRAM} {command.name}: {_sentence(error)}", file=sys.stderr)
        return FAILED
    return status


def _sentence(error: BaseException) -> str:
    """An error on one line."""
    text = str(error)
    if isinstance(error, OSError) and error.strerror:
        text = f"{error.filename!r}: {error.strerror}." if error.filename else f"{error.strerror}."
    if isinstance(error, MemoryError):
        text = f"there is not enough memory: {text or 'an array did not fit'}."
    if not isinstance(error, ValueError | OSError | MemoryError):
        text = f"{type(error).__name__}: {text}"
    line = " ".join(text.split()) or type(error).__name__
    return f"{line.rstrip('.')}."


class _Terminated(KeyboardInterrupt):
    """The process was asked to end."""


@contextlib.contextmanager
def _terminated_as_interrupted() -> Iterator[None]:
    """SIGTERM cleans up as Ctrl-C does; signals are the main thread's alone."""

    def stop(*_: object) -> None:
        raise _Terminated

    try:
        before = signal.signal(signal.SIGTERM, stop)
    except ValueError:
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


class _Version(argparse.Action):
    """Prints the version, which is looked up only then."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        print(f"{PROGRAM} {importlib.metadata.version('peft_jax')}")
        parser.exit()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=PROGRAM,
        description="LoRA adapters and checkpoints on disk, tensor by tensor.",
        epilog=f"Each command explains itself: {PROGRAM} fuse --help",
    )
    parser.add_argument("--version", action=_Version, nargs=0, help="print the version")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for command in COMMANDS:
        examples = "\n".join(f"  {PROGRAM} {command.name} {line}" for line in command.examples)
        sub = commands.add_parser(
            command.name,
            help=command.summary,
            description=f"{command.summary[:1].upper()}{command.summary[1:]}.\n\n{command.details}",
            epilog=f"examples:\n{examples}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        command.arguments(sub)
        sub.set_defaults(command=command)
    return parser
