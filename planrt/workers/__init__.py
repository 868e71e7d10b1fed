"""Workers: the state machine that runs plans next to the data, its clients, and the pipes between them."""

from planrt.workers.clients import BaseWorker
from planrt.workers.datasets import BaseDataset
from planrt.workers.server import WebsocketServerWorker
from planrt.workers.virtual import VirtualWorker
from planrt.workers.websocket_client import WebsocketClientWorker

__all__ = ["BaseDataset", "BaseWorker", "VirtualWorker", "WebsocketClientWorker", "WebsocketServerWorker"]
