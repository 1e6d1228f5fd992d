"""What was made last is kept, for threads that want it again: blocks of a bucket, decoded row groups."""

from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future
from threading import Lock
from typing import Generic, TypeVar

T = TypeVar("T")


class Kept(Generic[T]):
    """Values by number, each made once, whoever else waits for it; in another process it starts empty.

    Args:
      make: a value from its number; what it raises goes to all who wait, and is tried again by the next one.
      room: the sum of the sizes of what is kept; the value used last is kept whatever its size.
      size: of a value.
    """

    def __init__(self, make: Callable[[int], T], room: int, size: Callable[[T], int]):
        self._make, self._room, self._size = make, room, size
        self._futures: OrderedDict[int, Future[T]] = OrderedDict()
        self._lock = Lock()

    def __getitem__(self, number: int) -> T:
        with self._lock:
            future = self._futures.get(number)
            is_first = future is None
            if is_first:
                future = self._futures[number] = Future()
            self._futures.move_to_end(number)
        if is_first:
            self._fill(number, future)
        return future.result()

    def _fill(self, number: int, future: "Future[T]") -> None:
        try:
            made = self._make(number)
        except BaseException as error:
            with self._lock:
                self._futures.pop(number, None)
            future.set_exception(error)
            return
        future.set_result(made)
        with self._lock:
            done = [(key, self._size(future.result())) for key, future in self._futures.items() if future.done()]
            too_much = sum(size for _, size in done) - self._room
            for old, size in done[:-1]:
                if too_much <= 0:
                    break
                del self._futures[old]
                too_much -= size

    def __reduce__(self):  # for worker processes
        return type(self), (self._make, self._room, self._size)
