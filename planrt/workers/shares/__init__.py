"""Shares between workers, as their client sees them."""
