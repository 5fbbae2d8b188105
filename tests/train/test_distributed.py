"""Several hosts. Here they are processes of this machine with four simulated devices each; they talk over 127.0.0.1."""

import contextlib
import inspect
import ipaddress
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from PIL import Image

from tests.train.tiny import final_arrays
from train import distributed as hosts_module
from train.config import ConfigError, DivergedError, Hosts
from train.distributed import HostLink, find_hosts
from train.parallel import make_parallel
from train.run.metrics import read_metrics

ROOT = Path(__file__).parents[2]
SET_SILENCE = "import runpy; from train import distributed; distributed.SILENCE_SECONDS = "
CONFIG = """
from train.config import Config, Data, Log, Model, Optim

config = Config(
    epochs=4,
    log_every=2,
    model=Model(dtype="float64", sync_batchnorm=True),
    data=Data(name="synthetic", image_size=8, batch_size=16, crop_padding=1, synthetic_train=80, synthetic_test=27),
    optim=Optim(lr=0.1),
    log=Log(report=False),
)
"""


def free_port():
    """Return the first of two successive free ports."""
    while True:
        with contextlib.suppress(OSError), socket.create_server(("", 0)) as first:
            port = first.getsockname()[1]
            socket.create_server(("", port + 1)).close()
            return port


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Folder with `small.py`, a config of 4 epochs of 5 steps of a tiny network in float64."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("JAX_ENABLE_X64", "1")
    Path("small.py").write_text(CONFIG)
    return tmp_path


def start(*flags, devices, silence=None):
    """Start a host. If `silence` is given, it gives up hosts after that many seconds without a heartbeat."""
    flags_of_xla = re.sub(r"(device_count)=\d+", rf"\1={devices}", os.environ["XLA_FLAGS"])
    environment = os.environ | {"PYTHONPATH": str(ROOT), "XLA_FLAGS": flags_of_xla}
    program = ["-m", "tests.train.tiny"]
    if silence:
        program = ["-c", f"{SET_SILENCE}{silence}; runpy.run_module('tests.train.tiny', run_name='__main__')"]
    command = [sys.executable, *program, "--config", "small.py", *flags]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def start_hosts(*flags, silence=None):
    """Start two processes that train together."""
    address = f"127.0.0.1:{free_port()}"
    numbers = [["--hosts.count", "2", "--hosts.index", str(index), "--hosts.address", address] for index in range(2)]
    return [start(*number, *flags, devices=4, silence=silence) for number in numbers]


def finish(process):
    try:
        out, err = process.communicate(timeout=300)
    finally:
        process.kill()
    return process.returncode, out, err


def errors(err):
    """Return the lines of the program itself, without those of JAX's C++ parts."""
    return [line for line in err.splitlines() if line.startswith(("error: ", "warning: ", "Traceback"))]


def assert_equal(actual, expected):
    """Check that every array is in float64 and equal to 1e-9 of its largest value."""
    assert actual.keys() == expected.keys()
    for name, array in expected.items():
        assert array.dtype.kind != "f" or array.dtype == np.float64
        np.testing.assert_allclose(actual[name], array, rtol=0, atol=1e-9 * max(1e-3, np.abs(array).max()), err_msg=name)


@pytest.mark.slow
@pytest.mark.usefixtures("folder")
def test_two_hosts_of_four_devices_equal_one_device():
    """Both engines give the result of one device. A signal to one host stops both, and one device can go on with the run."""
    alone = start("--workdir", "alone", devices=1)
    for workdir, flags in (("hosts", []), ("hosts-pmap", ["--parallel", "pmap", "--patience", "4"])):  # patience waits for host 0
        for code, _, err in map(finish, start_hosts("--workdir", workdir, *flags)):
            assert (code, errors(err)) == (0, []), err
    assert finish(alone)[0] == 0
    expected = final_arrays("alone")
    assert expected["step"] == 20
    assert_equal(final_arrays("hosts"), expected)
    assert_equal(final_arrays("hosts-pmap"), expected)

    lines, theirs = read_metrics(Path("hosts/metrics.jsonl")), read_metrics(Path("alone/metrics.jsonl"))
    assert [line["step"] for line in lines] == [line["step"] for line in theirs]
    for ours, others in zip(lines, theirs, strict=True):
        for key in ours.keys() & {"train/loss", "eval/loss", "train/top1", "eval/top1", "lr"}:
            assert ours[key] == pytest.approx(others[key], rel=1e-6), "losses and accuracies are summed in float32"

    both = start_hosts("--workdir", "stopped", "--epochs", "400")
    wait_for_step("stopped", 30, both)
    both[1].send_signal(signal.SIGTERM)
    results = [finish(process) for process in both]
    assert [code for code, _, _ in results] == [143, 143]
    assert "Stopped and saved at step " in results[0][1]
    assert "Stopped" not in results[1][1]
    saved = int(final_arrays("stopped")["step"])
    epochs = saved // 5 + 2
    for code, out, err in map(finish, start_hosts("--resume", "stopped", "--epochs", str(epochs - 1))):
        assert (code, errors(err)) == (0, []), err
        assert "The run began on" not in out
    saved = int(final_arrays("stopped")["step"])
    for code, _, err in map(finish, start_hosts("--evaluate", "--workdir", "stopped")):
        assert (code, errors(err)) == (0, []), err
    code, out, err = finish(start("--resume", "stopped", "--epochs", str(epochs), devices=1))
    assert code == 0, err
    assert f"resuming from step {saved} of {5 * epochs}" in out
    assert "The run began on 8 devices and resumes on 1: results agree to rounding, not bit for bit." in out


def wait_for_step(workdir, step, processes):
    metrics = Path(workdir) / "metrics.jsonl"
    while not metrics.exists() or not (lines := read_metrics(metrics)) or lines[-1]["step"] < step:
        for process in processes:
            assert process.poll() is None, finish(process)
        time.sleep(0.01)


@pytest.mark.slow
@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_host_ends_the_other_at_once(victim):
    both = start_hosts("--workdir", "run", "--epochs", "4000")
    wait_for_step("run", 6, both)
    both[victim].kill()
    killed = time.monotonic()
    code, _, err = finish(both[1 - victim])
    assert time.monotonic() - killed < 20
    assert code in (1, -signal.SIGABRT), "JAX may be first to notice that host 0 is gone, and abort"
    reason = f"error: host {victim} of 2 disconnected without a reason (killed, out of memory, cut off); the checkpoints are kept"
    assert reason in errors(err)
    finish(both[victim])


@pytest.mark.slow
@pytest.mark.usefixtures("folder")
def test_a_stopped_host_ends_the_other():
    """Host 0 is the harder case: JAX's coordination service stands still with it."""
    both = start_hosts("--workdir", "run", "--epochs", "4000", silence=15)
    wait_for_step("run", 6, both)
    both[0].send_signal(signal.SIGSTOP)
    stopped = time.monotonic()
    try:
        code, _, err = finish(both[1])
        assert time.monotonic() - stopped < 40
        reason = "error: host 0 of 2 has sent no heartbeat for 15 s (stopped, cut off); the checkpoints are kept"
        assert (code, errors(err)) == (1, [reason])
    finally:
        both[0].kill()
        finish(both[0])


def test_a_silent_host_is_given_up_before_jax_aborts():
    """JAX sends a heartbeat after each half of its time-out, so it may abort that long after a host has stopped."""
    timeout = inspect.signature(jax.distributed.initialize).parameters["heartbeat_timeout_seconds"].default
    assert 5 * hosts_module.HEARTBEAT_SECONDS < hosts_module.SILENCE_SECONDS < timeout / 2
    assert hosts_module.SILENCE_SECONDS + hosts_module.HEARTBEAT_SECONDS < 60


@pytest.mark.slow
@pytest.mark.usefixtures("folder")
def test_a_failing_host_tells_the_other_why():
    both = start_hosts("--workdir", "run", "--optim.lr", "1e200")
    (code, _, err), (other_code, _, other_err) = map(finish, both)
    assert (code, other_code) == (1, 1)
    reason = "the training loss is nan at step 2; the checkpoints before it are kept. A lower --optim.lr may help"
    assert reason in err
    assert reason in other_err
    assert "Traceback" not in err + other_err


@pytest.mark.slow
@pytest.mark.usefixtures("folder")
def test_hosts_with_other_images_are_refused(monkeypatch):
    """Each host finds another folder at the same path, as if every machine had its own disk."""
    rng = np.random.default_rng(0)
    for host, tests in ((0, 4), (1, 5)):
        for split, count in (("train", 16), ("val", tests)):
            for index in range(count):
                folder = Path(f"{host}/data/{split}/{'ab'[index % 2]}")
                folder.mkdir(parents=True, exist_ok=True)
                Image.fromarray(rng.integers(0, 255, (9, 9, 3), np.uint8)).save(folder / f"{index}.png")
        Path(f"{host}/small.py").write_text(CONFIG)
    address, both = f"127.0.0.1:{free_port()}", []
    for host in range(2):
        monkeypatch.chdir(str(host) if host == 0 else f"../{host}")
        numbers = ["--hosts.count", "2", "--hosts.index", str(host), "--hosts.address", address]
        both.append(start("/proc/self/cwd/data", "--workdir", "run", *numbers, devices=2))
    reason = "host 1 found 16 training and 5 test images of 2 classes, host 0 16 training and 4 test images of 2 classes"
    for code, _, err in map(finish, both):
        assert code == 2
        assert reason in errors(err)[0]
        assert "Traceback" not in err
    assert not Path("../0/run").exists()


@pytest.fixture
def team(monkeypatch, capsys):
    """`team((hosts of 0, flags), (hosts of 1, flags), ...)` makes a `HostLink` in a thread for each.

    It returns the links; for a link that raised, its message. `team.ended` holds the exit codes of those that ended.
    """
    monkeypatch.setattr(jax.distributed, "initialize", lambda *_, **__: None)
    ended, links = [], []

    def end(code):
        ended.append(code)
        threading.Event().wait()  # this thread does no more

    monkeypatch.setattr(hosts_module, "_exit", end)

    def meet(*members):
        results = [None] * len(members)

        def join(place, hosts, flags):
            try:
                results[place] = HostLink(hosts, flags)
                links.append(results[place])
            except ConfigError as error:
                results[place] = str(error)

        threads = [threading.Thread(target=join, args=(place, *member)) for place, member in enumerate(members)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
            assert not thread.is_alive()
        return results

    meet.ended = ended
    meet.said = lambda: capsys.readouterr().err
    yield meet
    # All must have left before the first connection closes: a host ends its process if another disconnects without a reason.
    peers = [peer for link in links for peer in link._peers.values()]
    for link in links:
        link._peers = {}
    for peer in peers:
        peer.close()


def of(index, port, count=2, timeout=20.0):
    return Hosts(count=count, index=index, address=f"127.0.0.1:{port}", timeout=timeout)


def eventually(condition):
    for _ in range(2000):
        if condition():
            return
        time.sleep(0.01)
    raise AssertionError("it did not happen within 20 s")


def test_hosts_meet_and_share_the_value_of_host_0(team):
    """Another program that comes to the port is ignored."""
    port, met = free_port(), threading.Event()

    def come_first():
        while not met.wait(0.001):
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port + 1)) as connection:
                connection.sendall(b"GET / HTTP/1.1\r\n\r\n")
                assert connection.recv(1) == b""
                return

    other = threading.Thread(target=come_first)
    other.start()
    links = team(*[(of(index, port, count=3), ["--seed", "1"]) for index in range(3)])
    met.set()
    other.join()
    assert [link.index for link in links] == [0, 1, 2]
    assert links[0].share({"epochs": 3}) == {"epochs": 3}
    assert [link.share() for link in links[1:]] == [{"epochs": 3}] * 2


def test_the_reason_of_one_host_ends_all(team):
    port = free_port()
    links = team(*[(of(index, port, count=3), []) for index in range(3)])
    threading.Thread(target=links[1].fail, args=("the disk is full", 7), daemon=True).start()
    eventually(lambda: len(team.ended) == 3)
    assert team.ended == [7, 7, 7]
    assert team.said() == "error: host 1 of 3 failed: the disk is full\n" * 2


def test_a_silent_host_ends_all(team, monkeypatch):
    monkeypatch.setattr(hosts_module, "HEARTBEAT_SECONDS", 0.1)
    monkeypatch.setattr(hosts_module, "SILENCE_SECONDS", 2.0)
    port = free_port()
    links = team(*[(of(index, port, count=3), []) for index in range(3)])
    time.sleep(3)
    assert team.ended == [], "heartbeats keep all connected"
    monkeypatch.setattr(links[1], "_tell", lambda _: None)
    eventually(lambda: len(team.ended) == 3)
    assert team.ended == [1, 1, 1]
    reason = "host 1 of 3 has sent no heartbeat for 2 s (stopped, cut off); the checkpoints are kept"
    assert team.said() == f"error: {reason}\n" * 3


def test_a_host_that_never_comes_is_named(team):
    port = free_port()
    zero, one = team((of(0, port, count=4, timeout=1), []), (of(1, port, count=4, timeout=1), []))
    assert zero == f"hosts 2, 3 of 4 did not connect to port {port + 1} within 1 s; nothing was started"
    assert one == zero
    (alone,) = team((of(1, port, timeout=0.5), []))
    assert alone.startswith(f"host 1 of 2 could not reach host 0 at 127.0.0.1, port {port + 1}, within 0.5 s (")


def test_hosts_that_do_not_fit_are_refused(team):
    for other, flags, message in (
        (of(1, port := free_port(), count=3), [], "host 1 expects 3 hosts, host 0 expects 2; nothing was started"),
        (
            of(1, port, count=2),
            ["--seed", "3"],
            "host 1 was started with other flags than host 0: 3 there, nothing here; nothing was started",
        ),
    ):
        assert team((of(0, port), ["--seed"][: len(flags)]), (other, flags)) == [message, message]
    twice = team((of(0, port, count=3), []), (of(1, port, count=3), []), (of(1, port, count=3), []))
    assert "two processes have the index 1; nothing was started" in twice


def test_a_port_in_use_is_named(team):
    with socket.create_server(("", 0)) as taken:
        port = taken.getsockname()[1]
        (message,) = team((of(0, port), []))
    assert message.startswith(f"host 0 cannot listen at ports {port} and {port + 1}: Address already in use; choose another port")


def test_a_host_name_that_means_localhost_is_refused(team, monkeypatch):
    def name_means(*addresses):
        found = [(socket.AF_INET, socket.SOCK_STREAM, 0, "", (address, 0)) for address in addresses]
        monkeypatch.setattr(socket, "getaddrinfo", lambda *_: found)

    port = free_port()
    links = team((of(0, port), []), (of(1, port), []))
    monkeypatch.setattr(socket, "gethostname", lambda: "node7")
    name_means("127.0.1.1")
    for link in links:
        link.check_name()  # both hosts are this machine
    monkeypatch.setattr(hosts_module._Peer, "own_address", lambda _: ipaddress.ip_address("10.9.0.2"))
    name_means("10.9.0.2")
    links[1].check_name()
    name_means("127.0.1.1")
    with pytest.raises(ConfigError) as caught:
        links[1].check_name()
    assert str(caught.value) == (
        "host 1 resolves its own name node7 to 127.0.1.1, where other hosts cannot reach its CPUs: "
        "map node7 to 10.9.0.2 in /etc/hosts"
    )
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    links[1].check_name()


def test_one_process_needs_no_other(monkeypatch):
    for name in [name for name in os.environ if name.startswith(("SLURM_", "OMPI_"))]:
        monkeypatch.delenv(name)
    assert find_hosts(Hosts()) == Hosts()
    with HostLink(Hosts(), ["--seed"]) as link:
        assert (link.index, link.count, link.share(3)) == (0, 1, 3)
        link.wait_for_reason()
        link.fail("no matter", 1)  # returns: the caller ends by itself


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        (
            {
                "SLURM_JOB_ID": "5",
                "SLURM_STEP_NODELIST": "node[7-8]",
                "SLURM_NTASKS": "2",
                "SLURM_PROCID": "1",
                "SLURM_LOCALID": "0",
                "SLURM_STEP_NUM_NODES": "2",
            },
            Hosts(count=2, index=1, address="node7:61445"),
        ),
        (
            {
                "SLURM_JOB_ID": "5",
                "SLURM_STEP_NODELIST": "node7",
                "SLURM_NTASKS": "1",
                "SLURM_PROCID": "0",
                "SLURM_LOCALID": "0",
                "SLURM_STEP_NUM_NODES": "1",
            },
            Hosts(),
        ),
        (
            {
                "OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://10.96.0.1,10.148.0.1:34911",
                "OMPI_COMM_WORLD_SIZE": "2",
                "OMPI_COMM_WORLD_RANK": "1",
                "OMPI_COMM_WORLD_LOCAL_RANK": "0",
            },
            Hosts(count=2, index=1, address="10.96.0.1:62624"),
        ),
    ],
    ids=["two tasks", "one task", "Open MPI"],
)
def test_a_cluster_is_found(monkeypatch, variables, expected):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert find_hosts(Hosts()) == expected
    given = Hosts(count=3, index=2, address="here:1")
    assert find_hosts(given) == given, "values that are given take precedence"


@pytest.mark.parametrize("engine", ["shard_map", "pmap"])
def test_devices_that_differ_are_found(engine):
    """Two arrays are on eight devices. One of them differs on the last device, in the sign of a zero."""
    parallel = make_parallel(engine, jax.devices())
    state = {"a": np.arange(6, dtype=np.int32), "b": np.zeros((2, 3), np.float32)}
    same = parallel.put_state(state)
    parallel.check_same(same, 3)
    sharding = NamedSharding(jax.sharding.Mesh(np.asarray(jax.devices()), ("data",)), PartitionSpec())
    shards = [jax.device_put(state["b"], device) for device in jax.devices()]
    shards[7] = jax.device_put(np.where(np.arange(6).reshape(2, 3) == 4, np.float32(-0.0), np.float32(0)), jax.devices()[7])
    broken = same | {"b": jax.make_array_from_single_device_arrays((2, 3), sharding, shards)}
    with pytest.raises(DivergedError, match=r"^after step 3, devices of host 0 hold other values of b than the first device"):
        parallel.check_same(broken, 3)
