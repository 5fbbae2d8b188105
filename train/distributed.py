"""Connects the processes that train one network together, and ends all of them when one fails.

`jax.distributed` connects their devices. Beside it, each host keeps one TCP connection to host 0 while the run lasts. Over it
host 0 learns which hosts are there, sends the others the config, and a failing host gives its reason. JAX's coordination service
has a key-value store and heartbeats of its own, but cannot replace this connection:

- If a host is missing or an index is taken, `jax.distributed.initialize` aborts the process with a C++ stack trace that
  does not name the host. Before all hosts are connected, the key-value store cannot be used.
- If a host is dead or stopped, JAX aborts the others in the same way, after up to 100 s. If host 0 is dead, its service is
  gone and JAX aborts the others at once, sometimes before a pending read of the key-value store returns.

The kernel closes the connection of a process that is killed, so the other hosts notice at once and can still say why they end.
"""

import contextlib
import ipaddress
import json
import os
import queue
import signal
import socket
import sys
import threading
import time
import warnings
from types import FrameType
from typing import Any, NoReturn, Self

from train.config import ConfigError, Hosts
from train.streams import silence

HEARTBEAT_SECONDS = 5.0
"""Interval between two heartbeats of a host."""
SILENCE_SECONDS = 45.0
"""Time without a heartbeat after which a host counts as lost. JAX aborts the process after 50 to 100 s."""
REASON_SECONDS = 3.0
"""Time to wait for another host's reason after an operation between hosts has failed."""
DOUBLE_SIGNAL_SECONDS = 0.5
"""A second signal within this time counts as the first one."""


class HostLink:
    """This process's connections to the other hosts: host 0 has one to each, any other host one to host 0."""

    def __init__(self, hosts: Hosts, flags: list[str]) -> None:
        """Connect to the other hosts, and connect the devices of all hosts. With one host, do nothing.

        Must run before JAX computes anything. `flags`, the command line without the index, must be the same on all hosts.
        """
        self.count, self.index = hosts.count or 1, hosts.index or 0
        self._peers: dict[int, _Peer] = {}
        self._ending = threading.Lock()
        self._shared: queue.SimpleQueue[Any] = queue.SimpleQueue()
        if hosts.address is None or self.count == 1:
            return
        name, _, port = hosts.address.rpartition(":")
        if self.index == 0:
            self._accept_hosts(int(port), hosts.timeout, flags)
        else:
            self._join_host_0(name.strip("[]"), int(port), hosts.timeout, flags)
        for index in self._peers:
            threading.Thread(target=self._watch, args=(index,), daemon=True).start()
        threading.Thread(target=self._send_heartbeats, daemon=True).start()
        import jax

        # No cluster detection: it would assign one GPU to this process, which drives all GPUs of the host.
        jax.distributed.initialize(hosts.address, self.count, self.index, cluster_detection_method="deactivate")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: Any, *_: object) -> None:
        """Wait for all hosts and disconnect. After an error do nothing: `fail` ends the process."""
        if kind is None and self._peers:
            import jax

            self._tell({"bye": True})
            jax.distributed.shutdown()  # waits for all
            self._close()

    def share(self, value: Any = None) -> Any:
        """Return the `value` (JSON) of host 0 on all hosts."""
        if self.index == 0:
            self._tell({"shared": value})
            return value
        return self._shared.get()

    def check_name(self) -> None:
        """Check that CPUs of other hosts can reach this host. They use the address to which it resolves its own name.

        On some systems /etc/hosts maps that name to 127.0.0.1. GPUs and TPUs do not use the address.
        """
        import jax

        if not self._peers or jax.default_backend() != "cpu":
            return
        name, seen = socket.gethostname(), next(iter(self._peers.values())).own_address()
        try:
            meant = {ipaddress.ip_address(found[4][0]) for found in socket.getaddrinfo(name, None)}
        except OSError:
            meant = set()
        if not seen.is_loopback and all(address.is_loopback for address in meant):
            raise ConfigError(
                f"host {self.index} resolves its own name {name} to {', '.join(map(str, meant)) or 'nothing'}, where other hosts "
                f"cannot reach its CPUs: map {name} to {seen} in /etc/hosts"
            )

    def fail(self, reason: str, code: int) -> None:
        """Tell the other hosts why this one ends, and end the process. With one host, return."""
        if self._peers:
            self._end({"failed": f"host {self.index} of {self.count} failed: {reason}", "code": code})

    def wait_for_reason(self) -> None:
        """Wait, after a failed operation between hosts, for the reason of the host that caused it, and end with it."""
        if self._peers:
            time.sleep(REASON_SECONDS)

    def _accept_hosts(self, port: int, timeout: float, flags: list[str]) -> None:
        """On host 0: wait for all other hosts and check their count, index and flags."""
        try:
            _listen(port).close()  # jax.distributed will listen here
            server = _listen(port + 1)
        except OSError as error:
            reason = os.strerror(error.errno or 0)
            raise ConfigError(
                f"host 0 cannot listen at ports {port} and {port + 1}: {reason}; choose another port in --hosts.address"
            ) from error
        missing, problem, deadline = set(range(1, self.count)), "", time.monotonic() + timeout
        with server:
            while missing and not problem:
                server.settimeout(max(0.01, deadline - time.monotonic()))
                try:
                    peer = _Peer(server.accept()[0])
                except TimeoutError:
                    names = f"host{'s' * (len(missing) > 1)} {', '.join(map(str, sorted(missing)))}"
                    problem = f"{names} of {self.count} did not connect to port {port + 1} within {timeout:g} s"
                    break
                hello = peer.receive(timeout=10)
                if not {"index", "count", "flags"} <= hello.keys():
                    peer.close()  # another program
                    continue
                index = hello["index"]
                if hello["count"] != self.count:
                    problem = f"host {index} expects {hello['count']} hosts, host 0 expects {self.count}"
                elif index not in missing:
                    problem = f"two processes have the index {index}"
                elif hello["flags"] != flags:
                    theirs = " ".join(flag for flag in hello["flags"] if flag not in flags) or "nothing"
                    ours = " ".join(flag for flag in flags if flag not in hello["flags"]) or "nothing"
                    problem = f"host {index} was started with other flags than host 0: {theirs} there, {ours} here"
                self._peers[-1 if problem else index] = peer
                missing.discard(index)
        self._tell({"problem": problem})
        if problem:
            self._close()
            raise ConfigError(f"{problem}; nothing was started")

    def _join_host_0(self, name: str, port: int, timeout: float, flags: list[str]) -> None:
        """On any other host: connect to host 0, and wait until all hosts are connected."""
        deadline = time.monotonic() + timeout
        while not self._peers:
            try:
                self._peers[0] = _Peer(socket.create_connection((name, port + 1), timeout=2))
            except OSError as error:
                if time.monotonic() > deadline:
                    raise ConfigError(
                        f"host {self.index} of {self.count} could not reach host 0 at {name}, port {port + 1}, within "
                        f"{timeout:g} s ({error.strerror or error}): is it running, and is the port open?"
                    ) from error
                time.sleep(0.1)
        self._tell({"index": self.index, "count": self.count, "flags": flags})
        problem = self._peers[0].receive(timeout=timeout + 10).get("problem", "host 0 ended before all hosts were connected")
        if problem:
            self._close()
            raise ConfigError(f"{problem}; nothing was started")

    def _watch(self, index: int) -> None:
        """Thread that reads the messages of host `index`, and ends this process if that host fails, dies or is silent."""
        peer = self._peers[index]
        while True:
            message = peer.receive(SILENCE_SECONDS)
            if "shared" in message:
                self._shared.put(message["shared"])
            if "bye" in message or not self._peers:
                return
            if "gone" in message:
                reason = f"host {index} of {self.count} {message['gone']}; the checkpoints are kept"
                message = {"failed": reason, "code": 1}
            if "failed" in message:
                self._end(message, say=True)

    def _send_heartbeats(self) -> None:
        """Thread that sends heartbeats to the other hosts."""
        while self._peers:
            self._tell({"alive": True})
            time.sleep(HEARTBEAT_SECONDS)

    def _end(self, message: dict[str, Any], say: bool = False) -> NoReturn:
        """End this process and the others, all with the same reason."""
        with self._ending:
            if say:
                print(f"error: {message['failed']}", file=sys.stderr)
            self._tell(message)
            sys.stdout.flush()
            sys.stderr.flush()
            _exit(message["code"])

    def _tell(self, message: dict[str, Any]) -> None:
        for peer in list(self._peers.values()):
            peer.send(message)

    def _close(self) -> None:
        peers, self._peers = self._peers, {}
        for peer in peers.values():
            peer.close()


class _Peer:
    """Connection to another host. Each message is a JSON object on a line of its own."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection, self._lines = connection, connection.makefile("rb")
        self._sending = threading.Lock()

    def send(self, message: dict[str, Any]) -> None:
        with self._sending, contextlib.suppress(OSError):  # `receive` notices that the other side is gone
            self._connection.sendall(json.dumps(message).encode() + b"\n")

    def receive(self, timeout: float) -> dict[str, Any]:
        """Return the next message, or `{"gone": reason}` if the connection is closed or silent for `timeout` seconds."""
        self._connection.settimeout(timeout)
        try:
            message = json.loads(self._lines.readline())
        except TimeoutError:
            return {"gone": f"has sent no heartbeat for {timeout:g} s (stopped, cut off)"}
        except (OSError, ValueError):
            message = None
        if isinstance(message, dict):
            return message
        return {"gone": "disconnected without a reason (killed, out of memory, cut off)"}

    def own_address(self) -> ipaddress.IPv4Address | ipaddress.IPv6Address:
        """Return the address by which the other side knows this host."""
        address = ipaddress.ip_address(self._connection.getsockname()[0].partition("%")[0])
        return getattr(address, "ipv4_mapped", None) or address

    def close(self) -> None:
        with contextlib.suppress(OSError):  # the other side may have done so
            self._connection.shutdown(socket.SHUT_RDWR)
        self._connection.close()


class Signals:
    """Records Ctrl-C, SIGTERM and the like, so that all hosts stop after the same step. A later Ctrl-C interrupts at once.

    SLURM sends SIGUSR1 or SIGUSR2 before the end of a job (`--signal`), a lost ssh connection SIGHUP, which `nohup` ignores.

    A signal within `DOUBLE_SIGNAL_SECONDS` of the first counts as the same one: `timeout`, for example, signals a process and
    then its group.
    """

    def __init__(self) -> None:
        self.received, self._when = 0, 0.0

    def __enter__(self) -> Self:
        import jax

        self._hosts = jax.process_count()
        # With several hosts, JAX itself handles SIGTERM and makes all hosts agree on a step.
        names = ["SIGINT", "SIGUSR1", "SIGUSR2", "SIGHUP"] + ["SIGTERM"] * (self._hosts == 1)
        known = [getattr(signal, name) for name in names if hasattr(signal, name)]
        mine = [signum for signum in known if signum == signal.SIGINT or signal.getsignal(signum) != signal.SIG_IGN]
        self._before = {signum: signal.signal(signum, self._note) for signum in mine}
        return self

    def __exit__(self, *_: object) -> None:
        for signum, handler in self._before.items():
            signal.signal(signum, handler)

    def stop_after(self, step: int) -> bool:
        """Return whether `step` is the last one, the same on all hosts. Must be called after each step."""
        if self._hosts == 1:
            return bool(self.received)
        from jax.experimental import multihost_utils

        stop = multihost_utils.reached_preemption_sync_point(step)
        if stop and not self.received:
            self.received = signal.SIGTERM
        return stop

    def stopping(self) -> bool:
        """Return whether a signal has come, with one host. Several hosts stop only after the same step."""
        return self._hosts == 1 and bool(self.received)

    def _note(self, signum: int, _frame: FrameType | None) -> None:
        if signum == getattr(signal, "SIGHUP", None):  # the terminal is gone
            silence(*(name for name in ("stdout", "stderr") if getattr(sys, name).isatty()))
        if not self.received:
            self.received, self._when = signum, time.monotonic()
            if self._hosts > 1:
                os.kill(os.getpid(), signal.SIGTERM)
        elif signum == signal.SIGINT and time.monotonic() - self._when > DOUBLE_SIGNAL_SECONDS:
            raise KeyboardInterrupt


def find_hosts(hosts: Hosts) -> Hosts:
    """Return `hosts` or, if they have no count, those that the cluster reports (SLURM, Open MPI, Kubernetes, Cloud TPU).

    Uses the cluster detection of `jax.distributed.initialize`, which has no public name.
    """
    if hosts.count is not None:
        return hosts
    from jax._src.clusters import ClusterEnv

    with warnings.catch_warnings():
        if "JOB_COMPLETION_INDEX" not in os.environ:  # a single pod needs no package to find other pods
            warnings.filterwarnings("ignore", message=r"\s*Kubernetes environment detected")
        found = ClusterEnv.auto_detect_unset_distributed_params(None, None, None, None, None, int(hosts.timeout))
    address, count, index, _ = found
    if address is None or count is None or index is None or count == 1:
        return hosts
    return Hosts(count=count, index=index, address=address, timeout=hosts.timeout)


def _listen(port: int) -> socket.socket:
    if socket.has_dualstack_ipv6():
        return socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True)
    return socket.create_server(("", port))


_exit = os._exit
"""Ends the process at once. Python's own exit would wait for lost hosts."""
