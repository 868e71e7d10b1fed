"""Serves one worker: ``python scripts/run_websocket_server.py --id alice --host 127.0.0.1 --port 8777``."""

from planrt.command_line import leave
from planrt.fl.serve import main

if __name__ == "__main__":
    leave(main())
