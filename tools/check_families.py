"""Whether growing keeps the function of Hugging Face's model families: every family along every axis, in every room.

    python tools/check_families.py --write docs/models.md

Every model is tiny and its own code. Each cell is the largest difference of the logits after twice the width, with
every unit copied, over the largest logit, all in fp32:

- module: a plain module, grown by itself, with parameters that all matter.
- engine: trained by ZeRO-3 on two ranks, under AutoEP where DeepSpeed has a preset for the family, grown in place.
- offline: the same engine's checkpoint, widened as files and loaded into a wide engine by plain DeepSpeed.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from benchmarks.family_list import FAMILIES
from ds_sparkling.spec.command_line import ends_in_words, path_argument


@ends_in_words()
def main(argv: Sequence[str] | None = None) -> None:
    """Entry point."""
    names = [family.name for family in FAMILIES]
    parser = argparse.ArgumentParser(
        prog="check_families.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("families", nargs="*", metavar="FAMILY", help=f"all by default: {', '.join(names)}")
    parser.add_argument("--write", type=path_argument, metavar="FILE", help="put the table between its marks in FILE")
    options = parser.parse_args(argv)
    unknown = [name for name in options.families if name not in names]
    if unknown:
        parser.error(f"unknown family {unknown[0]!r}; known: {', '.join(names)}")
    # Here, so that --help doesn't wait for torch.
    from benchmarks.families import KEPT, markdown, measure, quiet, write_into

    quiet()
    families = [family for family in FAMILIES if not options.families or family.name in options.families]
    cells = measure(families)
    table = markdown(families, cells)
    sys.stdout.write(table)
    if options.write is not None:
        write_into(options.write, table)
    worst = max((d for cell in cells.values() for d in cell.differences.values()), default=0.0)
    if not worst <= KEPT:
        sys.exit(f"error: a growth changes logits by {worst:.1e} of the largest, more than {KEPT:.0e}")


if __name__ == "__main__":
    main()
