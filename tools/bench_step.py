"""Benchmark of the optimizer step after a growth: ``python tools/bench_step.py --help``."""

from benchmarks.step_cost import main

if __name__ == "__main__":
    main()
