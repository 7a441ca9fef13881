"""Private APIs of DeepSpeed, one function each; contract tests are in tests/runtime/test_internals.py."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any


def capture_checkpoint(engine: Any, folder: str, tag: str, on_save: Callable[[Any, str], None]) -> None:
    """Run `engine.save_checkpoint`, but pass every state to `on_save(state, path)` instead of writing it.

    Why: asynchronous checkpoints need the state in host memory, and `save_checkpoint` writes files.
    Seen in: DeepSpeed 0.19.8, where `create_checkpoint_engine` accepts only DeepSpeed's own checkpoint engines.
    Public replacement: a configuration key that accepts a checkpoint engine.
    Contract test: test_capture_checkpoint_writes_no_state.
    """
    from deepspeed.runtime.checkpoint_engine import TorchCheckpointEngine

    class CapturingCheckpointEngine(TorchCheckpointEngine):
        def save(self, state_dict: Any, path: str) -> None:
            on_save(state_dict, path)

    original_engine = engine.checkpoint_engine
    engine.checkpoint_engine = CapturingCheckpointEngine()
    try:
        engine.save_checkpoint(folder, tag=tag)
    finally:
        engine.checkpoint_engine = original_engine


def set_load_universal(engine: Any, enabled: bool) -> None:
    """Choose whether the next `engine.load_checkpoint` reads the universal format.

    Why: the number of workers that wrote a checkpoint is known only after the engine has been built.
    Seen in: DeepSpeed 0.19.8, where the key `checkpoint.load_universal` is read only at initialization.
    Public replacement: an argument of `load_checkpoint`.
    Contract test: test_set_load_universal_changes_engine.
    """
    engine._config.load_universal_checkpoint = enabled


def disable_shared_memory_op() -> None:
    """Keep DeepSpeed from compiling its shared-memory communication operator.

    Why: the operator is compiled at first use on every node and serves only DeepSpeed's own launcher.
    Seen in: DeepSpeed 0.19.8, which has no setting for it.
    Public replacement: an environment variable or configuration key that disables the operator.
    Contract test: test_disable_shared_memory_op_keeps_backend_without_op.
    """
    import deepspeed.comm  # noqa: F401

    sys.modules["deepspeed.comm.torch"].build_shm_op = lambda: None  # type: ignore[attr-defined]
