"""Ray sessions, actor pools, signals, memory allocator and numeric precision."""
