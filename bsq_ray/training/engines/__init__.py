"""Engines that hold one optimized module each: plain data parallelism and DeepSpeed ZeRO."""
