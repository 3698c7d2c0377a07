"""Which dimension of which parameter belongs to which axis: read on the meta device, tried, and proved."""
