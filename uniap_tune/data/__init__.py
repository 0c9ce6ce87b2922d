"""Facts that ship with the package: devices, clusters, models, efficiency constants; each with its source."""
