"""The frontier: plans of one job worth choosing between, by memory and by number of devices."""
