"""A worker and its clients in one thread, on a clock that is counted, over links that are cut when the seed says so.

Everything is what runs in production but three things: the event loop's clock jumps to whatever comes next (so an hour
passes in no time, and a run in which nothing can happen any more fails at once), the compute thread is the loop itself,
and pipes carry bytes between two queues, with delays, and lose what is under way when they are cut. The same seed gives
the same run, step by step. This is how FoundationDB is tested; and what it finds is found again by the seed.
"""

from __future__ import annotations

import asyncio
import random
import selectors

from planrt.errors import ConnectError
from planrt.serde.frames import Limits, in_memory
from planrt.workers.client import redialling
from planrt.workers.client.connection import Connection
from planrt.workers.client.redialling import Redialling
from planrt.workers.machine.state import WorkerState
from planrt.workers.serving.host import WorkerHost
from planrt.workers.transport.pipes import Traffic, assembling
from planrt.workers.wire.channel import Channel


class _Jumping(selectors.SelectSelector):
    """Waits for nothing: the time until the next timer has passed at once."""

    def __init__(self):
        super().__init__()
        self.now = 0.0

    def select(self, timeout=None):
        if timeout is None:
            raise RuntimeError("nothing will ever happen again: somebody waits for ever")
        self.now += max(0.0, timeout)
        return []


class SimulatedLoop(asyncio.SelectorEventLoop):
    """An event loop whose time is counted, in seconds."""

    def __init__(self):
        self._jumping = _Jumping()
        super().__init__(self._jumping)

    def time(self):
        return self._jumping.now


def simulate(program):
    """Runs a coroutine on a loop of its own, to its end; tasks that are left are cancelled."""
    with asyncio.Runner(loop_factory=SimulatedLoop) as runner:
        return runner.run(program)


class InlineCompute:
    """In the place of the compute thread: one thing after the other, each taking a while of the loop's time."""

    def __init__(self, draw):
        self._draw = draw
        self._turn = asyncio.Lock()
        self.busy = False

    @property
    def asked(self):
        return int(self._turn.locked())

    async def run(self, function, *args):
        async with self._turn:
            await asyncio.sleep(self._draw.choice((0.0, 0.001, 0.01, 0.3)))
            return function(*args)


class SimulatedPipe:
    """One end of a link. What is sent is copied, and arrives later, in order, unless the link is cut before."""

    hands_over = False

    def __init__(self, network, address, channel):
        self.address = address
        self.traffic = Traffic()
        self.channel = channel
        self._network = network
        self._incoming = asyncio.Queue()
        self.other = None
        self.cut = False  # this end knows it
        self.severed = False  # nothing goes through any more
        self._gone = asyncio.Event()
        self._arrives = 0.0
        self._under_way = []

    async def send(self, frame, *, message=True):
        if self.cut:
            raise ConnectionResetError("the link was cut")
        data = b"".join(frame.fragments())
        self.traffic.messages_sent += 1
        loop, draw = asyncio.get_running_loop(), self._network.draw
        self._arrives = max(self._arrives + 1e-6, loop.time() + draw.choice((0.0, 0.001, 0.05)))
        if not self.severed:
            self._under_way.append(loop.call_at(self._arrives, self.other.arrive, data))
        if draw.random() < 0.5:
            await asyncio.sleep(0.001)
        if self.cut and draw.random() < 0.5:
            raise ConnectionResetError("the link was cut while this was sent")

    def arrive(self, data):
        if not self.cut:
            self._incoming.put_nowait(data)

    async def receive(self, allocate=in_memory):
        data = await self._incoming.get()
        if data is None:
            self._incoming.put_nowait(None)
            if self._network.draw.random() < 0.5:
                raise ConnectionResetError("the link was cut")
            return None
        parts = assembling(Limits(), self.address)(allocate)
        for start in range(0, len(data), 100):
            parts.feed(data[start : start + 100])
        self.traffic.messages_received += 1
        return parts.finish()

    def send_now(self, frame):
        return False

    async def answers(self, seconds):
        if not self.severed:
            return True
        await asyncio.sleep(seconds)
        return False

    async def gone(self):
        await self._gone.wait()

    def notice(self):
        """This end finds out; what it has in its buffers can be read still, or is lost as well."""
        self.cut = True
        self._gone.set()
        if self._network.draw.random() < 0.5:
            while not self._incoming.empty():
                self._incoming.get_nowait()
        self._incoming.put_nowait(None)

    def sever(self, late):
        """Cuts the link: what is under way is lost. The ends find out now or `late`r, in seconds."""
        loop, draw = asyncio.get_running_loop(), self._network.draw
        for end in (self, self.other):
            if end.severed:
                return
            for message in end._under_way:
                message.cancel()
        self.severed = self.other.severed = True
        for end in (self, self.other):
            loop.call_later(late if draw.random() < 0.4 else 0.0, end.notice)

    async def close(self):
        if not self.cut:
            self.notice()
        if self.other is not None and not self.other.cut:
            # What was sent before arrives first.
            when = max(self._arrives, asyncio.get_running_loop().time()) + 1e-6
            asyncio.get_running_loop().call_at(when, self.other.notice)
        self.severed = self.severed or self.other is None
        if self.other is not None:
            self.severed = self.other.severed = True


class Network:
    """Workers under addresses, and what happens between them and their clients; all of it drawn from `seed`."""

    def __init__(self, seed, *, limits=None):
        self.draw = random.Random(seed)
        redialling._jitter.seed(seed)
        self.limits = limits or Limits()
        self.hosts = {}
        self.states = {}
        self.serving = set()
        self.links = []
        self.down_until = 0.0

    def start(self, worker_id, **options):
        """Starts a worker, or starts it again: what it held is gone."""
        for end in self.links:
            if end.address == worker_id:
                end.sever(0.0)
        self.states[worker_id] = WorkerState(worker_id, limits=self.limits, **options)
        self.hosts[worker_id] = WorkerHost(
            self.states[worker_id], InlineCompute(self.draw), limits=self.limits
        )

    async def dial(self, worker_id):
        loop = asyncio.get_running_loop()
        await asyncio.sleep(self.draw.choice((0.0, 0.01)))
        if loop.time() < self.down_until or worker_id not in self.hosts:
            raise ConnectError("nobody answers", address=worker_id)
        near = SimulatedPipe(self, worker_id, Channel())
        far = SimulatedPipe(self, worker_id, Channel(host="client"))
        near.other, far.other = far, near
        serving = asyncio.create_task(self.hosts[worker_id].serve(far))
        self.serving.add(serving)
        serving.add_done_callback(self.serving.discard)
        self.links = [one for one in self.links if not one.severed]
        self.links.append(near)
        return near

    async def connect(self, worker_id, *, seconds=60.0, token=""):
        redialling = Redialling(lambda: self.dial(worker_id), token=token, seconds=seconds)
        return await Connection.open(
            await redialling.dial(),
            worker_id,
            timeout=30,
            limits=self.limits,
            redialling=redialling,
            token=token,
        )

    def cut(self, *, late=0.0, down=0.0):
        """Cuts all links; for `down` seconds nobody gets through."""
        self.down_until = max(self.down_until, asyncio.get_running_loop().time() + down)
        for end in self.links:
            end.sever(late)
