"""Three-phase training: steps, states, checkpoints and logs."""
