"""What the package's operations cost, measured against what they can't do without."""
