"""One page of everything that is known about an output."""
