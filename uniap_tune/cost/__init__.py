"""The cost model: a layer and a strategy in, seconds and bytes out."""
