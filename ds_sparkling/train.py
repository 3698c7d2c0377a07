"""The command line of the main job, for a launcher to start on every rank.

deepspeed --num_gpus 2 ds_sparkling/train.py --deepspeed_config configs/quickstart.json
"""

from __future__ import annotations

from collections.abc import Sequence

from ds_sparkling.job.command import job_parser


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point, once per rank."""
    args = job_parser("ds_sparkling/train.py").parse_args(argv)
    from ds_sparkling.job.main_job import train  # here, so that --help doesn't wait for DeepSpeed

    train(args)


if __name__ == "__main__":
    main()
