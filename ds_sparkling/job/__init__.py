"""The main job around the engine: how it is started, and runs of one config compared."""
