"""From LLVM IR to callable code: compile, cache on disk, load."""
