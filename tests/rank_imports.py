"""What every rank needs, imported once by the server that forks them."""

import os

os.environ["DS_ACCELERATOR"] = "cpu"  # several ranks, wherever the tests run
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["TORCHDYNAMO_DISABLE"] = "1"  # Muon would compile its kernels on every rank

import logging
import warnings

import deepspeed
import hypothesis  # noqa: F401
import pytest  # noqa: F401
import torch._dynamo  # noqa: F401 - DeepSpeed's first engine would import it

import ds_sparkling  # noqa: F401

warnings.filterwarnings("ignore", category=FutureWarning)
deepspeed.utils.logger.setLevel(logging.ERROR)
