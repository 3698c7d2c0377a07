"""Parameters, compute saved, memory, bytes and pause of a planned growth: ``python tools/plan_growth.py --help``."""

from ds_sparkling.planner.command import main

if __name__ == "__main__":
    main()
