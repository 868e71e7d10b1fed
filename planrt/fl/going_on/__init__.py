"""Runs that go on: what a checkpoint has of a run, when it is written, and how it is put back again."""
