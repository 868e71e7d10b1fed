"""``python -m planrt`` is the command ``planrt``."""

from planrt.cli import command

command()
