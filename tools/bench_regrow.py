"""Benchmark of growing a live engine: ``python tools/bench_regrow.py --help``."""

from benchmarks.live_growth import main

if __name__ == "__main__":
    main()
