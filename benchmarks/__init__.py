"""What planrt's speed and memory claims rest on: ``python -m benchmarks``. See README.md beside this file."""
