"""Find which dimension of which parameter belongs to which axis: read on the meta device, try, and prove."""
