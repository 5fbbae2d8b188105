import itertools
import threading
import time

import grain
import numpy as np
import pytest

from train.config import ConfigError
from train.data.batches import DevicePrefetcher, UnreadableImageError, eval_batches, train_batches


class Numbered:
    """A source whose label is the index and whose pixels tell the key; some images cannot be read."""

    image_shape = (2, 2, 3)

    def __init__(self, count, unreadable=()):
        self.count, self.unreadable = count, set(unreadable)

    def __len__(self):
        return self.count

    def load(self, index, key, out):
        if index in self.unreadable:
            raise UnreadableImageError(str(index))
        out[...] = sum(key) % 251
        return index


def take(batches, steps):
    return list(itertools.islice(batches, steps))


def training(source, batch_size=5, *, seed=4, first_step=0, threads=1, **hosts):
    return train_batches(source, batch_size, seed=seed, first_step=first_step, threads=threads, **hosts)


def test_an_epoch_shows_each_image_once_and_the_next_in_another_order():
    batches = training(Numbered(23))
    epochs = [np.concatenate([next(batches)["label"] for _ in range(4)]) for _ in range(3)]
    for epoch in epochs:
        assert len(set(epoch.tolist())) == 20
    assert len({tuple(epoch) for epoch in epochs}) == 3
    assert set(np.concatenate(epochs).tolist()) == set(range(23)), "the images left out differ between epochs"


@pytest.mark.parametrize("threads", [0, 1, 3])
def test_batches_are_a_function_of_seed_and_step(threads):
    def labels(seed, first_step, steps):
        batches = training(Numbered(23), seed=seed, first_step=first_step, threads=threads)
        return [batch["label"].tolist() for batch in take(batches, steps)]

    whole = labels(seed=4, first_step=0, steps=12)
    for first_step in (1, 4, 7):
        assert labels(seed=4, first_step=first_step, steps=12 - first_step) == whole[first_step:]
    assert labels(seed=5, first_step=0, steps=12) != whole


def test_the_order_is_that_of_grain_itself():
    """Results of earlier runs stay comparable."""
    order = grain.MapDataset.range(23).seed(4).shuffle().batch(5, drop_remainder=True).repeat()
    assert [batch["label"].tolist() for batch in take(training(Numbered(23)), 12)] == [order[step].tolist() for step in range(12)]


@pytest.mark.parametrize("hosts", [2, 4])
def test_hosts_together_read_the_batch_of_one(hosts):
    """The same images at the same positions with the same randomness; 40 images of a host are several tasks."""
    source = Numbered(401)
    whole = take(training(source, 160, threads=2), 5)
    shares = [take(training(source, 160, threads=2, process_index=h, process_count=hosts), 5) for h in range(hosts)]
    for step in range(5):
        for key in ("image", "label"):
            np.testing.assert_array_equal(np.concatenate([share[step][key] for share in shares]), whole[step][key])


def test_randomness_differs_between_images_steps_and_seeds():
    seen = set()

    class Keys(Numbered):
        def load(self, index, key, out):
            seen.add(key)
            return super().load(index, key, out)

    for seed in (1, 2):
        take(training(Keys(23), seed=seed, threads=0), 8)
    assert len(seen) == 2 * 8 * 5


@pytest.mark.parametrize("threads", [0, 2])
def test_the_next_readable_image_stands_in_for_an_unreadable_one(threads):
    whole = [batch["label"] for batch in take(training(Numbered(23)), 12)]
    found = take(training(Numbered(23, unreadable=(3, 4, 22)), threads=threads), 12)
    for expected, batch in zip(whole, found, strict=True):
        stand_ins = {3: 5, 4: 5, 22: 0}
        assert batch["label"].tolist() == [stand_ins.get(label, label) for label in expected.tolist()]


def test_a_source_without_a_readable_image_is_an_error():
    with pytest.raises(ConfigError, match="no image of the training set can be read"):
        next(training(Numbered(7, unreadable=range(7))))


@pytest.mark.parametrize("threads", [0, 2])
@pytest.mark.parametrize("hosts", [1, 2])
@pytest.mark.parametrize("count", [1, 4, 7, 8, 40])
def test_evaluation_shows_each_image_once(count, hosts, threads):
    batches = [
        list(eval_batches(Numbered(count), 4, threads=threads, process_index=h, process_count=hosts)) for h in range(hosts)
    ]
    assert {len(own) for own in batches} == {-(-count // 4)}, "every host has the same number of batches"
    shares = {tuple(len(x) for x in batch.values()) for own in batches for batch in own}
    assert shares == {(4 // hosts,) * 3}
    counted = [label for own in batches for batch in own for label in batch["label"][batch["weight"] == 1]]
    assert sorted(counted) == list(range(count))


def test_unreadable_images_do_not_count_in_evaluation():
    batches = list(eval_batches(Numbered(7, unreadable=(2, 6)), 4, threads=1))
    counted = [label for batch in batches for label in batch["label"][batch["weight"] == 1]]
    assert counted == [0, 1, 3, 4, 5]


def test_a_batch_that_does_not_divide_over_the_hosts_is_an_error():
    with pytest.raises(ValueError, match="a batch of 5 images does not divide over 2 hosts"):
        training(Numbered(23), 5, process_count=2)


@pytest.mark.parametrize(("batch_size", "threads", "ahead"), [(40, 2, 2), (4, 3, 6)])
def test_threads_read_only_so_far_ahead(batch_size, threads, ahead):
    """Two batches, or two tasks for each thread if batches are small."""
    read = []

    class Counting(Numbered):
        def load(self, index, key, out):
            read.append(key[1])
            return super().load(index, key, out)

    batches = training(Counting(400), batch_size, threads=threads)
    for step in range(3):
        next(batches)
        deadline = time.monotonic() + 10
        while len(read) < (step + ahead) * batch_size and time.monotonic() < deadline:
            time.sleep(0.001)
        time.sleep(0.05)
        assert len(read) == (step + ahead) * batch_size
        assert set(read) == set(range(step + ahead))
    batches.close()


@pytest.mark.parametrize("threads", [0, 2])
def test_an_error_of_a_thread_reaches_the_reader_and_ends_the_batches(threads):
    class Broken(Numbered):
        def load(self, index, key, out):
            if key[1] == 2:
                raise OSError("the disk is gone")
            return super().load(index, key, out)

    batches = training(Broken(400), 40, threads=threads)
    assert len(take(batches, 2)) == 2
    with pytest.raises(OSError, match="the disk is gone"):
        next(batches)
    assert list(batches) == []


def test_batches_are_transferred_ahead_and_in_order():
    made = []

    def put(batch):
        made.append(batch)
        return batch * 10

    with DevicePrefetcher(iter(range(9)), put) as batches:
        assert next(batches) == 0
        deadline = time.monotonic() + 10
        while len(made) < 4 and time.monotonic() < deadline:
            time.sleep(0.001)
        assert made[:4] == [0, 1, 2, 3], "two in the queue and one in the making, beside the one taken"
        assert list(batches) == [10 * i for i in range(1, 9)]


def test_the_prefetcher_measures_the_time_waited():
    def slow():
        for i in range(5):
            time.sleep(0.05)
            yield i

    with DevicePrefetcher(slow(), lambda batch: batch) as batches:
        assert list(batches) == list(range(5))
        assert 0.2 < batches.waited < 2
    with DevicePrefetcher(iter(range(3)), lambda batch: batch) as batches:
        time.sleep(0.2)
        assert list(batches) == [0, 1, 2]
        assert batches.waited < 0.1, "batches made ahead are there at once"


@pytest.mark.parametrize("idle", [False, True])
def test_waiting_counts_only_while_the_device_is_idle(idle):
    wanted, looks = threading.Event(), []

    def slow():
        wanted.wait()
        yield "batch"

    def look():
        if not looks:
            threading.Timer(0.05, wanted.set).start()
        looks.append(idle)
        return idle

    with DevicePrefetcher(slow(), lambda batch: batch) as batches:
        assert batches.take(look) == "batch"
        assert batches.waited >= 0.05 if idle else batches.waited == 0
        assert len(looks) == 1 if idle else len(looks) > 1


def test_an_error_reaches_the_reader_of_transferred_batches():
    def broken():
        yield 1
        raise UnreadableImageError("gone")

    with DevicePrefetcher(broken(), lambda batch: batch) as batches:
        assert next(batches) == 1
        for _ in range(2):
            with pytest.raises(UnreadableImageError, match="gone"):
                next(batches)


def test_after_closing_nothing_is_read():
    read = []

    class Slow(Numbered):
        def load(self, index, key, out):
            time.sleep(0.05)
            read.append(index)
            return super().load(index, key, out)

    batches = training(Slow(4000), 64, threads=3)
    next(batches)
    batches.close()
    count = len(read)
    assert count < 128, "the second batch is not read to its end"
    time.sleep(0.1)
    assert len(read) == count


def test_closing_ends_all_threads():
    before = threading.active_count()
    for _ in range(3):
        with DevicePrefetcher(training(Numbered(400), 64, threads=3), lambda batch: batch) as batches:
            next(batches)
    deadline = time.monotonic() + 10
    while threading.active_count() > before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert threading.active_count() <= before
