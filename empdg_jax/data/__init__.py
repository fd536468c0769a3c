"""From EmpatheticDialogues to batches of token ids."""
