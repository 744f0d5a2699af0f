"""The pictures of the SWA paper, on saved checkpoints: what the loss is like around an average."""
