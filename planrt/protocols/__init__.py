"""Protocols: plans chained across workers, run as one."""

from planrt.protocols.pointer import PointerProtocol
from planrt.protocols.protocol import Protocol
from planrt.protocols.steps import Step

__all__ = ["PointerProtocol", "Protocol", "Step"]
