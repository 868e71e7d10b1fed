"""Processes that are copies of others."""

import os
import subprocess

import pytest

DRAW = """
import os
from planrt.workers.wire.objects import new_id

new_id()
end, tell = os.pipe()
if os.fork():
    os.wait()
    print(new_id(), int(os.read(end, 100)))
else:
    os.write(tell, str(new_id()).encode())
    os._exit(0)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system makes no copies of processes")
def test_a_copy_of_a_process_chooses_other_ids_for_its_objects(warm_python):
    done = subprocess.run([warm_python, "-c", DRAW], capture_output=True, text=True, check=True, timeout=100)
    ours, theirs = map(int, done.stdout.split())
    assert abs(ours - theirs) > 1  # not the same, nor the next ones
