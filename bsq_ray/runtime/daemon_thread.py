"""Calls in daemon threads, which do not block the exit of the process."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future, wait
from typing import Any


def run_in_thread(function: Callable[[], Any], name: str) -> Future[Any]:
    """Call a function in a daemon thread.

    Args:
        function: called once; its result or error is that of the future.
        name: name of the thread.
    """
    future: Future[Any] = Future()

    def call() -> None:
        try:
            future.set_result(function())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=call, name=name, daemon=True).start()
    return future


class BackgroundUpload:
    """Calls a function that uploads new data in a thread, one call at a time.

    Args:
        upload: uploads all data of the time of its call; it can be called again after an error.
        name: name of the thread.
    """

    def __init__(self, upload: Callable[[], None], name: str) -> None:
        self._upload, self._name = upload, name
        self._future: Future[Any] | None = None

    def start(self) -> None:
        """Start an upload, unless one is running.

        Raises:
            Exception: the previous upload failed; another one has been started.
        """
        previous = self._future
        if previous is not None and not previous.done():
            return
        self._future = run_in_thread(self._upload, self._name)
        if previous is not None:
            previous.result()

    def finish(self) -> None:
        """Wait for the running upload, then upload the rest in this thread.

        Raises:
            Exception: the upload failed.
        """
        if self._future is not None:
            wait([self._future])
            self._future = None
        self._upload()
