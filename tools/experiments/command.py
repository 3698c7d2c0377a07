"""The paper's experiments in small, on one machine, against every alternative that the paper names.

    python tools/reproduce.py                        # all experiments at the scale "small": some hours on two cores
    python tools/reproduce.py state ablation         # these alone
    python tools/reproduce.py --scale tiny           # all in a minute or two, to see that they run

Finished runs are kept, so a second call goes on where the first was stopped, and experiments share the runs that they
have in common. Tables, plots and the page are written when it is done, and with --page-only at any time.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from ds_sparkling.errors import SparklingError
from ds_sparkling.spec.command_line import ends_in_words, path_argument, positive
from experiments.catalogue import EXPERIMENTS, Experiment, Lab
from experiments.runs import Outcome, TrainingRun
from experiments.scales import SCALES


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    names = "\n".join(
        f"  {experiment.name:<17} {experiment.title} ({experiment.source})" for experiment in EXPERIMENTS.values()
    )
    parser = argparse.ArgumentParser(
        prog="reproduce.py",
        description=__doc__,
        epilog=f"experiments:\n{names}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("experiments", nargs="*", metavar="EXPERIMENT", help="which ones; all by default")
    parser.add_argument("--scale", choices=list(SCALES), default="small", help="how large (default: small)")
    parser.add_argument(
        "--seeds", type=positive, metavar="N", help="seeds per variant, at least (default: the scale's)"
    )
    parser.add_argument(
        "--jobs", type=positive, metavar="K", help="runs at a time (default: one per core; one on a GPU)"
    )
    parser.add_argument(
        "--data",
        default="",
        metavar="PATH",
        help="text to train on, as for train.py (default: the standard library's sources)",
    )
    parser.add_argument(
        "--output",
        type=path_argument,
        default=Path("docs/results"),
        metavar="DIR",
        help="where DIR/SCALE/ is written (default: docs/results)",
    )
    parser.add_argument(
        "--snapshots",
        type=path_argument,
        default=Path("runs/reproduce"),
        metavar="DIR",
        help="where trunks are kept meanwhile (default: runs/reproduce)",
    )
    parser.add_argument(
        "--page-only", action="store_true", help="train nothing; write tables, plots and page from what is there"
    )
    args = parser.parse_args(argv)
    unknown = [name for name in args.experiments if name not in EXPERIMENTS]
    if unknown:
        parser.error(f"there is no experiment {unknown[0]!r}; known: {', '.join(EXPERIMENTS)}")
    return args


def wanted_runs(experiments: Sequence[Experiment], lab: Lab) -> Iterator[TrainingRun]:
    """All runs that the experiments need, as far as they are known, one experiment after the other."""
    for experiment in experiments:
        for variant in experiment.variants(lab):
            yield from variant.runs(lab.seeds)


def _default_jobs() -> int:
    import torch

    return 1 if torch.cuda.is_available() else os.cpu_count() or 1


@ends_in_words()
def main(argv: Sequence[str] | None = None) -> None:
    """Entry point."""
    args = _parse(argv)
    # Here, so that --help doesn't wait for torch.
    from experiments.loop import VOCABULARY, corpus_of
    from experiments.page import write_page
    from experiments.queue import Queue
    from experiments.results import fullest_table
    from experiments.store import Store

    scale = SCALES[args.scale]
    seeds = args.seeds or scale.seeds
    chosen = [EXPERIMENTS[name] for name in args.experiments] or list(EXPERIMENTS.values())
    output = args.output / scale.name
    finished: Mapping[str, Outcome] = {}
    try:
        corpus = corpus_of(args.data)
        corpus.check(length=scale.shape.length, vocabulary=VOCABULARY)
        store = Store(output / "runs.jsonl", corpus.fingerprint, adding=not args.page_only)
        finished = store.outcomes
        lab = Lab(scale, args.data, seeds, finished)
        failures: dict[str, str] = {}
        if not args.page_only:
            snapshots = args.snapshots / scale.name / corpus.fingerprint
            queue = Queue(store, snapshots, args.jobs or _default_jobs())
            with contextlib.closing(store):
                queue.finish(lambda: wanted_runs(chosen, lab))
            failures = queue.failures
        # The page has all experiments, whichever were asked for now, and all seeds.
        usual = lab.with_seeds(scale.seeds)
        tables = [fullest_table(e, lab if e in chosen else usual) for e in EXPERIMENTS.values()]
        page = write_page(output, scale, tables)
    except SparklingError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.stderr.write(f"\nstopped; {len(finished)} finished runs are kept, and the same command goes on\n")
        sys.exit(130)
    sys.stdout.write(f"{len(finished)} runs are finished; the results are in {page}\n")
    for key, reason in failures.items():
        sys.stderr.write(f"run {key} failed: {reason}\n")
    if failures:
        sys.exit(1)


if __name__ == "__main__":
    main()
