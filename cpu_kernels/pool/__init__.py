"""Worker threads, where they run, and the memory they read."""
