"""One run a workdir: WORKDIR/lock says which process writes into it.

The file is written on the condition that nobody else wrote it since it was read, which TensorStore can do on disks and
in buckets alike. Whoever holds it renews it every few seconds. A lock is dead when its process is gone, where that can
be seen, and else when it was not renewed for a while; then the next run takes it.
"""

import json
import logging
import os
import socket
import threading
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import tensorstore
from etils import epath

from clip_jax.errors import RunStopped, UserError
from clip_jax.training.storage import storage
from clip_jax.workdir import absolute

logger = logging.getLogger(__name__)

LOCK = "lock"
RENEWAL = 10.0  # seconds
PATIENCE = 60.0  # seconds without a renewal after which a lock on another machine is dead


@dataclass(frozen=True)
class Holder:
    """What is in the lock.

    Attributes:
      host: name of the machine.
      machine: its boot and process namespace: where both are ours, we can see whether the process lives.
      pid: of the process.
      began: when the process began, which tells it from a later one of the same pid.
      renewals: how often it said that it lives.
    """

    host: str
    machine: str
    pid: int
    began: str
    renewals: int = 0

    @classmethod
    def myself(cls) -> "Holder":
        """This process."""
        return cls(socket.gethostname(), _machine(), os.getpid(), _began(os.getpid()))

    def is_gone(self) -> bool:
        """Whether this process is known to have ended."""
        return bool(self.machine) and self.machine == _machine() and self.began != _began(self.pid)


class Lock:
    """Held from its creation to `close`.

    Raises:
      UserError: another process holds it; the message has its host and pid.
    """

    def __init__(self, workdir: epath.PathLike, renewal: float = RENEWAL, patience: float = PATIENCE):
        self._workdir, self._renewal = str(workdir), renewal
        self._mine = Holder.myself()
        self._lost = threading.Event()
        with storage("write", f"{self._workdir}/{LOCK}"):
            self._store = _open(workdir)
            self._generation = self._take(patience)
        self._renewed, self._renewing = time.monotonic(), threading.Lock()
        self._closed = threading.Event()
        threading.Thread(target=self._keep, daemon=True).start()

    def check(self) -> None:
        """See that this process still holds the lock.

        Raises:
          RunStopped: another process took it, because this one stood still for too long.
        """
        if time.monotonic() - self._renewed > 3 * self._renewal:  # it stood still: others may have thought it dead
            with storage("renew", f"{self._workdir}/{LOCK}"):
                self._renew()
        if self._lost.is_set():
            raise RunStopped(f"another process has taken over {self._workdir}, so this one stops")

    def close(self) -> None:
        """Let go of the lock, if it is still ours."""
        self._closed.set()
        try:
            with self._renewing, storage("remove", f"{self._workdir}/{LOCK}"):
                self._store.write(LOCK, None, if_equal=self._generation).result()
        except RunStopped as error:  # the next run finds out that this process is gone
            logger.warning("%s", error)

    def _take(self, patience: float) -> bytes:
        """Write the lock; returns the generation of what was written."""
        found = self._store.read(LOCK).result()
        if found.state == "value" and self._holder_leaves(found.value, patience):
            return self._take(patience)
        written = self._store.write(LOCK, _to_bytes(self._mine), if_equal=found.stamp.generation).result()
        if not written.generation:
            raise UserError(f"another process has just begun to train in {self._workdir}; give another --workdir")
        return written.generation

    def _holder_leaves(self, value: bytes, patience: float) -> bool:
        """Whether the holder lets go while we wait for a sign of life; if it is alive we are refused."""
        try:
            holder = Holder(**json.loads(value))
        except (ValueError, TypeError):
            logger.warning("%s/%s is damaged; taking it over", self._workdir, LOCK)
            return False
        visible = bool(holder.machine) and holder.machine == _machine()
        later = value if visible else self._after(patience, value, holder)
        if later is None:
            return True
        if later != value or (visible and not holder.is_gone()):
            raise UserError(
                f"process {holder.pid} on {holder.host} is training in {self._workdir}; "
                "wait for it, end it, or give another --workdir"
            )
        logger.info("taking over %s from process %d on %s, which is gone", self._workdir, holder.pid, holder.host)
        return False

    def _after(self, patience: float, value: bytes, holder: Holder) -> bytes | None:
        """What stands in the lock when somebody writes it or time is up; None if it was removed."""
        logger.info("waiting %.0f s to see whether process %d on %s still trains", patience, holder.pid, holder.host)
        end = time.monotonic() + patience
        while time.monotonic() < end:
            time.sleep(min(1.0, patience / 10))
            found = self._store.read(LOCK).result()
            if found.state != "value":
                return None
            if found.value != value:
                return found.value
        return value

    def _keep(self) -> None:
        while not self._closed.wait(self._renewal) and not self._lost.is_set():
            try:
                self._renew()
            except Exception as error:  # the disk or bucket is away: the next renewal tells whether the lock is lost
                logger.warning("cannot renew %s/%s (%s)", self._workdir, LOCK, str(error)[:200])

    def _renew(self) -> None:
        with self._renewing:
            if self._closed.is_set():
                return
            self._mine = replace(self._mine, renewals=self._mine.renewals + 1)
            written = self._store.write(LOCK, _to_bytes(self._mine), if_equal=self._generation).result()
            if written.generation:
                self._generation, self._renewed = written.generation, time.monotonic()
            elif not self._was_ours():
                self._lost.set()

    def _was_ours(self) -> bool:
        """Whether what stands there is a renewal of our own, of which we never heard that it had succeeded."""
        found = self._store.read(LOCK).result()
        ours = found.state == "value" and replace(Holder(**json.loads(found.value)), renewals=0) == Holder.myself()
        if ours:
            self._generation = found.stamp.generation
        return ours


def _open(workdir: epath.PathLike) -> tensorstore.KvStore:
    path = str(absolute(workdir))
    return tensorstore.KvStore.open(f"{path}/" if "://" in path else f"file://{path}/").result()


def _to_bytes(holder: Holder) -> bytes:
    return json.dumps(asdict(holder)).encode()


def _machine() -> str:
    """This boot of this machine, and the namespace in which its pids count; empty where the system does not say."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def _began(pid: int) -> str:
    """When a process began, in clock ticks since the boot; empty if there is none."""
    try:
        # The second field is the program's name in brackets, which can hold blanks and brackets.
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if fields[0] in "ZX" else fields[19]
