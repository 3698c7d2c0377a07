"""How fast new entries are drawn on the CPU, against torch.Tensor.normal_.

    python tools/bench_draws.py --elements 16e6 --threads 1

One weight matrix of --elements entries after its growth is filled in memory, by runs of each of the following and of
normal_ by turns, of which the fastest count:

- random: seven of eight of its columns are new, and drawn with the old ones' RMS.
- cancelling: the same in pairs of opposite columns.
- perturbed: its columns have doubled, and all get noise that sums to zero over twins.
- perturbed, tripled: the same of three twins.

Everything is in the times: copies of old entries, factors, rounding to --dtype. Not in them are the old weight's
statistics, which are taken once.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from benchmarks.common import table
from ds_sparkling.spec.command_line import ends_in_words, path_argument, positive, positive_float


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="bench_draws.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--elements",
        type=lambda text: int(positive_float(text)),
        default=16_000_000,
        metavar="N",
        help="elements of the grown weight, about (default: 16e6)",
    )
    parser.add_argument("--row", type=positive, default=512, metavar="N", help="old entries of a row (default: 512)")
    parser.add_argument("--threads", type=positive, default=1, metavar="N", help="threads (default: 1)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32", help="of the weight")
    parser.add_argument("--repeat", type=positive, default=20, metavar="N", help="runs of each (default: 20)")
    parser.add_argument("--json", type=path_argument, metavar="FILE", help="write the rows here too, as objects")
    return parser.parse_args(argv)


@ends_in_words()
def main(argv: Sequence[str] | None = None) -> None:
    """Entry point: measure all kinds and write the table."""
    args = _parse(argv)
    import torch

    from benchmarks.draw_speed import COLUMNS, measure

    torch.set_num_threads(args.threads)
    rows = measure(args.elements, args.row, getattr(torch, args.dtype), args.repeat)
    path: Path | None = args.json
    if path is not None:
        path.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")
    sys.stdout.write(table(COLUMNS, rows) + "\n")


if __name__ == "__main__":
    main()
