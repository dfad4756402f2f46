"""What runs beside what: the timeline of a step, and the decisions that are made from it.

machine_rates  how fast a machine reads, multiplies, copies and hands over
layer_work     amounts of one layer in one step, and which of its experts are computed where
layer_times    seconds of each part of a layer: amounts over rates
timeline       the step: lanes of GPU, link and CPU, layer after layer
"""
