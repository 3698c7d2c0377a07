"""Grow a small instance of a model and see whether the growth keeps what its strategy promises, before a run.

    python tools/check_growth.py --model config.json --widths hidden_size=4096 --init copy-copy --scaling rms

The model is a Hugging Face config.json, or module:function of what builds it from its widths (looked for in the
working directory as well). It is made small, with true proportions and a layer of each kind, gets random parameters
that all matter, and is grown. Printed are the plan, RMS before and after of every module, what was copied, drawn and
zero, and the largest difference of the logits.

Copy-copy growth at integer ratios promises the same function, as does scaling "function"; otherwise scaling "rms"
promises RMS within a band. Whatever the strategy, a model that scales something by its own width is found out: its
function would change silently. The exit status is 0 if all is kept, and 1 if something isn't or can't be checked.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ds_sparkling.figures import add_picture_options, check_picture_options, save_picture
from ds_sparkling.spec.command_line import end, ends_in_words, path_argument, whole_number
from ds_sparkling.spec.strategy import INIT_PAIRS, Init, Scaling, Strategy
from ds_sparkling.spec.widths import parse_widths

if TYPE_CHECKING:
    from ds_sparkling.check.growth_report import GrowthReport

_DTYPES = ("float64", "float32")
_PAIRS = {f"{fan_out.value}-{fan_in.value}": (fan_out, fan_in) for fan_out, fan_in in INIT_PAIRS}


@ends_in_words(status=1)
def main(argv: Sequence[str] | None = None) -> None:
    """Entry point: write the report, then the picture."""
    options = _parse(argv)
    from ds_sparkling.check.rms_picture import picture  # here, so that --help doesn't wait for torch

    logging.basicConfig(format="%(levelname)s: %(message)s", level=logging.WARNING)
    report = _check(options)
    text = json.dumps(report.to_dict()) if options.json else report.describe()
    sys.stdout.write(text + "\n")
    if not options.no_picture:
        save_picture(picture(report, f"Growing {Path(options.model).name}"), options.output)
        if not options.json:
            sys.stdout.write(f"\npicture: {options.output}\n")
    if not report.kept:
        end("the growth doesn't keep what it promises", status=1)


def _check(options: argparse.Namespace) -> GrowthReport:
    import torch

    from ds_sparkling.check.growth_report import check_growth
    from ds_sparkling.discovery.factory import HuggingFaceFactory, find_factory, named_inputs
    from ds_sparkling.spec.config import read_json, sparkling_config

    fan_out, fan_in = _PAIRS[options.init]
    strategy = Strategy(
        fan_out=fan_out, fan_in=fan_in, norm=Init(options.norm), scaling=Scaling(options.scaling), seed=options.seed
    )
    build_model = find_factory(options.model)
    block = sparkling_config(read_json(options.deepspeed_config) if options.deepspeed_config else {})
    inputs = options.inputs or block.inputs
    start = dict(options.start)
    if isinstance(build_model, HuggingFaceFactory):
        known = build_model.config
        start = {axis: known[axis] for axis in options.widths if isinstance(known.get(axis), int)} | start
    return check_growth(
        build_model,
        start,
        options.widths,
        strategy,
        hints=block.axes,
        inputs=None if inputs is None else named_inputs(inputs),
        as_is=options.as_is,
        dtype=getattr(torch, options.dtype),
        seed=options.seed,
    )


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="check_growth.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True, metavar="MODEL", help="a config.json, or module:function")
    parser.add_argument("--widths", nargs="+", required=True, metavar="AXIS=WIDTH", help="axes that grow, and how far")
    parser.add_argument(
        "--start", nargs="+", default=[], metavar="AXIS=WIDTH", help="widths to start with (default: the model's own)"
    )
    parser.add_argument("--init", choices=_PAIRS, default="copy-copy", help="of new units (default: %(default)s)")
    parser.add_argument("--norm", choices=("copy", "random"), default="copy", help="init of new norm gains")
    parser.add_argument("--scaling", choices=[s.value for s in Scaling], default="rms", help="(default: %(default)s)")
    parser.add_argument("--as-is", action="store_true", help="run the model itself instead of a small instance")
    parser.add_argument("--dtype", choices=_DTYPES, default=_DTYPES[0], help="to run in (default: %(default)s)")
    parser.add_argument("--seed", type=whole_number, default=0, help="of parameters, token ids and new random units")
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    parser.add_argument(
        "--deepspeed_config",
        type=path_argument,
        metavar="FILE",
        help='DeepSpeed JSON whose "sparkling" block may have "axes", for parameters that can\'t be read, and "inputs"',
    )
    parser.add_argument(
        "--inputs", metavar="MODULE:FUNCTION", help="what gives the model's inputs (default: random token ids)"
    )
    add_picture_options(parser, "-growth.png")
    options = parser.parse_args(argv)
    options.widths, options.start = (
        parse_widths(parser, "--widths", options.widths),
        parse_widths(parser, "--start", options.start),
    )
    check_picture_options(parser, options, f"{Path(options.model).stem.replace(':', '-')}-growth.png")
    return options
