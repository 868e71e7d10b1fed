"""Programs that look for holes with random input; see README.md."""
