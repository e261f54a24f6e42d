"""The hosts of a run meet before JAX starts, so that one that is missing or differs is told by name.

JAX's own start ends every process with a stack trace of C++ if one does not come, and says nothing of hosts
that run other code. So process 0 listens one port below JAX's coordinator, all others report to it, and the
connections stay open: what one host finds wrong, every host tells before it ends, and a host that dies is
noticed by its connection.

A message is one line of JSON.
"""

import collections
import contextlib
import dataclasses
import json
import os
import queue
import re
import selectors
import socket
import sys
import threading
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NoReturn

import jax

_LONGEST = 2**20         # bytes of a message
_NOTICE = 5              # seconds in which the connection of a host that died tells so
_SILENT = 60             # seconds of waiting after which it is told who is waited for
# A machine that lost its power says no goodbye. macOS has other names for these, and its own two hours.
_ALIVE = {"TCP_KEEPIDLE": 15, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 3}


@dataclasses.dataclass(frozen=True)
class Place:
    """One process of several: where all meet, how many they are, and which this is."""

    address: str                     # of JAX's coordinator, host:port
    count: int
    index: int
    devices: tuple[int, ...] | None = None   # that this process takes of its machine; None: all
    names: tuple[str, ...] = ()      # of all processes, where the cluster tells them

    def __post_init__(self):
        host, _, port = self.address.rpartition(":")
        if not host or not port.isdecimal() or not 1 < int(port) < 65536:
            raise ValueError(f"coordinator address {self.address!r}: give HOST:PORT; the port below it is used "
                             "too")
        if not 0 <= self.index < self.count:
            raise ValueError(f"process_id is {self.index}; of {self.count} processes it must be 0 to "
                             f"{self.count - 1}")

    @property
    def meeting_point(self) -> tuple[str, int]:
        host, _, port = self.address.rpartition(":")
        return host.strip("[]"), int(port) - 1


def find_place(address: str = "", count: int | None = None, index: int | None = None, *,
               detect: bool = False) -> Place | None:
    """From explicit values, else from a cluster's environment; None for a process that is alone.

    Args: detect looks for Cloud TPU also where only Google's metadata server knows of it.
    Raises: ValueError if some but not all values are given, or nothing is detected.
    """
    if address or count is not None or index is not None:
        if not address or count is None or index is None:
            raise ValueError("give --coordinator_address, --num_processes and --process_id together")
        return Place(address, count, index)
    if not detect and not _is_one_of_several():
        return None
    # Private: `jax.distributed.initialize()` finds the same, but tells nobody where its coordinator is.
    from jax._src.clusters import ClusterEnv
    address, count, index, devices = ClusterEnv.auto_detect_unset_distributed_params(
        None, None, None, None, None, _SILENT)
    if address is None or count is None or index is None:
        raise ValueError("neither Cloud TPU, nor SLURM, nor Open MPI is found here; leave --distributed out, "
                         "or give --coordinator_address, --num_processes and --process_id")
    if devices is None or re.fullmatch(r"1(\(x\d+\))?", os.environ.get("SLURM_STEP_TASKS_PER_NODE", "")):
        return Place(address, count, index, None, _known_names(count))   # alone on its machine: all devices
    return Place(address, count, index, tuple(devices), _known_names(count))


def _is_one_of_several() -> bool:
    """Whether the environment says so: a task of `srun` or `mpirun`, a pod of a TPU node pool."""
    number = lambda name: int(os.environ.get(name) or 1)
    if "SLURM_PROCID" in os.environ and number("SLURM_NTASKS") > 1:
        return True
    return (number("OMPI_COMM_WORLD_SIZE") > 1 or number("MEGASCALE_NUM_SLICES") > 1
            or "," in os.environ.get("TPU_WORKER_HOSTNAMES", ""))


def _known_names(count: int) -> tuple[str, ...]:
    for names in (os.environ.get("TPU_WORKER_HOSTNAMES", "").split(","),
                  expand_nodes(os.environ.get("SLURM_STEP_NODELIST", ""))):
        if len(names) == count:
            return tuple(names)
    return ()


def expand_nodes(text: str) -> list[str]:
    """SLURM's list of nodes, e.g. "a[01-03,7],b" -> a01 a02 a03 a7 b."""
    names = []
    for prefix, ranges, suffix in re.findall(r"([^,\[]+)(?:\[([^\]]*)\])?([^,\[]*)", text):
        for part in ranges.split(",") if ranges else [""]:
            first, dash, last = part.partition("-")
            numbers = range(int(first), int(last) + 1) if dash else None
            middles = [f"{number:0{len(first)}}" for number in numbers] if dash else [part]
            names += [f"{prefix}{middle}{suffix}" for middle in middles]
    return names


class Link:
    """A connection that carries lines of JSON."""

    def __init__(self, connection: socket.socket):
        self.socket = connection
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for option, value in _ALIVE.items():
            if hasattr(socket, option):
                connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)
        self._buffer = b""

    @property
    def has_line(self) -> bool:
        """Whether a message is here already, so that the socket has nothing to tell."""
        return b"\n" in self._buffer

    def send(self, message: Mapping[str, Any]) -> None:
        with contextlib.suppress(OSError):   # who is gone is noticed where it is read
            self.socket.sendall(json.dumps(message).encode() + b"\n")

    def receive(self, timeout: float | None = None) -> dict[str, Any] | None:
        """The next message; None if the other end is gone, silent for `timeout` seconds, or says nonsense."""
        try:
            self.socket.settimeout(timeout)
            while not self.has_line:
                part = self.socket.recv(2**16)
                if not part or len(self._buffer) > _LONGEST:
                    return None
                self._buffer += part
            line, _, self._buffer = self._buffer.partition(b"\n")
            message = json.loads(line)
        except (OSError, ValueError):
            return None
        return message if isinstance(message, dict) else None

    def close(self) -> None:
        self.socket.close()


class Hosts:
    """All processes of a run, this one among them. Alone, it agrees with itself."""

    def __init__(self, index: int = 0, names: Sequence[str] = (), links: Mapping[int, Link] | None = None):
        """Args: links of process 0 lead to every other, and of any other to process 0."""
        self.index, self.names = index, tuple(names) or (socket.gethostname(),)
        self._links = dict(links or {})
        self._notes: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._calls: queue.SimpleQueue[None] = queue.SimpleQueue()

    @property
    def count(self) -> int:
        return len(self.names)

    @property
    def is_first(self) -> bool:
        """Of the processes; it writes what is written once."""
        return self.index == 0

    def name(self, index: int) -> str:
        return f"host {index} ({self.names[index]})"

    def agree(self, facts: Mapping[str, str], error: str = "") -> None:
        """Waits for all; facts must be the same everywhere.

        Args: error is what went wrong on this host; then no host goes on.
        Raises: ValueError on all hosts, naming the one that differs, failed or ended.
        """
        mine = {"facts": dict(facts), "error": error}
        if self.is_first:
            verdict = self._judge([mine] + [self._hear(index) for index in range(1, self.count)])
            self._tell({"fault": verdict})
        else:
            self._links[0].send(mine)
            answer = self._hear(0)
            verdict = answer.get("fault", "") if answer else f"{self.name(0)} ended during the start"
        if verdict:
            raise ValueError(verdict)

    @contextlib.contextmanager
    def together(self) -> Iterator[dict[str, str]]:
        """A part of the start that each host does by itself; its facts are agreed on at the end.

        Raises: ValueError on all hosts if it is raised on one.
        """
        facts: dict[str, str] = {}
        try:
            yield facts
        except ValueError as error:
            if self.count > 1:
                self.agree({}, error=str(error))
            raise
        self.agree(facts)

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """While it lasts, whatever ends one host ends all others too, at once and with its name.

        It lasts until all are done. JAX's own heartbeat takes a minute or more, and tells no name.
        """
        if self.count == 1:
            yield
            return
        watch = threading.Thread(target=self._watch, daemon=True)
        watch.start()
        try:
            yield
        except BaseException as error:
            if isinstance(error, jax.errors.JaxRuntimeError):
                time.sleep(_NOTICE)   # of a collective whose other end is gone: that one is to be named
            self._tell({"fault": f"{self.name(self.index)}: {type(error).__name__}: {error}"})
            if not isinstance(error, ValueError):
                traceback.print_exc()
            self._end(str(error))
        self._tell({"done": True})
        watch.join()

    def _watch(self) -> None:
        watched = {link.socket: index for index, link in self._links.items()}
        while watched:
            for ready in _wait(list(watched)):
                index = watched[ready]
                while message := self._links[index].receive():
                    if "note" in message:
                        self._notes.put(message["note"])
                    if "call" in message:
                        self._calls.put(None)
                    if not message.keys() & {"note", "call"} or not self._links[index].has_line:
                        break
                if message is None or "fault" in message:
                    sentence = (message or {}).get("fault") or f"{self.name(index)} ended; see the log there"
                    self._tell({"fault": sentence})
                    self._end(sentence)
                if "done" in message:
                    del watched[ready]

    def note(self, value: Any) -> None:
        """Tells host 0 something, JSON, while it is `watching`; it finds it in `notes`."""
        if not self.is_first:
            self._links[0].send({"note": value})

    def notes(self) -> list[Any]:
        """What others have told since it was last asked, without waiting."""
        found = []
        with contextlib.suppress(queue.Empty):
            while True:
                found.append(self._notes.get_nowait())
        return found

    def await_first(self) -> None:
        """While it is `watching`: all go on once host 0 has come here, which waits for none."""
        if self.is_first:
            self._tell({"call": True})
        else:
            self._calls.get()

    def _tell(self, message: Mapping[str, Any]) -> None:
        for link in self._links.values():
            link.send(message)

    def _end(self, sentence: str) -> NoReturn:
        """Now: JAX's shutdown would wait for hosts that are gone."""
        print(f"error: {sentence}", file=sys.stderr, flush=True)
        os._exit(1)

    def _hear(self, index: int) -> dict[str, Any] | None:
        link = self._links[index]
        while not (link.has_line or _wait([link.socket], _SILENT)):
            print(f"{self.name(self.index)}: waiting for {self.name(index)}", file=sys.stderr, flush=True)
        return link.receive()

    def _judge(self, reports: list[dict[str, Any] | None]) -> str:
        """The sentence for what is wrong, or nothing."""
        gone = [self.name(index) for index, report in enumerate(reports) if report is None]
        if gone:
            return f"{', '.join(gone)} ended during the start; see the log there"
        errors = [f"{self.name(index)}: {report['error']}" for index, report in enumerate(reports)
                  if report["error"]]
        if errors:
            return errors[0] if self.count > 1 else str(reports[0]["error"])
        return "; ".join(self._compare([report["facts"] for report in reports]))

    def _compare(self, facts: list[dict[str, str]]) -> Iterator[str]:
        for key in dict.fromkeys(key for each in facts for key in each):
            values = [each.get(key, "nothing") for each in facts]
            usual = collections.Counter(values).most_common(1)[0][0]   # of equally many, that of host 0
            for index, value in enumerate(values):
                if value != usual:
                    yield f"hosts disagree: {self.name(index)} has {key} {value}, most have {usual}"

    def close(self) -> None:
        for link in self._links.values():
            link.close()


def _wait(sockets: list[socket.socket], timeout: float | None = None) -> list[socket.socket]:
    """Those with something to read. Not by `select`, which knows a thousand at most."""
    with selectors.DefaultSelector() as selector:
        for each in sockets:
            selector.register(each, selectors.EVENT_READ)
        return [key.fileobj for key, _ in selector.select(timeout)]


def meet(place: Place, timeout: float) -> Hosts:
    """All processes find each other. Raises: ValueError, naming who did not come within `timeout` seconds."""
    deadline = time.monotonic() + timeout
    return (_gather if place.index == 0 else _report)(place, deadline, timeout)


def _gather(place: Place, deadline: float, timeout: float) -> Hosts:
    names, links, fault = {0: socket.gethostname()}, {}, ""
    try:
        both = socket.has_dualstack_ipv6()
        server = socket.create_server(("", place.meeting_point[1]), backlog=place.count, dualstack_ipv6=both,
                                      family=socket.AF_INET6 if both else socket.AF_INET)
    except OSError as error:
        raise ValueError(f"port {place.meeting_point[1]}, one below the coordinator's, cannot be listened on "
                         f"({error}); is another run alive? Choose another --coordinator_address") from error
    with server:
        while len(names) < place.count and not fault:
            server.settimeout(max(deadline - time.monotonic(), 0.01))
            try:
                link = Link(server.accept()[0])
            except TimeoutError:
                missing = [_describe(place, index) for index in range(place.count) if index not in names]
                came = ", ".join(f"{index} ({name})" for index, name in sorted(names.items()))
                fault = f"{', '.join(missing)} did not come within {timeout:g} s; these did: {came}"
                break
            fault = _admit(place, link, names, links)
    verdict = {"fault": fault} if fault else {"names": [names[index] for index in range(place.count)]}
    for link in links.values():
        link.send(verdict)
    if fault:
        raise ValueError(fault)
    return Hosts(0, verdict["names"], links)


def _admit(place: Place, link: Link, names: dict[int, str], links: dict[int, Link]) -> str:
    """Takes a new connection in, if it is one of ours; returns what is wrong with it."""
    hello = link.receive(timeout=5)
    index, count, name = (hello or {}).get("index"), (hello or {}).get("count"), (hello or {}).get("name")
    if not isinstance(index, int) or not isinstance(name, str):
        link.close()     # a stranger
        return ""
    links[index if index not in links else -len(links)] = link
    if count != place.count or not 0 < index < place.count:
        return f"{name} takes itself for process {index} of {count}; {names[0]} for process 0 of {place.count}"
    if index in names:
        return f"two processes take themselves for number {index}: on {names[index]} and on {name}"
    names[index] = name
    return ""


def _report(place: Place, deadline: float, timeout: float) -> Hosts:
    link = None
    while link is None:
        try:
            link = Link(socket.create_connection(place.meeting_point, timeout=5))
        except OSError as error:
            if time.monotonic() > deadline:
                raise ValueError(f"{_describe(place, 0)} did not answer at {place.meeting_point[0]}:"
                                 f"{place.meeting_point[1]} within {timeout:g} s ({error})") from error
            time.sleep(0.2)
    link.send({"index": place.index, "count": place.count, "name": socket.gethostname()})
    answer = link.receive(timeout=timeout + 10) or {"fault": f"{_describe(place, 0)} ended during the start"}
    if "names" not in answer:
        raise ValueError(answer["fault"])
    return Hosts(place.index, answer["names"], {0: link})


def _describe(place: Place, index: int) -> str:
    """A process that has not come: by its name, where the cluster tells it."""
    return f"host {index}" + (f" ({place.names[index]})" if place.names else "")


def start_jax(place: Place, timeout: int) -> None:
    """`jax.distributed.initialize` for processes that have met."""
    jax.distributed.initialize(place.address, place.count, place.index, place.devices,
                               initialization_timeout=timeout, cluster_detection_method="deactivate")
    jax.devices()   # all together: each waits for what the others have
