"""What widening and reshaping a checkpoint offline costs, against a plain copy and DeepSpeed's universal converter.

    python tools/bench_expand.py --sizes 0.2 1 4 --ranks 2 4 8

Checkpoints of an OLMoE with AutoEP experts under ZeRO-3 are synthesised on disk: fp32 weights and AdamW's moments of
the given total size, on the given number of ranks, experts over two of them. Each is then, by commands in processes of
their own, imports included:

- reshape: put on twice as many ranks, with experts over four;
- grow: its experts' inner width doubled (about twice the bytes);
- ds_to_universal: converted by DeepSpeed's own converter, with as many workers as there are cores.

Next to each stand ``cp -r`` of its output, and the same followed by ``sync``: the first two see every file on the disk
before they publish it, which cp doesn't. They are run by turns, and the least of each one's times counts. Before each,
earlier writes are flushed (``sync``), so that nobody pays for another's. The input is in the page cache, if memory
allows. Peak memory is anonymous resident memory (RssAnon of all processes of the command, sampled every 20 ms). Linux
only.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from benchmarks.common import EXPERT_PARALLEL, table
from ds_sparkling.spec.command_line import directory_argument, ends_in_words, path_argument, positive, positive_float


@ends_in_words()
def main(argv: Sequence[str] | None = None) -> None:
    """Entry point: measure all checkpoints and write the table."""
    parser = argparse.ArgumentParser(
        prog="bench_expand.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--sizes", type=positive_float, nargs="+", default=[0.2, 1.0, 4.0], help="GB of weights and moments"
    )
    parser.add_argument("--ranks", type=positive, nargs="+", default=[2, 4, 8], help="ranks of each of them")
    parser.add_argument("--repeat", type=positive, default=3, help="runs of each (default: %(default)s)")
    parser.add_argument("--no-universal", action="store_true", help="leave DeepSpeed's converter out")
    parser.add_argument("--directory", type=directory_argument, help="where to work (default: a temporary directory)")
    parser.add_argument("--json", type=path_argument, help="also write the figures here")
    options = parser.parse_args(argv)
    if len(options.sizes) != len(options.ranks):
        parser.error("--sizes and --ranks must have the same length")
    if any(ranks < EXPERT_PARALLEL or ranks % EXPERT_PARALLEL for ranks in options.ranks):
        parser.error(f"--ranks must be multiples of {EXPERT_PARALLEL}")
    from benchmarks.offline_growth import COLUMNS, OfflineRow, measure
    from ds_sparkling.progress import progress_bar

    rows: list[OfflineRow] = []
    with tempfile.TemporaryDirectory(prefix="bench-expand-", dir=options.directory) as scratch:
        cases = list(zip(options.sizes, options.ranks, strict=True))
        with progress_bar(cases, unit="checkpoint", leave=True) as bar:
            for size, ranks in bar:
                rows += measure(size, ranks, Path(scratch), repeat=options.repeat, universal=not options.no_universal)
    print(table(COLUMNS, rows))
    if options.json is not None:
        options.json.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")


if __name__ == "__main__":
    main()
