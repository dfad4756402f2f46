"""The hand-over of jobs from a GPU's stream to the worker threads."""
