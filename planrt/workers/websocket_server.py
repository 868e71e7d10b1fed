"""Where scripts written for PySyft 0.2 look for `WebsocketServerWorker`."""

from planrt.workers.server import WebsocketServerWorker

__all__ = ["WebsocketServerWorker"]
