"""Runs compared on one page: event files in, data, verdict, page out. Neither torch nor DeepSpeed is needed."""
