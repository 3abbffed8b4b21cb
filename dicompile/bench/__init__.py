"""The benchmark: what caching saves in time, memory and compilation, beside everybody else who saves it.

`models` builds published models from their config.json, `workload` runs one generation of them, `contestants` and
`rivals` are the ways to run it, `measure` times them in turns, `compiling` what they cost before the first picture;
`results` holds the arithmetic, `tables` what is printed and written, `machine` where. `step_search` is another matter:
how others choose the steps that compute everything, for whoever compares `auto` with them.
"""
