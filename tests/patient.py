"""Runs a command of planrt as Python would, but for the time that it has to end in order, and to find workers.

``python tests/patient.py [--background] -m MODULE ...``, or with a script in place of the module: for tests that want a
real start, however busy the machine is. With ``--background`` Ctrl-C is ignored, as shells do for what a script starts
with `&`.
"""

import os
import runpy
import signal
import sys

if __name__ == "__main__":
    sys.path[0] = os.getcwd()
    words = sys.argv[1:]
    if words[0] == "--background":
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        del words[0]
    sys.orig_argv = [sys.executable, *words]
    import planrt.fl.runs.discovery
    import planrt.stopping

    planrt.fl.runs.discovery.HANDSHAKE_SECONDS = planrt.stopping.GRACE = 60.0
    if words[0] == "-m":
        sys.argv = words[1:]
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = words
        runpy.run_path(words[0], run_name="__main__")
