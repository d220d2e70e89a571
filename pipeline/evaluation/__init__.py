"""How good the models are: features, metrics with their uncertainty, copying, retrieval, gate, report.

`evaluate.evaluate` joins the parts; all others are functions of arrays. Every number travels with its sample
count; with too few samples there is a reason instead of a number.
"""
