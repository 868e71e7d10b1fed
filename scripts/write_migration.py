"""Writes MIGRATION.md from the table in `planrt.compat_names`: ``python scripts/write_migration.py``."""

from __future__ import annotations

from pathlib import Path

from planrt.compat_names import METHODS, NAMES, Name

FILE = Path(__file__).parents[1] / "MIGRATION.md"

_TOP = """\
# From PySyft 0.2 to planrt

Most scripts of PySyft 0.2 need one line changed:

```python
import planrt as sy  # was: import syft as sy
```

Other imports follow the table. For a script that cannot be edited, `import planrt.compat` makes `import syft` and
all modules of the table's left column work; it refuses where a real PySyft is installed. So this runs `script.py` as it
stands:

```text
# script.py
import syft as sy
import torch

hook = sy.TorchHook(torch)
bob = sy.VirtualWorker(hook, id="bob")
print(torch.tensor([1, 2]).send(bob).get())
```

```console
$ python -c "import planrt.compat, runpy; runpy.run_path('script.py', run_name='__main__')"
tensor([1, 2])
```

A row without a name of planrt says why there is none and what to write. This page is written by
`python scripts/write_migration.py` from `planrt/compat_names.py`.

## What is different on purpose

- **Private data.** `x.send(bob, private=True)` and `allowed_users=[...]` say who may read, and a token shown at the
  connection says who asks. `x.private_tensor(...)` and `pointer.get(user=...)` are refused: any string would do.
- **Search** gives pointers on virtual workers too, never the tensors themselves.
- **Objects** live as long as their pointers, their tags or their session. With its connection untagged ones go.
- **Plans** take a seed with each call; `torch.manual_seed` in a plan is refused. Python functions and TorchScript are
  not run by workers: they are translated into plans here, or refused.
- **The loss of an evaluation** is the mean over the samples. 0.2 divided it by the number of samples once more.
- **`protocol.run`** prints what goes where only with `Protocol(..., verbose=True)`, and sends inputs that are here.
- **`FederatedDataLoader(num_iterators=3)`** reads three workers at a time, and every item once.
- **Gradients** stay on their worker: `send(requires_grad=True)` and `move(..., requires_grad=True)` are refused, and
  say how a backward pass goes on here.
- **Listings** of websocket workers (`_objects`, `list_objects_remote`) show pointers: values come with `get`.
- **A client's id** must be the id of the server it dials.
- **torch is not patched**: tensors and modules get a few methods, and `torch.native_*` says which function to call.
"""


def migration() -> str:
    """The text of MIGRATION.md."""
    return "\n".join(
        [
            _TOP,
            "## Modules and names",
            "",
            *_table(NAMES),
            "",
            "## Methods and attributes",
            "",
            *_table(METHODS),
            "",
        ]
    )


def _table(names: tuple[Name, ...]) -> list[str]:
    rows = [f"| `{one.old}` | {f'`{one.new}`' if one.new else '-'} | {one.note} |" for one in names]
    return ["| PySyft 0.2 | planrt | what is different, and what to write |", "|---|---|---|", *rows]


if __name__ == "__main__":
    FILE.write_text(migration(), encoding="utf-8")
