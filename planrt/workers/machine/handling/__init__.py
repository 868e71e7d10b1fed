"""How a worker's state machine handles its events; see `planrt.workers.machine.state`."""
