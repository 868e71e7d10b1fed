"""Where scripts written for PySyft 0.2 look for `WebsocketClientWorker`."""

from planrt.workers.clients import WebsocketClientWorker

__all__ = ["WebsocketClientWorker"]
