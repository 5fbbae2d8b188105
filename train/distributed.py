"""The processes that train one network together: how they find each other, and how all end when one does.

`jax.distributed` connects their devices. Beside it each keeps one TCP connection to host 0 for as long as the run lasts:
over it host 0 learns who has come, the others learn what to run, and a host that fails says why. The kernel closes the
connection of a process that is killed, so that the others know it at once, where an operation between devices would wait.
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

KEEPALIVE = {"TCP_KEEPIDLE": 10, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 4}
"""A host whose power or network is gone is given up after 30 s without an answer; the system's own rule is two hours."""
TWICE = 0.5
"""Seconds within which a second signal is taken for the first."""
REASON_WAIT = 3.0
"""Seconds in which another host may say why, after an operation between hosts failed here."""


class Link:
    """This process's connections to the others; where it is the only one, there are none and nothing happens."""

    def __init__(self, hosts: Hosts, flags: Any) -> None:
        """Meet the others, and connect the devices of all. To be called before JAX computes anything.

        Args:
            hosts: who they are; see `find`.
            flags: what this process was told to do, as JSON: must be the same on all.

        Raises:
            ConfigError: some did not come in time, or do not fit together.
        """
        self.count, self.index = hosts.count or 1, hosts.index or 0
        self._peers: dict[int, _Peer] = {}
        self._ending = threading.Lock()
        self._shared: queue.SimpleQueue[Any] = queue.SimpleQueue()
        if hosts.address is None or self.count == 1:
            return
        name, _, port = hosts.address.rpartition(":")
        if self.index == 0:
            self._gather(int(port), hosts.timeout, flags)
        else:
            self._report(name.strip("[]"), int(port), hosts.timeout, flags)
        for index in self._peers:
            threading.Thread(target=self._watch, args=(index,), daemon=True).start()
        import jax

        # What JAX would find in a cluster is left out: it gives each process one of the host's GPUs, and here one drives all.
        jax.distributed.initialize(hosts.address, self.count, self.index, cluster_detection_method="deactivate")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: Any, *_: object) -> None:
        """Leave together with the others; after an error, `fail` is what ends them."""
        if kind is None and self._peers:
            import jax

            self._tell({"bye": True})
            jax.distributed.shutdown()  # waits for all
            self._close()

    def share(self, value: Any = None) -> Any:
        """What host 0 calls it with (JSON), on all hosts."""
        if self.index == 0:
            self._tell({"shared": value})
            return value
        return self._shared.get()

    def check_name(self) -> None:
        """See that CPUs of other hosts can reach those of this one, which they do by what its name means to itself.

        Raises:
            ConfigError: it means this very machine, as some systems' /etc/hosts has it. GPUs and TPUs find each other otherwise.
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
            what = ", ".join(map(str, meant)) or "nothing"
            raise ConfigError(
                f"host {self.index} is called {name}, which to itself means {what}, where no other host can reach its CPUs: "
                f"let it mean {seen}, in /etc/hosts"
            )

    def fail(self, reason: str, code: int) -> None:
        """Tell the others why this host ends, and end the process; where there are no others, return."""
        if self._peers:
            with self._ending:
                self._tell({"failed": f"host {self.index} of {self.count} failed: {reason}", "code": code})
                _exit(code)

    def wait_for_reason(self) -> None:
        """After an operation between hosts failed: give the host that is the cause time to say so, and end with it."""
        if self._peers:
            time.sleep(REASON_WAIT)

    def _gather(self, port: int, timeout: float, flags: Any) -> None:
        """Host 0: wait for all others, and see that they fit."""
        try:
            _listen(port).close()  # jax.distributed will want it
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
                    problem = f"{names} of {self.count} did not come to port {port + 1} within {timeout:g} s"
                    break
                hello = peer.receive(timeout=10)
                if hello is None or not {"index", "count", "flags"} <= hello.keys():
                    peer.close()  # none of ours
                    continue
                index = hello["index"]
                if hello["count"] != self.count:
                    problem = f"host {index} was told of {hello['count']} hosts, host 0 of {self.count}"
                elif index not in missing:
                    problem = f"two processes were told that they are host {index}"
                elif hello["flags"] != flags:
                    theirs, ours = _only_in(hello["flags"], flags), _only_in(flags, hello["flags"])
                    problem = f"host {index} was started with other flags than host 0: {theirs} there, {ours} here"
                self._peers[-1 if problem else index] = peer
                missing.discard(index)
        if problem:
            self._tell({"failed": problem, "code": 2})
            self._close()
            raise ConfigError(f"{problem}; nothing was started")
        self._tell({"welcome": True})

    def _report(self, name: str, port: int, timeout: float, flags: Any) -> None:
        """Any other host: go to host 0, and wait until all have come."""
        deadline = time.monotonic() + timeout
        while True:
            try:
                peer = _Peer(socket.create_connection((name, port + 1), timeout=2))
                break
            except OSError as error:
                if time.monotonic() > deadline:
                    raise ConfigError(
                        f"host {self.index} of {self.count} did not find host 0 at {name}, port {port + 1}, within {timeout:g} s "
                        f"({error.strerror or error}): is it running, and the port open?"
                    ) from error
                time.sleep(0.1)
        peer.send({"index": self.index, "count": self.count, "flags": flags})
        message = peer.receive(timeout=timeout + 10)
        if message is None or "welcome" not in message:
            peer.close()
            reason = message["failed"] if message else "host 0 ended before all had come"
            raise ConfigError(f"{reason}; nothing was started")
        self._peers[0] = peer

    def _watch(self, index: int) -> None:
        """Wait for what host `index` has to say, and end as it ends unless it says farewell."""
        peer = self._peers[index]
        while (message := peer.receive()) is not None and "shared" in message:
            self._shared.put(message["shared"])
        if not self._peers:
            return  # this host has left
        if message is None:
            gone = (
                f"host {index} of {self.count} is gone without a word (killed, out of memory, cut off); the checkpoints are kept"
            )
            message = {"failed": gone, "code": 1}
        if "failed" in message:
            with self._ending:
                print(f"error: {message['failed']}", file=sys.stderr)
                self._tell(message)
                _exit(message["code"])

    def _close(self) -> None:
        peers, self._peers = self._peers, {}
        for peer in peers.values():
            peer.close()

    def _tell(self, message: dict[str, Any]) -> None:
        for peer in list(self._peers.values()):
            peer.send(message)


class _Peer:
    """One connection: a JSON object per line, either way."""

    def __init__(self, connection: socket.socket) -> None:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for option, value in KEEPALIVE.items():
            if hasattr(socket, option):  # macOS has other names
                connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)
        self._connection, self._lines = connection, connection.makefile("r", encoding="utf-8")

    def send(self, message: dict[str, Any]) -> None:
        with contextlib.suppress(OSError):  # it is gone, which `receive` tells
            self._connection.sendall((json.dumps(message) + "\n").encode())

    def own_address(self) -> ipaddress.IPv4Address | ipaddress.IPv6Address:
        """By which the other side knows this host."""
        address = ipaddress.ip_address(self._connection.getsockname()[0].partition("%")[0])
        return getattr(address, "ipv4_mapped", None) or address

    def close(self) -> None:
        with contextlib.suppress(OSError):  # the other side may have done so
            self._connection.shutdown(socket.SHUT_RDWR)
        self._connection.close()  # and with the last reader's `_lines`, it is gone

    def receive(self, timeout: float | None = None) -> dict[str, Any] | None:
        """The next message; None where there will be none, or it is none of ours."""
        self._connection.settimeout(timeout)
        try:
            message = json.loads(self._lines.readline())
        except (OSError, ValueError):
            return None
        finally:
            self._connection.settimeout(None)
        return message if isinstance(message, dict) else None


class Signals:
    """Notes a Ctrl-C or SIGTERM, for all hosts to stop after the same step; another Ctrl-C, later, acts as ever.

    What comes within `TWICE` seconds is the same signal: `timeout`, for one, sends its own to a process and then to its group.
    """

    def __init__(self) -> None:
        self.received, self._when = 0, 0.0

    def __enter__(self) -> Self:
        import jax

        self._hosts = jax.process_count()
        # Of several hosts, JAX itself takes the SIGTERM, and brings all to agree on a step.
        mine = (signal.SIGINT, signal.SIGTERM) if self._hosts == 1 else (signal.SIGINT,)
        self._before = {signum: signal.signal(signum, self._note) for signum in mine}
        return self

    def __exit__(self, *_: object) -> None:
        for signum, handler in self._before.items():
            signal.signal(signum, handler)

    def stop_after(self, step: int) -> bool:
        """Whether `step` is the last; to be asked after each step, with the same answer on all hosts."""
        if self._hosts == 1:
            return bool(self.received)
        from jax.experimental import multihost_utils

        stop = multihost_utils.reached_preemption_sync_point(step)
        if stop and not self.received:
            self.received = signal.SIGTERM
        return stop

    def _note(self, signum: int, _frame: FrameType | None) -> None:
        if not self.received:
            self.received, self._when = signum, time.monotonic()
            if self._hosts > 1:
                os.kill(os.getpid(), signal.SIGTERM)
        elif signum == signal.SIGINT and time.monotonic() - self._when > TWICE:
            raise KeyboardInterrupt


def find(hosts: Hosts) -> Hosts:
    """What was not given, as the cluster says it: SLURM, Open MPI, Kubernetes, Cloud TPU. Elsewhere this is the only host.

    The clusters are those of `jax.distributed.initialize`; JAX has no public name for finding them alone.
    """
    if hosts.count is not None:
        return hosts
    from jax._src.clusters import ClusterEnv

    with warnings.catch_warnings():
        if "JOB_COMPLETION_INDEX" not in os.environ:  # one pod by itself needs no package to find the others
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


def _only_in(flags: list[str], others: list[str]) -> str:
    return " ".join(flag for flag in flags if flag not in others) or "nothing"


def _exit(code: int) -> NoReturn:
    """End at once: Python's own way out would wait for hosts that are gone."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
