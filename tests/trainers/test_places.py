"""Where ranks run, how they meet, and how one that is missing is named; without processes."""

import socket
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from genkd.errors import UserError
from genkd.trainers import affinity, distributed, runs
from genkd.trainers.affinity import Cores
from genkd.trainers.distributed import Ranks
from genkd.trainers.rendezvous import agree_on_prefix
from genkd.trainers.watchdog import Watchdog


def test_cores_are_shared_out():
    all_of = tuple(range(8))
    left, right = Cores(all_of, (0, 1, 2, 3)), Cores(all_of, (4, 5, 6, 7))
    everyone = [("a", left), ("a", left), ("a", right), ("a", right), ("b", Cores((0, 1), (0, 1)))]
    assert [affinity.share(everyone, rank) for rank in range(5)] == [(0, 1), (2, 3), (4, 5), (6, 7), (0, 1)]
    uneven = [("a", Cores(all_of, all_of))] * 3
    shares = [affinity.share(uneven, rank) for rank in range(3)]
    assert sorted(core for own in shares for core in own) == list(all_of) and min(map(len, shares)) == 2
    many = [("a", Cores((0, 1), (0, 1)))] * 3  # more ranks than cores
    assert all(affinity.share(many, rank) == (0, 1) for rank in range(3))
    given = [("a", Cores((0, 1), (0, 1))), ("a", Cores((2, 3), (2, 3)))]  # a scheduler has done it
    assert [affinity.share(given, rank) for rank in range(2)] == [(0, 1), (2, 3)]


def test_the_kernels_lists_of_cores():
    assert affinity.parse("0-3,8,10-11\n") == [0, 1, 2, 3, 8, 10, 11] and affinity.parse("\n") == []
    assert affinity.of(torch.device("cpu")).near == affinity.of(torch.device("cpu")).allowed
    with pytest.raises(ValueError):
        affinity.parse("a-b")


def met(store, world_size, limit=20.0):
    """The prefixes that ranks in threads get."""
    found = [None] * world_size

    def join(rank):
        try:
            found[rank] = agree_on_prefix(store.clone(), rank, world_size, limit)
        except ValueError as error:
            found[rank] = error

    threads = [threading.Thread(target=join, args=(rank,)) for rank in range(world_size)]
    for thread in reversed(threads):
        thread.start()
        time.sleep(0.03)
    for thread in threads:
        thread.join(30)
    return found


@pytest.fixture
def store():
    return dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)


def test_ranks_that_start_again_meet_under_a_fresh_name(store):
    first, second = met(store, 3), met(store, 3)
    assert len(set(first)) == len(set(second)) == 1 and first[0] != second[0]


def test_the_word_of_a_dead_rank_counts_for_nothing(store):
    met(store, 2)  # leaves names and an answer
    with pytest.raises(ValueError, match=r"not all ranks have come within 1 s"):
        agree_on_prefix(store, 0, 2, 0.6)
    assert len(set(met(store, 2))) == 1


def test_who_has_not_come_is_named(store):
    with pytest.raises(ValueError, match=r"rank 1, 2 has not come within 0 s"):
        agree_on_prefix(store, 0, 3, 0.3)


def watched(store, capsys, progress, world_size=3, limit=1.1):
    """What each rank's watchdog does after `limit` seconds; progress: what each does first, none for one that is not
    there."""
    left = {}
    dogs = [
        Watchdog(store.clone(), rank, world_size, limit, lambda code, rank=rank: left.setdefault(rank, code))
        for rank in range(world_size)
    ]
    for rank, dog in enumerate(dogs):
        if progress[rank]:
            dog.__enter__()
            dog.progress(*progress[rank])
    deadline = time.monotonic() + 15
    while len(left) < sum(map(bool, progress)) and time.monotonic() < deadline:
        time.sleep(0.05)
    for rank, dog in enumerate(dogs):
        if progress[rank]:
            dog.__exit__()
    assert set(left.values()) == {1}
    return capsys.readouterr().err


def test_the_rank_behind_is_named_by_the_lowest_other_one(store, capsys):
    told = watched(
        store, capsys, [("computes (step 5)", 33), ("waits for its data (step 5)", 32), ("computes (step 5)", 33)]
    )
    assert (
        told.count("Error:") == 1
        and "rank 0 has waited 1 s while it computes (step 5): it waits for rank 1 on " in told
    )
    assert "which still waits for its data (step 5) (ranks.timeout_s=1.1); raise ranks.timeout_s" in told


def test_a_silent_rank_is_named(store, capsys):
    told = watched(store, capsys, [None, ("computes (step 5)", 33), ("computes (step 5)", 33)])
    assert told.count("Error:") == 1 and "rank 1 has waited 1 s" in told and "nothing is heard of rank 0" in told


def test_where_all_stand_at_one_place_none_is_blamed(store, capsys):
    told = watched(store, capsys, [("computes (step 5)", 33)] * 3)
    assert told.count("Error:") == 1 and "so have all others: look whether the network between them is down" in told


def test_a_rank_that_is_slow_but_alive_is_waited_for(store, capsys):
    left: list[int] = []
    slow, quick = (Watchdog(store.clone(), rank, 2, 1.0, left.append) for rank in range(2))
    with slow, quick:
        slow.progress("evaluates", 1)
        quick.progress("evaluates", 1)
        quick.waits("waits for the others' scores")
        for _ in range(16):
            time.sleep(0.1)
            slow.alive()
    assert not left and not capsys.readouterr().err


def test_who_has_ended_is_not_missed(store, capsys):
    left: list[int] = []
    ended, other = (Watchdog(store.clone(), rank, 2, 1.0, left.append) for rank in range(2))
    with other:
        with ended:
            ended.progress("saves", 5)
        other.progress("saves", 5)
        deadline = time.monotonic() + 15
        while not left and time.monotonic() < deadline:
            time.sleep(0.1)
    told = capsys.readouterr().err
    assert left == [1] and "rank 1 has waited" in told and "nothing is heard" not in told


def test_who_goes_on_is_left_alone(store, capsys):
    left = []
    with Watchdog(store, 0, 1, 0.8, left.append) as dog:
        for step in range(15):
            dog.progress("computes", step)
            time.sleep(0.1)
            dog.alive()
    assert not left and not capsys.readouterr().err


def test_a_suspended_process_does_not_count_the_time(store, capsys):
    """As under `scontrol suspend`: what was waited is the suspension, and after it all have their time again."""
    left: list[int] = []
    dog = Watchdog(store.clone(), 0, 1, 1.0, left.append)
    wait, waits = dog._end.wait, iter([1.8])

    def overslept(seconds):
        time.sleep(next(waits, 0.0))
        return wait(seconds)

    dog._end.wait = overslept
    with dog:
        dog.progress("computes", 1)
        time.sleep(2.3)  # the limit is long past, but not since it woke
        assert not left
        deadline = time.monotonic() + 15
        while not left and time.monotonic() < deadline:
            time.sleep(0.05)
    assert left and "computes" in capsys.readouterr().err


def test_a_rank_on_another_kind_of_device_is_named(store):
    store.set("genkd/name1", "0123 cpu node7")
    with pytest.raises(UserError, match="rank 1 on node7 would train on cpu, rank 0 on node3 on cuda; see with `genkd"):
        agree_on_prefix(store, 0, 2, 5.0, "cuda node3")


@pytest.mark.parametrize(
    ("said", "told"),
    [
        (
            "[gloo/pair.cc:553] Connection closed by peer [10.0.0.3]:22186. This is\ntypical",
            "has lost another rank ([gloo",
        ),
        ("Timed out waiting 1200000ms for recv operation", "has lost another rank (Timed"),
        ("read: No route to host", "has lost another rank (read"),
        (
            "NCCL error in: ProcessGroupNCCL.cpp:94, unhandled system error, NCCL version 2.27\nncclSystemError: ...\n"
            "Last error:\nError while creating shared memory segment\n/dev/shm/nccl-x (size 33)",
            "got an error from NCCL (NCCL error in: ProcessGroupNCCL.cpp:94, unhandled system error, NCCL version "
            "2.27: "
            "Error while creating shared memory segment /dev/shm/nccl-x (size 33)), by its own fault",
        ),
        ("NCCL communicator was aborted on rank 3.", "has lost another rank (NCCL"),
    ],
)
def test_lost_ranks_and_errors_of_nccl_are_told_apart(said, told):
    assert distributed._what_failed(said).startswith(told)


def place_of(rank, others, monkeypatch, host="node1"):
    """A rank of several, to whom the others tell what is given."""
    place = Ranks(rank, 1 + len(others), torch.device("cpu"))
    monkeypatch.setattr(Ranks, "gather", lambda self, value: [value, *others])
    monkeypatch.setattr(runs.socket, "gethostname", lambda: host)
    return place


def test_ranks_that_would_train_something_else_are_refused(tiny, data, monkeypatch):
    config, phase = tiny("teacher"), SimpleNamespace(teacher=None)
    about = {"genkd": runs.__version__, "torch": torch.__version__, "teacher": "",
             "index of the data set": data.info["index_digest"]}  # fmt: skip
    same = ("node2", tiny("teacher", "log_every=7"), about)
    runs.refuse_differences(place_of(0, [same], monkeypatch), config, data, phase)
    for other, words in (
        (("node2", tiny("teacher", "seed=5"), about), r"rank 2 on node2 differs from rank 0 on node1 \(seed: 0 -> 5\)"),
        (
            ("node2", config, {**about, "index of the data set": "abc"}),
            r"\(index of the data set: sha256:\w{13} -> abc\)",
        ),
        (("node2", config, {**about, "torch": "1.0"}), r"\(torch: .* -> 1\.0\); start all nodes with the same"),
    ):
        with pytest.raises(UserError, match=words):
            runs.refuse_differences(place_of(0, [same, other], monkeypatch), config, data, phase)


def test_memory_that_is_not_enough_is_one_sentence(tiny):
    with pytest.raises(UserError, match=r"rank 0 on .*: the memory of cpu does not hold 4 clips at once \(CUDA out of"):
        with runs.out_of_memory(tiny("teacher"), Ranks(0, 1, torch.device("cpu"))):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nmore")


def test_hosts_have_folders_of_their_own_where_there_are_several(monkeypatch):
    place = Ranks(0, 4, torch.device("cpu"))
    for local, found in (("4", "cache"), ("2", f"cache/{socket.gethostname()}")):
        monkeypatch.setenv("LOCAL_WORLD_SIZE", local)
        assert place.own_folder(Path("cache")) == Path(found)
