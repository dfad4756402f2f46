"""The contract of `KTMoEWrapper`, clause by clause, against any implementation. See README.md."""
