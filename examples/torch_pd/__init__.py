"""A prefill and a decode process of a PyTorch model with a paged KV cache that travels by kvtransfer. README.md is the guide.

Read in this order: `workers.py` (all that a worker does with kvtransfer), `pages.py` (how memory is described to it),
`torch_model.py` (paged attention), `driver.py` (starts the processes and compares their tokens).
"""
