"""Grow a small instance of a model before anything is trained, and compare it with what it was."""
