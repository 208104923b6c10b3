"""Ctrl-C and SIGTERM (of Slurm, of ``docker stop``) as a way in which a run ends, with all that it has."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any

import jax

JAX = os.path.dirname(jax.__file__) + os.sep


class Interruption:
    """While it is entered, in the main thread, SIGINT and SIGTERM leave what stands under `ends`.

    A user's own handler of SIGTERM is called too, and a SIGTERM that is ignored stays so; of SIGINT only Python's own
    handler is replaced. What comes outside of `ends` is kept in mind. What comes after `wait`, and while JAX traces,
    compiles or computes, waits for the next `check`: an exception out of JAX loses a step that is all but done, and may
    end the process with a fault at its exit. A second interruption does not wait. Afterwards all is as before.

    Attributes:
      came: whether an interruption came. cause: which signal it was, in words.
    """

    def __init__(self):
        self.came, self.cause, self._inside, self._waits = False, "", False, False
        self._before: dict[int, Any] = {}
        self._late: list[int] = []

    def __enter__(self) -> Interruption:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                handler = signal.getsignal(number)
                if _is_replaced(number, handler):
                    self._before[number] = handler
                    signal.signal(number, self._handle)
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._before.items():
            if signal.getsignal(number) == self._handle:  # not one that was set meanwhile
                signal.signal(number, handler)
        for number in self._late:  # a user's handler need not know that files were being written
            signal.raise_signal(number)

    def ends(self) -> _Ends:
        """A ``with`` block that is left, without an exception, by an interruption after its first `check`."""
        return _Ends(self)

    def check(self) -> None:
        """Leave the `ends` block now if an interruption came, and from here on when one comes."""
        self._inside, self._waits = True, False
        if self.came:
            raise KeyboardInterrupt

    def wait(self) -> None:
        """Finish what follows before an interruption is heeded."""
        self._waits = True

    def leave(self, error: BaseException | None) -> bool:
        """Whether ``error`` is the interruption, or what a library made of it."""
        self._inside = False
        self.came = self.came or isinstance(error, KeyboardInterrupt)
        return self.came and isinstance(error, (KeyboardInterrupt, Exception))

    def _handle(self, number: int, frame: FrameType | None) -> None:
        again, self.came, self.cause = self.came, True, f" by {signal.Signals(number).name}"
        own = self._before[number]
        if callable(own) and own is not signal.default_int_handler:
            if not self._inside:
                self._late.append(number)
                return
            own(number, frame)
        if self._inside and (again or not (self._waits or _in_jax(frame))):
            raise KeyboardInterrupt


class _Ends:
    # no generator: an interruption in the machinery of contextlib would pass by it
    def __init__(self, interruption: Interruption):
        self.interruption = interruption

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind, error, traceback) -> bool:
        return self.interruption.leave(error)


def _in_jax(frame: FrameType | None) -> bool:
    return frame is not None and frame.f_code.co_filename.startswith(JAX)


def _is_replaced(number: int, handler: Callable | int | None) -> bool:
    if number == signal.SIGINT:
        return handler is signal.default_int_handler
    return handler is signal.SIG_DFL or callable(handler)
