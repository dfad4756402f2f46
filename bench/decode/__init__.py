"""What `bench/steps.py` measures: variants of the decode kernel, their data, their instructions."""
