"""Serves one worker: ``python scripts/run_websocket_server.py --id alice --host 127.0.0.1 --port 8777``."""

import signal

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # while all this is imported, Ctrl-C shows no traceback

from planrt.command_line import leave
from planrt.fl.serve import main

if __name__ == "__main__":
    leave(main(alone=True))
