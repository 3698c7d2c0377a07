"""Checks a growth on a small instance of the model: ``python tools/check_growth.py --help``."""

from ds_sparkling.check.command import main

if __name__ == "__main__":
    main()
