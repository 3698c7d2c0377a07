"""The command ``tools/expand_zero_ckpt.py``."""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ds_sparkling.checkpoint.request import FORMATS, Request
from ds_sparkling.errors import SparklingError
from ds_sparkling.files import beside
from ds_sparkling.spec.command_line import ends_in_words
from ds_sparkling.spec.widths import parse_widths

if TYPE_CHECKING:
    from ds_sparkling.checkpoint.team import Team


#: Threads that a process may have for its work.
_MOST_WORKERS = 1024


@ends_in_words(status=1)
def main(argv: Sequence[str] | None = None) -> None:
    """Entry point."""
    parser = _parser()
    options = parser.parse_args(argv)
    request = _request(options, parser)
    try:
        with _stopped_by_sigterm():
            status = _run(request, options)
    except KeyboardInterrupt as stop:
        print(f"\nstopped: {options.out} isn't made", file=sys.stderr)
        status = 128 + (stop.number if isinstance(stop, _Terminated) else signal.SIGINT)
    if "TORCHELASTIC_RUN_ID" in os.environ:  # at a usual exit what is left of gloo may keep a process waiting for ever
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    if status:
        sys.exit(status)


class _Terminated(KeyboardInterrupt):
    """The process is asked to end, as by a launcher whose other processes have failed."""

    number = signal.SIGTERM


@contextlib.contextmanager
def _stopped_by_sigterm() -> Iterator[None]:
    """Clean up as after Ctrl-C when the process is asked to end."""

    def stop(_number: int, _frame: object) -> None:
        raise _Terminated

    if threading.current_thread() is not threading.main_thread():  # signals go to the main thread alone
        yield
        return
    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _run(request: Request, options: argparse.Namespace) -> int:
    """Do what is asked for, and tell what comes of it; the process's status."""
    import torch  # here, so that --help doesn't wait for it

    from ds_sparkling.checkpoint.parameter_axes import UnknownAxesError
    from ds_sparkling.checkpoint.team import LostProcessError, Team

    logging.basicConfig(format="%(levelname)s: %(message)s", level=logging.WARNING)
    torch.set_num_threads(1)  # the workers are the threads
    team = Team()
    try:
        with team:
            _expand(request, options, team)
    except SparklingError as error:
        if team.rank == 0 or isinstance(error, LostProcessError):  # the first one knows the others' failures
            print(f"error: {error}", file=sys.stderr)
            if isinstance(error, UnknownAxesError):
                _offer_hints(error.hints, None if options.dry_run else beside(options.out, ".hints.json"))
        return 1
    except OSError as error:
        print(f"error: {error.filename or request.out}: {error.strerror or error}", file=sys.stderr)
        return 1
    return 0


def _expand(request: Request, options: argparse.Namespace, team: Team) -> None:
    from ds_sparkling.checkpoint.expand import expand, prepare

    leader = team.rank == 0
    expansion = prepare(request, team, progress=leader)
    if leader and not options.json:
        print(expansion.describe())
    if options.dry_run:
        if leader and options.json:
            print(json.dumps(expansion.to_dict()))
        return
    summary = expand(expansion, team, progress=leader)
    if leader and options.json:
        print(json.dumps(summary))
    elif leader:
        rate = summary["bytes_written"] / max(summary["seconds"], 1e-9) / 1e6
        verified = "" if summary["bytes_verified"] is None else ", read back and found right"
        print(
            f"\nwrote {summary['files']} files, {summary['bytes_written']:,} bytes in {summary['seconds']} s "
            f"({rate:,.0f} MB/s){verified}: {request.out}"
        )


def _request(options: argparse.Namespace, parser: argparse.ArgumentParser) -> Request:
    widths = parse_widths(parser, "--widths", options.widths)
    if options.workers is not None and not 1 <= options.workers <= _MOST_WORKERS:
        parser.error(f"--workers must be at least 1 and at most {_MOST_WORKERS}")
    return Request(
        checkpoint=options.checkpoint,
        out=options.out,
        widths=widths,
        tag=options.tag,
        config=options.config,
        deepspeed_config=options.deepspeed_config,
        world_size=options.world_size,
        expert_parallel=options.expert_parallel,
        format=options.format,
        workers=options.workers or Request.workers,
        verify=options.verify,
        trust=options.trust_checkpoint,
    )


def _offer_hints(hints: str, path: Path | None) -> None:
    if path is None:
        print(hints)
    else:
        try:
            with open(path, "x") as file:
                file.write(hints)
        except FileExistsError:
            print(f"a hints file is already there: fill in {path} and pass it with --config", file=sys.stderr)
            return
        except OSError as error:
            print(f"a hints file can't be written to {path}: {error.strerror}; this is what would be in it:\n{hints}")
            return
        print(f"wrote a hints file: fill in {path} and pass it with --config", file=sys.stderr)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="expand_zero_ckpt.py",
        description="Widen a ZeRO checkpoint (stages 1 to 3, dense or AutoEP, or universal), put it on another number "
        "of ranks or another expert-parallel size, or export it. The checkpoint itself isn't touched, and OUT appears "
        "when it is complete. Run it under torchrun to spread the work over processes and hosts.",
    )
    parser.add_argument(
        "checkpoint", type=Path, metavar="CKPT", help="the directory with 'latest', or that of a tag in it"
    )
    parser.add_argument("out", type=Path, metavar="OUT", help="the directory to make")
    parser.add_argument(
        "--widths", nargs="+", default=[], metavar="AXIS=WIDTH", help="axes that grow, e.g. hidden_size=2048"
    )
    parser.add_argument("--tag", help="which checkpoint; by default the one named in 'latest'")
    parser.add_argument(
        "--config",
        metavar="FILE",
        help="where the widths' axes are looked up if the checkpoint has no growth record: the model's config.json, "
        "module:function that builds it, or a hints file; for format hf the model's config.json",
    )
    parser.add_argument(
        "--deepspeed_config",
        type=Path,
        metavar="FILE",
        help='DeepSpeed JSON whose "sparkling" block says how to grow; by default the one in the checkpoint',
    )
    parser.add_argument("--world-size", type=int, metavar="N", help="data-parallel ranks of OUT; default: as it is")
    parser.add_argument("--expert-parallel", type=int, metavar="M", help="expert-parallel size of OUT; as it is")
    parser.add_argument("--format", choices=FORMATS, default="zero", help="of OUT (default: %(default)s)")
    parser.add_argument("--workers", type=int, metavar="K", help="threads (default: one per core, 8 at most)")
    parser.add_argument("--dry-run", action="store_true", help="print the plan and touch nothing")
    parser.add_argument(
        "--verify", action="store_true", help="check the checksums of CKPT before, and read OUT back after writing"
    )
    parser.add_argument("--json", action="store_true", help="print the plan or the summary as JSON")
    parser.add_argument(
        "--trust-checkpoint",
        action="store_true",
        help="unpickle classes that aren't known; this may run any code that the checkpoint holds",
    )
    return parser
