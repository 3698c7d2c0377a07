"""JSON in, frozen values out: axes, strategy, config, record, partitions. Knows torch at most, and no model."""
