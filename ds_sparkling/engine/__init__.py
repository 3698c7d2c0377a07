"""The engine room: beside the main job's script, the only place that imports deepspeed.

Private parts of DeepSpeed, torch and transformers are read in ``internals.py`` and replaced in ``hooks.py`` alone; what
DeepSpeed's optimizers hold, and glue onto parameters, is touched by their adapters in ``optimizers/``.
"""
