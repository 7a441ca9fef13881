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
        self._lock = threading.Lock()
        self._is_running = self._has_new_data = False

    def start(self) -> None:
        """Start an upload, or let the running one upload the new data, too.

        Raises:
            Exception: the previous upload failed; another one has been started.
        """
        with self._lock:
            if self._is_running:
                self._has_new_data = True
                return
            self._is_running = True
        previous, self._future = self._future, run_in_thread(self._upload_until_done, self._name)
        if previous is not None:
            previous.result()

    def _upload_until_done(self) -> None:
        while True:
            try:
                self._upload()
            except BaseException:
                with self._lock:
                    self._is_running = self._has_new_data = False
                raise
            with self._lock:
                if not self._has_new_data:
                    self._is_running = False
                    return
                self._has_new_data = False

    def finish(self) -> None:
        """Wait for the running upload, then upload the rest in this thread.

        Raises:
            Exception: the upload failed.
        """
        if self._future is not None:
            wait([self._future])
            self._future = None
        self._upload()
