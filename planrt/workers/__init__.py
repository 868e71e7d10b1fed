"""Workers: the state machine that runs plans next to the data, its clients, and the pipes between them."""

from planrt.workers.clients import BaseWorker, VirtualWorker, WebsocketClientWorker
from planrt.workers.datasets import BaseDataset
from planrt.workers.server import WebsocketServerWorker

__all__ = ["BaseDataset", "BaseWorker", "VirtualWorker", "WebsocketClientWorker", "WebsocketServerWorker"]
