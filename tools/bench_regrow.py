"""Benchmark of growing a live engine: ``python tools/bench_regrow.py --help``."""

from ds_sparkling.benchmarks.regrow import main

if __name__ == "__main__":
    main()
