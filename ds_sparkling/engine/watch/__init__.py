"""Measure a running engine, and show the measurements in its monitors."""
