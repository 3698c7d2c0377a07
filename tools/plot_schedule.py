"""Learning rates of every birth of a planned run: ``python tools/plot_schedule.py --help``."""

from ds_sparkling.planner.plot_schedule import main

if __name__ == "__main__":
    main()
