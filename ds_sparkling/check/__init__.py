"""Growing a small instance of a model before anything is trained, and comparing it with what it was."""
