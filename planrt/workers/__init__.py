"""Workers: the state machine that runs plans next to the data, its clients, and the pipes between them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from planrt.lazy import names_of

if TYPE_CHECKING:
    from planrt.workers.base import BaseWorker
    from planrt.workers.datasets import BaseDataset
    from planrt.workers.virtual import VirtualWorker
    from planrt.workers.websocket_client import WebsocketClientWorker
    from planrt.workers.websocket_server import WebsocketServerWorker

_HOMES = {
    "BaseDataset": "planrt.workers.datasets",
    "BaseWorker": "planrt.workers.base",
    "VirtualWorker": "planrt.workers.virtual",
    "WebsocketClientWorker": "planrt.workers.websocket_client",
    "WebsocketServerWorker": "planrt.workers.websocket_server",
}
"""Public name -> module, imported at first use: the machine needs no client, and a client no machine."""

__all__ = ["BaseDataset", "BaseWorker", "VirtualWorker", "WebsocketClientWorker", "WebsocketServerWorker"]

__getattr__ = names_of(__name__, _HOMES)
