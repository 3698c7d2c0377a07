"""Inside the optimizer step: a learning rate and an age per element."""
