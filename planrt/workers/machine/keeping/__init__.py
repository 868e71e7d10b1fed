"""Sessions that outlive their connections: what each needs (`answers.py`), and their table (`sessions.py`)."""
