"""Arrays that keep their batch leased: through DLPack to numpy always, to torch and JAX where they are installed."""

from __future__ import annotations

import gc
import signal
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from ingestd import AllHeld, Closed, Reader, Released, Spec, Timeout
from ingestd.dtypes import NUMPY

from fakes import PATIENCE, FakeDaemon, image, sample

Make = Callable[..., FakeDaemon]
VERSIONED = tuple(int(x) for x in np.__version__.split(".")[:2]) >= (2, 1)


def samples(first: int, n: int = 4) -> list[dict[str, Any]]:
    return [sample(k) for k in range(first, first + n)]


def given(d: FakeDaemon) -> list[int]:
    gc.collect()
    return [number for number, _ in d.channel.given()]


def load(name: str) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip(name, reason=f"{name} is not installed")


@pytest.fixture
def torch() -> Any:
    return load("torch")


@pytest.fixture
def jax() -> Any:
    found = load("jax")
    load("jax.dlpack")
    return found


def test_a_numpy_array_from_dlpack_keeps_the_lease(daemon: Make) -> None:
    d = daemon()
    with Reader(d.address, "t") as r:
        d.deliver(0, samples(0))
        with r.next(deadline=PATIENCE) as batch:
            plain = batch["image"].ctypes.data
            array = np.from_dlpack(batch.dlpack("image"))
        assert batch.released and r.held == 1 and given(d) == []
        with pytest.raises(Released):
            batch.dlpack("image")
        assert array.ctypes.data == plain and array.dtype == np.float32
        if VERSIONED:
            assert not array.flags.writeable
        row = array[2:].T  # a view of a view keeps it too
        del array
        assert given(d) == []
        assert np.array_equal(row.T, np.stack([image(2), image(3)]))
        del row
        assert given(d) == [0] and r.held == 0


def test_the_exporter_itself_keeps_the_lease_and_may_be_used_twice(daemon: Make) -> None:
    d = daemon()
    with Reader(d.address, "t") as r:
        d.deliver(0, samples(0))
        batch = r.next(deadline=PATIENCE)
        leased = batch.dlpack("label")
        batch.release()
        batch.release()
        assert leased.shape == (4,) and leased.leaf.name == "label" and leased.__dlpack_device__() == (1, 0)
        a, b = np.from_dlpack(leased), np.from_dlpack(leased)
        del leased
        assert a.tolist() == b.tolist() == [100, 101, 102, 103]
        del a
        assert given(d) == []
        del b
        assert given(d) == [0]
        with pytest.raises(KeyError, match="no leaf 'x'"):
            d.deliver(1, samples(0))
            with r.next(deadline=PATIENCE) as batch:
                batch.dlpack("x")


def test_a_batch_dropped_after_an_export_is_given_back_with_its_arrays(daemon: Make) -> None:
    d = daemon()
    with Reader(d.address, "t") as r:
        d.deliver(0, samples(0))
        array = np.from_dlpack(r.next(deadline=PATIENCE).dlpack("image"))
        assert given(d) == []
        del array
        assert given(d) == [0]
        d.deliver(1, samples(4))
        batch = r.next(deadline=PATIENCE)
        np.from_dlpack(batch.dlpack("image"))
        kept = batch["label"]
        with pytest.warns(ResourceWarning, match="dropped without a release"):
            del batch  # an array of it that keeps no lease is still in use
            gc.collect()
        assert given(d) == [] and kept[0] == 104


def test_what_is_kept_counts_against_the_prefetch(daemon: Make) -> None:
    d = daemon(prefetch=2)
    with Reader(d.address, "t") as r:
        kept = []
        for number in (0, 1):
            d.deliver(number, samples(4 * number))
            with r.next(deadline=PATIENCE) as batch:
                kept.append(np.from_dlpack(batch.dlpack("image")))
        with pytest.raises(AllHeld, match="holds 2 batches"):
            r.next(deadline=0)
        del kept[0]
        with pytest.raises(Timeout):
            r.next(deadline=0)
        assert given(d) == [0]


def test_arrays_and_checked_batches(daemon: Make) -> None:
    d = daemon()
    with Reader(d.address, "t", check=True) as r:
        d.deliver(0, samples(0))
        batch = r.next(deadline=PATIENCE)
        array, plain = np.from_dlpack(batch.dlpack("label")), batch["label"]
        with pytest.warns(ResourceWarning, match="'label' are still in use"):
            batch.release()
        assert array.tolist() == plain.tolist() == [100, 101, 102, 103]  # still leased
        del array
        assert given(d) == [0]
        assert (plain.view(np.uint8) == 0xCC).all()


def test_arrays_are_let_go_in_other_threads_and_by_the_collector_in_the_middle_of_a_release(daemon: Make) -> None:
    d = daemon(prefetch=2, batches=3)
    with Reader(d.address, "t") as r:
        for number in range(60):
            d.deliver(number, samples(0), place=number % 3)
            with r.next(deadline=PATIENCE) as batch:
                array = np.from_dlpack(batch.dlpack("image"))
            if number % 3 == 0:
                box = [array]
                thread = threading.Thread(target=box.clear)
                del array
                thread.start()
                thread.join()
            elif number % 3 == 1:
                cycle: list[Any] = [array]
                cycle.append(cycle)
                with r._giving:  # a release is going on in this thread when the collector runs
                    del array, cycle
                    gc.collect()
                assert r.held == 1  # left to the one that held the lock, which looks again
                r._settle()
            else:
                del array
            assert r.held == 0 and given(d) == [number]


def test_closing_and_retiring(daemon: Make) -> None:
    d = daemon()
    r = Reader(d.address, "t")
    d.deliver(0, samples(0))
    with r.next(deadline=PATIENCE) as batch:
        array = np.from_dlpack(batch.dlpack("label"))
    r.retire()
    assert not r.closed
    with pytest.raises(Closed, match="retired"):
        r.next()
    assert array.tolist() == [100, 101, 102, 103]
    del array
    gc.collect()
    assert r.closed and d.detached.wait(PATIENCE)
    r.retire()
    r.close()


def test_retiring_an_idle_reader_closes_it(daemon: Make) -> None:
    d = daemon()
    r = Reader(d.address, "t")
    r.retire()
    assert r.closed and d.detached.wait(PATIENCE)


def test_a_library_that_is_missing_is_named(daemon: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    monkeypatch.setitem(sys.modules, "jax", None)
    d = daemon()
    with Reader(d.address, "t") as r:
        d.deliver(0, samples(0))
        with r.next(deadline=PATIENCE) as batch:
            with pytest.raises(ImportError, match="pip install torch"):
                batch.torch("image")
            with pytest.raises(ImportError, match="pip install jax"):
                batch.jax()
        gc.collect()
        assert r.held == 0


ALL = Spec.parse(",".join(f"{name.lower()}:{name}[3]" for name in NUMPY))


@pytest.fixture
def every_dtype(socket_path: str) -> Iterator[Any]:
    """A batch with a leaf of every dtype, and its values."""
    load("ml_dtypes")
    with FakeDaemon(socket_path, ALL) as d, Reader(d.address, "t") as r:
        rng = np.random.default_rng(5)
        values = {
            leaf.name: rng.integers(0, 2, (4, 3)).astype(leaf.numpy_dtype)
            if leaf.dtype == "BOOL"
            else rng.integers(1, 9, (4, 3)).astype(leaf.numpy_dtype)
            for leaf in ALL.leaves
        }
        d.deliver(0, [{k: v[row] for k, v in values.items()} for row in range(4)])
        yield d, r, r.next(deadline=PATIENCE), values


@pytest.mark.parametrize("copy", [False, True])
def test_torch_tensors(torch: Any, every_dtype: Any, copy: bool) -> None:
    d, r, batch, values = every_dtype
    where = {leaf.name: batch[leaf.name].ctypes.data for leaf in ALL.leaves}
    with batch:
        tree = batch.torch(copy=copy)
        one = batch.torch("f32", copy=copy)
    for name, value in values.items():
        tensor = tree[name]
        assert tuple(tensor.shape) == (4, 3)
        assert (tensor.data_ptr() == where[name]) is not copy
        assert np.array_equal(tensor.to(torch.float64).numpy(), value.astype(np.float64)), name
    assert str(tree["bf16"].dtype) == "torch.bfloat16" and str(tree["bool"].dtype) == "torch.bool"
    assert str(tree["f8_e4m3"].dtype) == "torch.float8_e4m3fn"
    del tensor
    if copy:
        tree["f32"] += 1  # of its own
        assert given(d) == [0]
        return
    tree.clear()
    assert given(d) == []
    part = one[1:, :2]
    del one
    assert given(d) == []
    assert part.sum().item() == values["f32"][1:, :2].sum()
    del part
    assert given(d) == [0] and r.held == 0


@pytest.mark.parametrize("copy", [False, True])
def test_jax_arrays(jax: Any, every_dtype: Any, copy: bool) -> None:
    d, r, batch, values = every_dtype
    where = {leaf.name: batch[leaf.name].ctypes.data for leaf in ALL.leaves}
    with batch:
        tree = batch.jax(copy=copy)
    for leaf in ALL.leaves:
        array = tree[leaf.name]
        shared = not copy and leaf.dtype not in ("BF16", "F8_E4M3", "F8_E5M2", "I64", "U64", "F64")
        assert (array.unsafe_buffer_pointer() == where[leaf.name]) is shared, leaf
        assert np.array_equal(np.asarray(array).astype(np.float64), values[leaf.name].astype(np.float64)), leaf
    assert tree["bf16"].dtype == values["bf16"].dtype
    if copy:
        assert given(d) == [0]
        return
    x = tree["f32"]
    del array
    tree.clear()
    assert given(d) == []
    total = jax.numpy.sum(x)
    del x
    assert total.item() == values["f32"].sum()
    assert given(d) == [0] and r.held == 0


def test_jax_may_be_given_an_array_to_reuse(jax: Any, daemon: Make) -> None:
    d = daemon()
    with Reader(d.address, "t") as r:
        d.deliver(0, samples(0))
        with r.next(deadline=PATIENCE) as batch:
            want = batch["image"] + 1
            array = batch.jax("image")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # JAX says that it cannot use the donation
            got = jax.jit(lambda x: x + 1, donate_argnums=0)(array)
        assert np.array_equal(np.asarray(got), want)
        del array
        got.block_until_ready()
        assert given(d) == [0]


WRITES = """
import sys
import faulthandler
import numpy as np
from ingestd import Reader
faulthandler.disable()
with Reader(sys.argv[1], "t") as r:
    tensor = r.next(deadline=60).torch("image")
    print(tensor[0, 0, 1].item(), flush=True)
    tensor += 1
"""


def test_writing_to_a_tensor_ends_the_process(torch: Any, daemon: Make) -> None:
    d = daemon()
    d.deliver(0, samples(0))
    path = ":".join(x for x in sys.path if x)
    done = subprocess.run(
        [sys.executable, "-c", WRITES, d.address], stdout=subprocess.PIPE, text=True, env={"PYTHONPATH": path}
    )
    assert done.returncode == -signal.SIGSEGV and done.stdout == "1.0\n"


def test_dataset_in_this_process(torch: Any, daemon: Make) -> None:
    from ingestd.torch import IngestDataset

    d = daemon(prefetch=2)
    for number in range(2):
        d.deliver(number, samples(4 * number))
    dataset = IngestDataset(d.address, "t", group="g", deadline=PATIENCE)
    assert not d.attached.is_set()  # lazily
    seen, kept = [], []
    for batch in dataset:
        assert d.hello["group"] == "g"
        kept.append(batch)  # more of them than the reader may hold
        seen += batch["label"].tolist()
        number = len(kept) + 1
        if number < 6:
            d.channel.given()
            d.deliver(number, samples(4 * number), place=2 - number % 2)
        elif number == 6:
            d.channel.close()
    assert seen == [100 + k for k in range(24)]
    assert torch.equal(kept[0]["image"][3], torch.from_numpy(image(3)))  # the first is leased, the others are copies
    assert not d.detached.is_set()
    kept.clear()
    del batch
    gc.collect()
    assert d.detached.wait(PATIENCE)


def test_dataset_deadline_and_errors(torch: Any, daemon: Make) -> None:
    from ingestd.torch import IngestDataset

    d = daemon()
    with pytest.raises(Timeout):
        next(iter(IngestDataset(d.address, "t", deadline=0.01)))
    assert d.detached.wait(PATIENCE)


def test_dataset_in_a_worker(torch: Any, daemon: Make) -> None:
    from ingestd.torch import IngestDataset

    d = daemon(prefetch=2)
    for number in range(2):
        d.deliver(number, samples(4 * number))
    d.channel.close()
    loader = torch.utils.data.DataLoader(
        IngestDataset(d.address, "t", deadline=PATIENCE), batch_size=None, num_workers=1
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of forking with threads
        seen = [batch["label"].tolist() for batch in loader]
    assert seen == [[100, 101, 102, 103], [104, 105, 106, 107]]
    assert d.detached.wait(PATIENCE)
