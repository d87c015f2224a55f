"""The training loop, its phases, losses and checkpoints."""
