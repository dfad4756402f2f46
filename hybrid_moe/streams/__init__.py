"""What a GPU's stream needs: its interface, CUDA's own, memory flags, staging, buffers, faults."""
