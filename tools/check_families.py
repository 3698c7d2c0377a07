"""Growth of the model families, shown: ``python tools/check_families.py --help``."""

from benchmarks.families import main

if __name__ == "__main__":
    main()
