"""The benchmark behind `everpool bench`: Everpool beside the machine's limits and its peers.

measure     rounds, medians, goals
contenders  the stores compared
servers     Redis and Ray, started and ended here
children    what runs in processes of its own
lab         folders and sizes; rows_*: what is measured; report, plot: what is shown
"""
