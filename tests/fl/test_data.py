"""MNIST and the digits: read right, split as promised, and every kind of broken folder named."""

from __future__ import annotations

import gzip
import shutil
import struct
import subprocess
import sys
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch

from planrt.errors import DataError, OptionError
from planrt.fl.data import boston
from planrt.fl.data import digits as data
from planrt.sandbox import create_sandbox
from tests.processes import MNIST_FILES as NAMES
from tests.processes import idx, write_small_mnist


@pytest.fixture
def small_mnist(tmp_path: Path) -> Path:
    return write_small_mnist(tmp_path / "small")


@pytest.fixture
def nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, no PLANRT_DATA, and a network where every connection is refused; gives the cache."""
    monkeypatch.delenv("PLANRT_DATA", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("LOCALAPPDATA", str(tmp_path / "cache"))
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    return data.cache_folder()


# ------------------------------------------------------------------------------------------ real MNIST


@pytest.fixture(scope="module")
def mnist(mnist_folder: Path) -> data.LoadedData:
    return data.load("mnist", mnist_folder)


def test_mnist_reads_the_same_images_as_torchvision(mnist, mnist_folder):
    from torchvision.datasets import MNIST

    for train, images, labels in (
        (True, mnist.train_images, mnist.train_labels),
        (False, mnist.test_images, mnist.test_labels),
    ):
        reference = MNIST(mnist_folder, train=train)
        assert np.array_equal(images, reference.data.numpy())
        assert np.array_equal(labels, reference.targets.numpy())


@pytest.mark.parametrize(
    ("worker_id", "digits", "count"),
    [
        ("alice", {0, 1, 2, 3}, 24754),
        ("bob", {4, 5, 6}, 17181),
        ("charlie", {7, 8, 9}, 18065),
        ("testing", set(range(10)), 10000),
    ],
)
def test_partitions_of_mnist_are_the_seeds(mnist, worker_id, digits, count):
    part = data.partition_for(worker_id, mnist)
    assert len(part) == count
    assert part.data.dtype == torch.uint8
    assert part.targets.dtype == torch.int64
    assert set(part.targets.tolist()) == digits


def test_batches_equal_torchvisions_transforms_bit_for_bit(mnist, mnist_folder):
    from torchvision import transforms
    from torchvision.datasets import MNIST

    transform = transforms.Compose([transforms.ToTensor(), transforms.Normalize((0.1307,), (0.3081,))])
    reference = MNIST(mnist_folder, train=False, transform=transform)
    indices = torch.tensor([0, 1, 5000, 9999])
    images, targets = data.partition_for("testing", mnist).fetch(indices)
    assert images.dtype == torch.float32
    assert torch.equal(images, torch.stack([reference[int(i)][0] for i in indices]))
    assert targets.tolist() == [reference[int(i)][1] for i in indices]


def test_reading_imports_neither_torch_nor_torchvision_nor_sklearn(mnist_folder):
    script = (
        "import sys; from planrt.fl import data; data.load('mnist', sys.argv[1]);"
        "print([name for name in ('torch', 'torchvision', 'sklearn') if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(mnist_folder)], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"


# --------------------------------------------------------------------------------------- reading files


def test_testing_flag_gives_any_worker_the_test_images(small_mnist):
    loaded = data.load("mnist", small_mnist)
    assert len(data.partition_for("dora", loaded, testing=True)) == 20
    with pytest.raises(
        DataError, match=r"no data is meant for worker 'dora'.*--testing.*package\.module:factory"
    ):
        data.partition_for("dora", loaded)


def test_gzipped_files_read_the_same(small_mnist):
    plain = data.load("mnist", small_mnist)
    for name in NAMES:
        path = small_mnist / "MNIST" / "raw" / name
        path.with_name(f"{name}.gz").write_bytes(gzip.compress(path.read_bytes()))
        path.unlink()
    zipped = data.load("mnist", small_mnist)
    assert np.array_equal(zipped.train_images, plain.train_images)
    assert np.array_equal(zipped.test_labels, plain.test_labels)


@pytest.mark.parametrize("dataset", ["mnist", "auto"])
@pytest.mark.parametrize("name", NAMES)
def test_half_a_dataset_is_an_error_that_names_the_missing_file(small_mnist, dataset, name):
    (small_mnist / "MNIST" / "raw" / name).unlink()
    with pytest.raises(DataError, match=f"only a part of MNIST.*{name}"):
        data.find(dataset, small_mnist)


def damage(content: bytes, how: str) -> bytes:
    return {
        "truncated": content[:-1],
        "too long": content + b"\0",
        "empty": b"",
        "header cut": content[:6],
        "magic": b"\0\0\x0d\x03" + content[4:],
        "count": content[:4] + struct.pack(">I", 2**31) + content[8:],
        "no items": content[:4] + struct.pack(">I", 0) + content[8:],
    }[how]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "how", ["truncated", "too long", "empty", "header cut", "magic", "count", "no items"]
)
def test_a_damaged_file_is_named_before_anything_is_read(small_mnist, name, how):
    path = small_mnist / "MNIST" / "raw" / name
    path.write_bytes(damage(path.read_bytes(), how))
    with pytest.raises(DataError, match=f"{name}.*replace it with a fresh copy"):
        data.find("auto", small_mnist)


@pytest.mark.parametrize("how", ["truncated", "empty", "header cut", "magic", "not gzip", "content cut"])
def test_a_damaged_gzipped_file_is_named(small_mnist, how):
    path = small_mnist / "MNIST" / "raw" / NAMES[0]
    content = path.read_bytes()
    path.unlink()
    if how == "not gzip":
        zipped = content
    elif how == "content cut":
        zipped = gzip.compress(content[:-1])
    elif how in ("truncated", "empty"):
        zipped = damage(gzip.compress(content), how)
    else:
        zipped = gzip.compress(damage(content, how))
    path.with_name(f"{NAMES[0]}.gz").write_bytes(zipped)
    with pytest.raises(DataError, match=rf"{NAMES[0]}\.gz.*replace it with a fresh copy"):
        data.load("mnist", small_mnist)


def test_images_and_labels_must_match(small_mnist):
    raw = small_mnist / "MNIST" / "raw"
    (raw / NAMES[1]).write_bytes(idx(np.zeros(39)))
    with pytest.raises(DataError, match="39 labels for 40 images"):
        data.load("mnist", small_mnist)
    (raw / NAMES[1]).write_bytes(idx(np.full(40, 10)))
    with pytest.raises(DataError, match="labels other than 0-9"):
        data.load("mnist", small_mnist)


def test_images_of_another_size_are_refused(small_mnist):
    (small_mnist / "MNIST" / "raw" / NAMES[0]).write_bytes(idx(np.zeros((40, 32, 32))))
    with pytest.raises(DataError, match=r"shape \[40, 32, 32\]"):
        data.find("mnist", small_mnist)


# --------------------------------------------------------------------------------------------- finding


def test_unknown_names_and_folders_are_refused(tmp_path):
    with pytest.raises(OptionError, match=r"'cifar'.*auto, mnist, digits"):
        data.find("cifar")
    with pytest.raises(DataError, match="does not exist"):
        data.find("auto", tmp_path / "absent")


def test_an_empty_folder_given_by_hand_is_an_error_for_mnist_and_a_notice_for_auto(
    tmp_path, small_mnist, monkeypatch
):
    monkeypatch.setenv("PLANRT_DATA", str(small_mnist))  # is there, but was not asked for
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(DataError, match=r"no MNIST in .*empty.*--data"):
        data.find("mnist", empty)
    found = data.find("auto", empty)
    assert found.name == "digits"
    assert str(empty) in found.notice
    assert "1,797" in found.notice


def test_the_environment_comes_before_the_cache(nowhere, small_mnist, tmp_path, monkeypatch):
    shutil.copytree(small_mnist, nowhere)
    assert data.find("auto").folder == nowhere
    monkeypatch.setenv("PLANRT_DATA", str(small_mnist))
    assert data.find("auto").folder == small_mnist
    monkeypatch.setenv("PLANRT_DATA", "")
    assert data.find("auto").folder == nowhere


@pytest.mark.parametrize("job", [data.find, data.load, boston.find, boston.load, lambda: create_sandbox({})])
def test_a_variable_that_names_no_folder_is_an_error_and_not_passed_over(
    nowhere, small_mnist, monkeypatch, job, capsys
):
    shutil.copytree(small_mnist, nowhere)
    for wrong in (nowhere / "typo", small_mnist / "MNIST" / "raw" / NAMES[0]):
        monkeypatch.setenv("PLANRT_DATA", str(wrong))
        with pytest.raises(DataError, match=f"^PLANRT_DATA names '{wrong}', which is no folder: correct"):
            job()
    assert capsys.readouterr().out == ""
    assert data.find("digits").folder is None  # needs no folder
    assert data.find("auto", small_mnist).folder == small_mnist


def test_half_a_dataset_in_the_environment_is_never_passed_over(nowhere, small_mnist, tmp_path, monkeypatch):
    shutil.copytree(small_mnist, nowhere)
    half = tmp_path / "half"
    shutil.copytree(small_mnist, half)
    (half / "MNIST" / "raw" / NAMES[3]).unlink()
    monkeypatch.setenv("PLANRT_DATA", str(half))
    with pytest.raises(DataError, match=NAMES[3]):
        data.find("auto")


def test_without_data_and_network_the_digits_take_over_with_a_notice(nowhere):
    found = data.find("auto")
    assert found.name == "digits"
    assert "could not be downloaded" in found.notice
    with pytest.raises(DataError, match=r"could not be downloaded.*--data"):
        data.find("mnist")
    assert list(nowhere.iterdir()) == []  # nothing left of the attempts


NO_NETWORK = """Error downloading train-images-idx3-ubyte.gz:
Tried https://first.example/mnist/, got:
<urlopen error [Errno -2] Name or service not known>
Tried http://second.example/mnist/, got:
<urlopen error [Errno -2] Name or service not known>
"""


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (RuntimeError(NO_NETWORK), "[Errno -2] Name or service not known"),
        (RuntimeError("one " * 100), f"{'one ' * 29}..."),
        (OSError(), "OSError"),
    ],
)
def test_why_there_is_no_mnist_is_told_in_one_short_line(nowhere, monkeypatch, capfd, error, told):
    from torchvision import datasets

    def fail(*args, **kwargs):
        print("Downloading https://first.example/mnist/train-images-idx3-ubyte.gz")
        raise error

    monkeypatch.setattr(datasets, "MNIST", fail)
    assert data.find("auto").notice == (
        f"no MNIST in {nowhere}, and it could not be downloaded ({told}): using scikit-learn's 1,797 handwritten "
        "digits instead"
    )
    printed = capfd.readouterr()
    assert printed.out == ""
    assert printed.err == f"Looking for MNIST on the network, to keep in {nowhere}\n"


@pytest.fixture
def serve_folder():
    """Serves a folder over HTTP on this machine; gives its address."""
    servers = []

    def serve(folder: Path) -> str:
        handler = partial(QuietHandler, directory=str(folder))
        servers.append(ThreadingHTTPServer(("127.0.0.1", 0), handler))
        threading.Thread(target=servers[-1].serve_forever, daemon=True).start()
        return f"http://127.0.0.1:{servers[-1].server_port}/"

    yield serve
    for server in servers:
        server.shutdown()
        server.server_close()


class QuietHandler(SimpleHTTPRequestHandler):
    def log_message(self, *args):
        """Keeps requests out of the test's output."""


def test_a_download_arrives_whole_or_not_at_all(nowhere, small_mnist, serve_folder, monkeypatch):
    """A mirror with real files, whose checksums torchvision is told; then one file is corrupt."""
    from torchvision.datasets import MNIST
    from torchvision.datasets.utils import calculate_md5

    mirror = small_mnist.parent / "mirror"
    mirror.mkdir()
    resources = []
    for name in NAMES:
        path = mirror / f"{name}.gz"
        path.write_bytes(gzip.compress((small_mnist / "MNIST" / "raw" / name).read_bytes()))
        resources.append((path.name, calculate_md5(path)))
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(MNIST, "mirrors", [serve_folder(mirror)])
    monkeypatch.setattr(MNIST, "resources", resources)

    last = (mirror / f"{NAMES[3]}.gz").read_bytes()
    (mirror / f"{NAMES[3]}.gz").write_bytes(b"corrupt")
    assert data.find("auto").name == "digits"
    assert list(nowhere.iterdir()) == []

    (mirror / f"{NAMES[3]}.gz").write_bytes(last)
    found = data.find("auto")
    assert (found.name, found.folder) == ("mnist", nowhere)
    assert len(data.read(found).train_labels) == 40
    assert sorted(path.name for path in nowhere.rglob("*") if path.is_file()) == sorted(NAMES)


# ---------------------------------------------------------------------------------------------- digits


@pytest.fixture(scope="module")
def digits() -> data.LoadedData:
    return data.load("digits")


def test_digits_look_like_mnist(digits):
    assert digits.train_images.shape[1:] == (28, 28)
    assert digits.train_images.dtype == np.uint8
    assert digits.train_images.max() > 250
    border = digits.train_images.copy()
    border[:, 4:24, 4:24] = 0
    assert border.max() == 0  # a 20x20 digit in the middle, as in MNIST
    assert len(digits.train_images) + len(digits.test_images) == 1797


def test_digits_split_is_stratified_and_always_the_same(digits):
    train, test = data.digit_counts(digits.train_labels), data.digit_counts(digits.test_labels)
    for digit in range(10):
        assert 5 <= train[digit] / test[digit] <= 5.2 or abs(train[digit] - 5 * test[digit]) <= 5
    again = data.load("digits")
    assert np.array_equal(again.test_images, digits.test_images)
    assert np.array_equal(again.train_labels, digits.train_labels)


def test_digits_keep_their_shape_when_enlarged(digits):
    from sklearn.datasets import load_digits

    original = load_digits().images[0]  # the first zero, so the first test image
    enlarged = digits.test_images[0, 4:24, 4:24].astype(float)
    shrunk = enlarged.repeat(2, 0).repeat(2, 1).reshape(8, 5, 8, 5).mean((1, 3))  # 20 -> 40 -> 8
    assert np.corrcoef(shrunk.ravel(), original.ravel())[0, 1] > 0.97


def test_digits_are_split_over_the_workers_by_label(digits):
    parts = [data.partition_for(worker_id, digits) for worker_id in data.PARTITIONS]
    assert [sorted(set(part.targets.tolist())) for part in parts] == [[0, 1, 2, 3], [4, 5, 6], [7, 8, 9]]
    assert sum(map(len, parts)) == len(digits.train_labels)
    images, _ = parts[0].fetch(torch.tensor([0, 1]))
    assert images.shape == (2, 1, 28, 28)


def test_digit_counts():
    assert data.digit_counts([3, 3, 0]) == {0: 1, 3: 2}
