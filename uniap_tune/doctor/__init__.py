"""The doctor: what is the matter with a configuration somebody already runs, and which change helps."""
