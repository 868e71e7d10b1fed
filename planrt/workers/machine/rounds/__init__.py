"""What rounds of training ask of a worker: its data sets (`training.py`, `batches.py`), plans and secure sums."""
