"""The paper's experiments in small: ``python tools/reproduce.py --help``."""

from experiments.command import main

if __name__ == "__main__":
    main()
