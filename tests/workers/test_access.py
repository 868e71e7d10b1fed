"""Which user may do what with which data: over both transports, by what users do."""

import asyncio
import contextlib

import pytest
import torch

import planrt
from planrt.errors import GetNotPermittedError, OptionError, PolicyRefusedError, UnknownDatasetError
from planrt.fl import TrainConfig
from planrt.loop import background_loop
from planrt.workers import VirtualWorker, WebsocketClientWorker, WebsocketServerWorker
from planrt.workers.machine.access import Access

USERS = {name: f"the long token of {name}" for name in ("ann", "ben", "eve")}
ACCESS = {
    "scans": {"see": ["ann", "ben"], "run": ["ann"]},
    "open": {"run": "*"},
    "hidden": {},
    "#patients": {"run": ["ben"], "fetch": ["ann"], "own": ["eve"]},
}


@pytest.fixture(scope="module", autouse=True)
def hook():
    return planrt.TorchHook(torch)


def points():
    x = torch.arange(8.0).reshape(4, 2)
    return planrt.BaseDataset(x, x.sum(1, keepdim=True))


@pytest.fixture
def clinic(transport):
    """``clinic("ann")`` connects as that user; ``clinic()`` as nobody."""
    keys = ("scans", "open", "hidden", "unnamed")
    data = [torch.tensor([3.0, 4.0]).tag("#patients"), torch.tensor([1.0]).tag("#other")]
    with contextlib.ExitStack() as stack:
        if transport == "memory":
            worker = VirtualWorker("clinic", users=USERS, data=data, access=ACCESS, auto_add=False)
            stack.enter_context(worker)
            for key in keys:
                worker.add_dataset(points(), key)
            yield lambda user=None: stack.enter_context(worker.connect_as(USERS[user] if user else ""))
            return
        server = WebsocketServerWorker("clinic", threads=1, users=USERS, data=data, access=ACCESS)
        for key in keys:
            server.add_dataset(points(), key)
        uri = stack.enter_context(server.running())

        def connect(user=None):
            token = USERS[user] if user else ""
            return stack.enter_context(WebsocketClientWorker("clinic", uri=uri, token=token, auto_add=False))

        yield connect


def test_each_is_told_of_what_it_may_see(clinic):
    told = {user: sorted(clinic(user).datasets) for user in ("ann", "ben", "eve", None)}
    assert told == {
        "ann": ["open", "scans", "unnamed"], "ben": ["open", "scans", "unnamed"],
        "eve": ["open", "unnamed"], None: ["open", "unnamed"],
    }  # fmt: skip


def test_a_data_set_that_no_table_is_about_is_told_to_its_owner(clinic, caplog):
    """Its key may be mistyped in the table, and then everybody may use it."""
    records = [one for one in caplog.get_records("setup") if one.getMessage() == "no_access_table"]
    assert [(one.data, one.tables) for one in records] == [("unnamed", "#patients, hidden, open, scans")]


def run_on(worker, key):
    """Trains, as if this client had been told of the data set."""
    config = TrainConfig(
        torch.nn.Linear(2, 1), torch.nn.MSELoss(), batch_size=2, optimizer_args={"lr": 0.1},
        example=(torch.ones(2, 2), torch.ones(2, 1)),
    )  # fmt: skip
    fitting = config.fit(worker, config.state, dataset_key=key, seed=1)
    return asyncio.run_coroutine_threadsafe(fitting, background_loop()).result(60)


def test_who_may_run_trains_and_others_do_not(clinic):
    ann, ben, nobody = clinic("ann"), clinic("ben"), clinic()
    for worker, key in ((ann, "scans"), (ann, "open"), (nobody, "open"), (ben, "unnamed")):
        assert run_on(worker, key).samples == 4
    with pytest.raises(PolicyRefusedError, match="user 'ben' may see the data set 'scans', and not run"):
        run_on(ben, "scans")
    absent = []
    for worker, key in ((nobody, "scans"), (ann, "hidden"), (nobody, "of nobody")):
        with pytest.raises(UnknownDatasetError) as caught:
            run_on(worker, key)
        absent.append(str(caught.value).replace(repr(key), "KEY").replace(", scans", ""))
    assert len(set(absent)) == 1  # what may not be seen is absent


def test_tensors_of_a_tag_are_found_computed_with_and_read_by_right(clinic):
    ann, ben, nobody = clinic("ann"), clinic("ben"), clinic()
    assert not nobody.search("#patients")
    assert (ann.search("#patients")[0] * 2).get().tolist() == [6, 8]
    (found,) = ben.search("#patients")
    with pytest.raises(GetNotPermittedError, match="ann may get it"):
        (found * 2).get()
    assert nobody.search("#other")[0].get().tolist() == [1]


def _published(publish, worker):
    kept = publish()
    worker.objects_count()  # what was posted has been heard then
    return kept


def test_only_its_owner_publishes_under_a_tag(clinic):
    ann, eve = clinic("ann"), clinic("eve")
    for publish in (
        lambda: torch.zeros(2).tag("#patients").send(ann),
        lambda: torch.zeros(2).send(ann).tag("#patients"),
        lambda: planrt.func2plan(args_shape=[(1,)])(lambda x: x + 1).tag("#patients").send(ann),
    ):
        with pytest.raises(PolicyRefusedError, match="user 'ann' may not publish under the tag '#patients'"):
            _published(publish, ann)
    assert len(ann.search("#patients")) == 1
    torch.zeros(2).tag("#patients").send(eve)
    eve.objects_count()
    assert len(ann.search("#patients")) == 2


def test_files_and_tables_that_say_something_else(tmp_path):
    path = tmp_path / "access.toml"
    path.write_text('[scans]\nsee = "*"\nrun = ["ann"]\n')
    access = Access.of(path)
    assert access.sees(None, "scans")
    with pytest.raises(planrt.errors.PolicyError, match="nobody may see"):
        access.check_run(None, "scans")
    for text, says in (
        (
            "[other]\nsee = []\n[scans]\nsee = []\nread = []",
            "line 5: .*unknown key 'read'.*see, run, fetch, own",
        ),
        ("scans = 3", "line 1: 'scans' is no table"),
        ("[scans]\nrun = 'ann'", r"run is a list of users"),
        ("[scans]\nrun = [3]", r"run is a list of users"),
        ("[scans]\nrun = ['*']", r"run is a list of users"),
        ("[scans", "not TOML"),
    ):
        path.write_text(text)
        with pytest.raises(OptionError, match=f"access .*access.toml.*{says}") as caught:
            Access.of(path)
        assert "\n" not in str(caught.value)
    with pytest.raises(OptionError, match="No such file"):
        WebsocketServerWorker("clinic", access=tmp_path / "none")
