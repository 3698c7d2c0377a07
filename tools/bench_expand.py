"""Benchmark of widening and reshaping checkpoints: ``python tools/bench_expand.py --help``."""

from ds_sparkling.benchmarks.expand import main

if __name__ == "__main__":
    main()
