"""Pointers in a notebook: a real Jupyter kernel, whose own event loop runs while cells do."""

import sys

import jupyter_client
import pytest

CELLS = [
    "import torch, asyncio, planrt as sy; hook = sy.TorchHook(torch)",
    "assert asyncio.get_running_loop().is_running()",
    # Blocking forms, although the kernel's loop is running:
    "bob = sy.VirtualWorker(hook, id='bob'); x = torch.ones(2).send(bob); print((x + x).get().tolist())",
    # and await forms, on that loop:
    "y = await torch.ones(2).async_send(bob); print((await (y * 3).async_get()).tolist())",
    "server = sy.WebsocketServerWorker('alice', threads=1); serving = server.running(); uri = serving.__enter__()",
    "alice = await sy.WebsocketClientWorker.connect('alice', uri)",
    "z = torch.ones(2).send(alice); print(z.get().tolist())",
    "print((await (y + 1).async_move(alice)).get().tolist())",
    "x",
    "alice.close(); serving.__exit__(None, None, None); bob.close()",
]


@pytest.mark.filterwarnings("default")
def test_a_notebook_uses_pointers_in_both_forms():
    manager = jupyter_client.KernelManager()
    manager.kernel_spec.argv[0] = sys.executable
    manager.start_kernel()
    client = manager.client()
    client.start_channels()
    try:
        client.wait_for_ready(timeout=60)
        printed, problems = [], []

        def collect(message):
            content = message["content"]
            if message["msg_type"] == "stream":
                printed.append(content["text"].strip())
            elif message["msg_type"] == "execute_result":
                printed.append(content["data"]["text/plain"])
            elif message["msg_type"] == "error":
                problems.append("\n".join(content["traceback"]))

        for cell in CELLS:
            client.execute_interactive(cell, timeout=60, output_hook=collect)
            assert not problems, problems
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)
    assert printed[:4] == ["[2.0, 2.0]", "[3.0, 3.0]", "[1.0, 1.0]", "[2.0, 2.0]"]
    assert printed[4].startswith("(Wrapper)>[PointerTensor | me:")


@pytest.mark.filterwarnings("default")
def test_an_error_in_a_recorded_function_names_the_cell_and_quotes_its_line():
    manager = jupyter_client.KernelManager()
    manager.kernel_spec.argv[0] = sys.executable
    manager.start_kernel()
    client = manager.client()
    client.start_channels()
    problems = []

    def collect(message):
        if message["msg_type"] == "error":
            problems.append((message["content"]["evalue"], "\n".join(message["content"]["traceback"])))

    try:
        client.wait_for_ready(timeout=60)
        client.execute_interactive("import torch, planrt as sy", timeout=60, output_hook=collect)
        cell = "def f(x):\n    y = x.sum()\n    return x if y > 0 else -x\n\nsy.func2plan()(f).build(torch.ones(2))"
        client.execute_interactive(cell, timeout=60, output_hook=collect)
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)
    ((message, traceback),) = problems
    assert "(at Cell In[2], line 3)" in message
    assert "ipykernel" not in message
    assert "return x if y > 0 else -x" in traceback
