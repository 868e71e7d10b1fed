"""What sessions have and compute, counted for their users."""
