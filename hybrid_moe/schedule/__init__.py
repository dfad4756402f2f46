"""What runs beside what: the timeline of a step, and the decisions that are made from it.

machine_rates  how fast a machine reads, multiplies, copies and hands over
layer_work     amounts of one layer in one step, and which of its experts are computed where
layer_times    seconds of each part of a layer: amounts over rates
timeline       the step: lanes of GPU, link and CPU, layer after layer
layer_demand   what a batch asks of a layer, once the routing is known
layer_step     a layer of the timeline, compiled, for searches
choice_search  which experts of a layer to send and to defer: the search
step_scheduler   decides layer by layer, from what is known so far
offline_optimum  the best step with all routing known: what decisions are measured against
learned_rates    rates, and what layers that are over have said about them
prefill_planner  decides for long batches: how many experts travel
step_planner     decides for short ones, while that pays: step_scheduler with learned rates
staying        which of the experts that were sent stay on the GPU
deferral_depth how many experts of a token to defer, for a batch size
draft_gate     how many tokens a draft proposes, so that speculation does not lose
measured_gate  the same where only measured steps say how long they are
"""
