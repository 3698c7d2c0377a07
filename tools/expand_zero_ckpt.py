"""Widens, reshapes or exports a ZeRO checkpoint: ``python tools/expand_zero_ckpt.py --help``."""

from ds_sparkling.checkpoint.command import main

if __name__ == "__main__":
    main()
