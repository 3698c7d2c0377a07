"""Benchmark of widening and reshaping checkpoints: ``python tools/bench_expand.py --help``."""

from benchmarks.offline_growth import main

if __name__ == "__main__":
    main()
