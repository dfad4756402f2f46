"""What only a GPU can tell, in one command of a few minutes: `make gpu-check`.

`plan.py` lists the steps, `running.py` runs each in a process of its own within the time that is
left, `report.py` writes what came out. Tests are the project's own, with kernels launched instead
of simulated. Measurements are the files that are called like what they measure. Without a GPU all
steps run as a rehearsal: small shapes, references in place of kernels, and "not measured" instead
of times.
"""
