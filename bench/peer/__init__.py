"""Workers of `bench/peers.py`: one library per process, one interface."""
