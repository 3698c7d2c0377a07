"""Tell what a growth costs and saves, before the run: as text, as JSON and as a picture.

    python tools/plan_growth.py --config configs/olmoe-0.5b-2.5b-joint2x.json --world-size 64
    python tools/plan_growth.py --config config.json --widths moe_intermediate_size=4096 --tokens 1e12 --zero 3

Total and active parameters before and after; training compute and the share saved by when the growth happens (the
paper's Eq. 29); memory per rank before, during and after; bytes that a rank receives; the expected pause; two-stage
recipes next to the planned one. The model is built on the meta device only, so any size takes seconds. FILE is a
DeepSpeed JSON with a "sparkling" block, whose model is its "model" block or --model; or a model alone, a Hugging Face
config.json or module:function that builds it from its widths, with --widths.

Bytes follow from shapes and from how DeepSpeed partitions them. The pause doesn't: it rests on the bandwidths and the
engine start given below, which are assumptions to be replaced by your own figures.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ds_sparkling.figures import add_picture_options, check_picture_options, save_picture
from ds_sparkling.planner.assumptions import DEFAULT_RANKS, Assumptions
from ds_sparkling.spec.command_line import count, ends_in_words, positive, positive_float
from ds_sparkling.spec.widths import parse_widths

if TYPE_CHECKING:
    from ds_sparkling.planner.subject import Options

_TWO_STAGE = (1 / 3, 2 / 3)


@ends_in_words()
def main(argv: Sequence[str] | None = None) -> None:
    """Entry point: write the text or the JSON, then the picture."""
    args = _parse(argv)
    # Here, so that --help doesn't wait for torch.
    from ds_sparkling.planner.planning_report import Planning
    from ds_sparkling.planner.savings_picture import picture
    from ds_sparkling.planner.subject import read_subject

    subject = read_subject(args.config, _options(args))
    assumed = Assumptions(args.bandwidth, args.write_bandwidth, args.engine_start)
    report = Planning.make(subject, tuple(args.two_stage), assumed)
    sys.stdout.write((json.dumps(report.to_dict(), indent=1) if args.json else report.describe()) + "\n")
    if not args.no_picture:
        save_picture(picture(report), args.output)
        if not args.json:
            sys.stdout.write(f"\npicture: {args.output}\n")


def _options(args: argparse.Namespace) -> Options:
    from ds_sparkling.planner.subject import Options

    return Options(
        model=args.model,
        widths=dict(args.widths),
        share=args.at,
        tokens=args.tokens,
        steps=args.steps,
        ranks=args.world_size,
        stage=args.zero,
        expert_parallel=args.expert_parallel,
        dtype=args.dtype,
        states=args.states,
        experts_per_token=args.experts_per_token,
    )


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="plan_growth.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--config", required=True, metavar="FILE", help="DeepSpeed JSON, config.json or module:function"
    )
    _add_run(parser)
    _add_spread(parser)
    _add_assumptions(parser)
    parser.add_argument(
        "--json", action="store_true", help="print JSON in place of text: bytes, seconds, FLOPs, shares"
    )
    add_picture_options(parser, "-plan.png")
    args = parser.parse_args(argv)
    args.widths = tuple(parse_widths(parser, "--widths", args.widths).items())
    stem = re.sub(r"\W+", "-", args.config) if ":" in args.config else Path(args.config).stem
    check_picture_options(parser, args, f"{stem}-plan.png")
    return args


def _add_run(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("the run")
    group.add_argument("--model", metavar="REF", help="what builds the model, if FILE is a DeepSpeed JSON without it")
    group.add_argument(
        "--widths",
        nargs="+",
        default=[],
        metavar="AXIS=WIDTH",
        help="one growth to these widths, in place of the config's growths",
    )
    group.add_argument(
        "--at", type=_share, default=0.5, metavar="SHARE", help="of the tokens before --widths (default: %(default)s)"
    )
    group.add_argument(
        "--two-stage",
        nargs=2,
        type=_share,
        default=_TWO_STAGE,
        metavar=("FIRST", "SECOND"),
        help="shares of the tokens at the growths of two-stage recipes (default: 1/3 2/3)",
    )
    group.add_argument(
        "--tokens",
        type=positive_float,
        metavar="N",
        help="of the whole run, e.g. 200e9 (default: training.steps x train_batch_size x training.sequence_length)",
    )
    group.add_argument(
        "--steps", type=positive, metavar="N", help="optimizer steps of the whole run (default: by the config)"
    )
    group.add_argument("--experts-per-token", type=positive, metavar="K", help="if the model's config doesn't tell")


def _add_spread(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group(
        "how it is spread (default: by the DeepSpeed JSON; without one ZeRO-3, bf16, AdamW)"
    )
    group.add_argument(
        "--world-size",
        type=positive,
        metavar="N",
        help=f"data-parallel ranks (default: {DEFAULT_RANKS}, or --expert-parallel if that is more)",
    )
    group.add_argument("--zero", type=int, choices=(0, 1, 2, 3), help="ZeRO stage")
    group.add_argument("--expert-parallel", type=positive, metavar="M", help="ranks that share one set of experts")
    group.add_argument("--dtype", choices=("fp32", "bf16", "fp16"), help="of the compute weights")
    group.add_argument("--states", type=count, metavar="N", help="fp32 tensors of optimizer state per parameter")


def _add_assumptions(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("assumptions that the pause rests on")
    for option, default, text in (
        ("--bandwidth", Assumptions.bandwidth, "GB/s that each rank receives with"),
        ("--write-bandwidth", Assumptions.write_bandwidth, "GB/s that each rank writes a checkpoint with"),
        ("--engine-start", Assumptions.engine_start, "seconds to construct an engine, its broadcast apart"),
    ):
        group.add_argument(option, type=float, default=default, metavar="X", help=f"{text} (default: %(default)g)")


def _share(text: str) -> float:
    share = positive_float(text)
    if not share < 1:
        raise argparse.ArgumentTypeError(f"must be a share between 0 and 1, got {text}")
    return share


if __name__ == "__main__":
    main()
