"""What both sides of a connection share: messages, posted ops, specs of objects, the run of a chain. No I/O."""
