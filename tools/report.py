"""Compares runs on one page: ``python tools/report.py --help``."""

from ds_sparkling.report.command import main

if __name__ == "__main__":
    main()
